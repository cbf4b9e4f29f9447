//! What the monitor says about itself: the log and the metrics, in files, pipes, and where there is no room.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::process::Command;

use common::{Code, Machine, hand, hand_over, refusal, says, wait_for};
use roost_vmm::client::{Client, ClientError};
use serde_json::{Value, json};

fn pipe(path: &Path) {
    assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
}

fn read(machine: &Machine, name: &str) -> String {
    std::fs::read_to_string(machine.path(name)).unwrap()
}

fn flush(client: &Client) -> Result<(), ClientError> {
    client.put("PUT", "/actions", &json!({ "action_type": "FlushMetrics" }))
}

/// Lines of metrics, each of which must be whole.
fn lines(text: &str) -> Vec<Value> {
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|why| panic!("{why}: {line}")))
        .collect()
}

#[test]
fn lines_go_to_the_log_with_time_instance_and_level() {
    let mut machine = Machine::new(&Code::default().power_off());
    std::fs::write(machine.path("log"), "before\n").unwrap();
    machine.config["logger"] =
        json!({ "log_path": machine.text("log"), "level": "info", "show_level": true });
    let ended = machine.run();
    assert_eq!((ended.code, ended.stderr.as_str()), (0, ""));
    let log = read(&machine, "log");
    let line = log.strip_prefix("before\n").unwrap();
    let (time, rest) = line.split_once(' ').unwrap();
    assert_eq!(rest, "[test:vmm-api:INFO] the guest powered off\n");
    assert!(time.len() == 29 && &time[10..11] == "T" && time[..4].parse::<u32>().unwrap() >= 2024, "{time}");
}

#[test]
fn why_a_machine_does_not_start_is_in_the_log_and_on_stderr() {
    let mut machine = Machine::new(&Code::default().power_off());
    machine.config["logger"] = json!({ "log_path": machine.text("log") });
    machine.config["boot-source"]["kernel_image_path"] = json!("/no/such/kernel");
    let ended = machine.run();
    assert_ne!(ended.code, 0);
    for text in [&ended.stderr, &read(&machine, "log")] {
        assert_eq!(text.matches("/no/such/kernel").count(), 1, "{text}");
    }
}

#[test]
fn levels_and_modules_choose_lines_and_change_while_the_machine_runs() {
    // ud2: a crash.
    let mut machine = Machine::new(&machines_echo_then_crash());
    machine.config["logger"] = json!({ "level": "Error" });
    let (_files, handed) = hand(&machine, &["log", "other"]);
    machine.start(&handed);
    let client = machine.client();
    let log = |change: Value| client.put("PUT", "/logger", &change).unwrap();
    log(json!({ "log_path": "log", "level": "Debug", "show_log_origin": true }));
    client.pause().unwrap();
    assert!(read(&machine, "log").contains("PATCH /vm: done\n"));
    log(json!({ "log_path": "other", "module": "roost_vmm::devices" }));
    client.resume().unwrap();
    assert_eq!(read(&machine, "other"), "");
    let why = refusal(client.put("PUT", "/logger", &json!({ "log_path": machine.text("x") })));
    assert!(why.contains("log") && why.contains("was not handed over"), "{why}");
    let config: Value = serde_json::from_slice(&client.request("GET", "/vm/config", b"").unwrap()).unwrap();
    let expected = json!({
        "log_path": "other", "level": "Debug", "show_log_origin": true, "module": "roost_vmm::devices",
    });
    assert_eq!(config["logger"], expected);
    log(json!({ "module": "running", "level": "Error" }));
    client.console_input(b"x").unwrap();
    let ended = machine.wait();
    assert_eq!(ended.stderr, "");
    let other = read(&machine, "other");
    assert!(other.contains("[test:vmm-api:crates/vmm/src/running.rs:"), "{other}");
    assert!(other.contains("triple fault") && other.lines().count() == 1, "{other}");
}

/// Waits for a byte of input, and crashes.
fn machines_echo_then_crash() -> Code {
    // again: mov edx, 0x3fd; in al, dx; test al, 1; jz again; ud2
    Code::default().bytes(&[0xba, 0xfd, 0x03, 0, 0, 0xec, 0xa8, 0x01, 0x74, 0xf6, 0x0f, 0x0b])
}

/// The command line's log and metrics; a log without room stops nobody, and is counted.
#[test]
fn a_full_log_stops_nobody_and_is_counted() {
    let mut machine = Machine::new(&Code::default().print("up").stop());
    let full = File::options().write(true).open("/dev/full").unwrap();
    let mut words = hand_over("full", &full).to_vec();
    let metrics = machine.text("metrics");
    words.extend(
        ["--log-path=full", "--level", "debug", "--show-level", "--metrics-path", &metrics]
            .map(str::to_owned),
    );
    machine.start(&words);
    says(&machine, "up");
    let client = machine.client();
    client.pause().unwrap();
    flush(&client).unwrap();
    client.force_stop().unwrap();
    assert_eq!(machine.wait().stderr, "");
    let lines = lines(&read(&machine, "metrics"));
    // At the start, as asked for, at the end; one that was born from a snapshot had an end before.
    let lines = &lines[lines.len() - 3..];
    let missed: Vec<u64> =
        lines.iter().map(|line| line["logger"]["missed_log_count"].as_u64().unwrap()).collect();
    assert!(missed[0] < missed[1] && missed[1] < missed[2], "{missed:?}");
    assert_eq!(lines[1]["serial"]["bytes_out"], json!(2));
    assert!(lines[0]["utc_timestamp_ms"].as_u64() <= lines[2]["utc_timestamp_ms"].as_u64());
}

/// Nobody reads the pipe: lines are missed and counted, none is torn, and the machine goes on.
#[test]
fn metrics_for_a_pipe_that_nobody_reads_are_missed_whole() {
    let mut machine = Machine::new(&Code::default().print("up").stop());
    pipe(&machine.path("pipe"));
    let socket = machine.text("api");
    machine.start_with(&["run", "--api-sock", &socket]);
    let client = machine.client();
    let put = |path: &str, body: &Value| client.put("PUT", path, body).unwrap();
    put("/boot-source", &machine.config["boot-source"]);
    put("/serial", &machine.config["serial"]);
    assert!(refusal(flush(&client)).contains("before it is built"));
    put("/metrics", &json!({ "metrics_path": machine.text("pipe") }));
    client.start().unwrap();
    says(&machine, "up");
    let mut written = 1;
    let why = loop {
        match flush(&client) {
            Ok(()) => written += 1,
            result => break refusal(result),
        }
        assert!(written < 10_000, "a pipe without an end");
    };
    assert!(why.contains("missed"), "{why}");
    refusal(flush(&client));
    let mut reader = File::open(machine.path("pipe")).unwrap();
    let mut text = Vec::new();
    let mut chunk = [0; 4096];
    while lines_in(&text) + 1 < written {
        let count = reader.read(&mut chunk).unwrap();
        text.extend_from_slice(&chunk[..count]);
    }
    flush(&client).unwrap();
    while lines_in(&text) < written + 1 {
        let count = reader.read(&mut chunk).unwrap();
        text.extend_from_slice(&chunk[..count]);
    }
    let lines = lines(std::str::from_utf8(&text).unwrap());
    assert_eq!(lines.last().unwrap()["logger"]["missed_metrics_count"], json!(2));
    assert_eq!(lines.len(), written + 1);
}

fn lines_in(text: &[u8]) -> usize {
    text.iter().filter(|byte| **byte == b'\n').count()
}

/// The timer that writes a line each minute, as the kernel shows it.
#[test]
fn metrics_are_due_each_minute_once_the_machine_runs() {
    let mut machine = Machine::new(&Code::default().print("up").stop());
    machine.config["metrics"] = json!({ "metrics_path": machine.text("metrics") });
    machine.start(&["--hold"]);
    let client = machine.client();
    let periods = || {
        let folder = std::fs::read_dir(format!("/proc/{}/fdinfo", machine.pid())).unwrap();
        let texts = folder.filter_map(|entry| std::fs::read_to_string(entry.unwrap().path()).ok());
        texts.filter(|text| text.contains("it_interval: (60, 0)")).count()
    };
    assert_eq!((periods(), read(&machine, "metrics").as_str()), (0, ""));
    client.start().unwrap();
    wait_for("a line", || (!read(&machine, "metrics").is_empty()).then_some(()));
    assert_eq!(periods(), 1);
    client.force_stop().unwrap();
    machine.wait();
    assert_eq!(lines(&read(&machine, "metrics")).len(), 2);
}
