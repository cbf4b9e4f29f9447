//! Guests that print without end, and where their output goes.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use common::{Code, Machine, hand_over, refusal, wait_for};
use roost_vmm::client::Client;
use roost_vmm::console::ConsoleReader;
use serde_json::json;

/// Prints dots for ever: again: mov edx, 0x3f8; mov al, '.'; out dx, al; jmp again
fn dots() -> Code {
    Code::default().bytes(&[0xba, 0xf8, 0x03, 0, 0, 0xb0, b'.', 0xee, 0xeb, 0xf6])
}

fn counted(client: &Client, what: &str) -> u64 {
    client.metrics().unwrap()["serial"][what].as_u64().unwrap()
}

fn pipe(path: &Path) {
    assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
}

#[test]
fn what_is_over_the_limit_is_dropped_and_counted() {
    let (size, burst) = (2000, 500);
    let mut machine = Machine::new(&dots());
    machine.config["serial"]["rate_limiter"] =
        json!({ "size": size, "one_time_burst": burst, "refill_time": 1000 });
    let began = Instant::now();
    machine.start::<&str>(&[]);
    let client = machine.client();
    // Time goes on for the guest, and for its limit.
    wait_for("time", || {
        (counted(&client, "bytes_out") - counted(&client, "bytes_dropped") >= 4000).then_some(())
    });
    client.pause().unwrap();
    let most = size + burst + 2 * u64::try_from(began.elapsed().as_millis()).unwrap() + 1;
    let (out, dropped) = (counted(&client, "bytes_out"), counted(&client, "bytes_dropped"));
    let ring = ConsoleReader::new(File::open(machine.path("console")).unwrap()).unwrap();
    let kept = ring.written().unwrap();
    assert_eq!((kept + dropped, counted(&client, "bytes_lost")), (out, 0));
    assert!(kept <= most && dropped > kept, "{kept} of {out} bytes passed, {most} may");
    client.force_stop().unwrap();
    let ended = machine.wait();
    assert_eq!(ended.stderr.matches("over its limit").count(), 1, "{}", ended.stderr);
}

#[test]
fn a_file_is_appended_to() {
    let mut machine = Machine::new(&Code::default().print("hello\n").power_off());
    std::fs::write(machine.path("log"), "before\n").unwrap();
    machine.config["serial"] = json!({ "serial_out_path": machine.text("log") });
    let ended = machine.run();
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    assert_eq!(std::fs::read_to_string(machine.path("log")).unwrap(), "before\nhello\n");
}

/// Nobody reads the pipe, until somebody does: the guest never waits.
#[test]
fn a_pipe_that_nobody_reads_holds_nobody_up() {
    let mut machine = Machine::new(&dots());
    pipe(&machine.path("pipe"));
    machine.config["serial"] = json!({ "serial_out_path": machine.text("pipe") });
    machine.start::<&str>(&[]);
    let client = machine.client();
    wait_for("a full pipe", || (counted(&client, "bytes_lost") > 1000).then_some(()));
    client.pause().unwrap();
    let (out, lost) = (counted(&client, "bytes_out"), counted(&client, "bytes_lost"));
    let mut bytes = vec![0; usize::try_from(out - lost).unwrap()];
    let mut reader = File::open(machine.path("pipe")).unwrap();
    reader.read_exact(&mut bytes).unwrap();
    assert!(bytes.iter().all(|byte| *byte == b'.'));
    client.resume().unwrap();
    reader.read_exact(&mut [0; 100]).unwrap();
    client.force_stop().unwrap();
    let ended = machine.wait();
    assert_eq!(ended.stderr.matches("cannot be written").count(), 1, "{}", ended.stderr);
}

#[test]
fn a_full_disk_loses_output_and_a_descriptor_that_is_for_reading_is_refused() {
    let mut machine = Machine::new(&Code::default().print("hello").stop());
    machine.config["serial"] = json!({ "serial_out_path": "log" });
    machine.start(&hand_over("log", &File::options().write(true).open("/dev/full").unwrap()));
    let client = machine.client();
    wait_for("the loss", || (counted(&client, "bytes_lost") == 5).then_some(()));
    client.force_stop().unwrap();

    machine.wait();
    machine.start(&hand_over("log", &File::open("/dev/null").unwrap()));
    let ended = machine.wait();
    assert!(ended.stderr.contains("\"log\" cannot be written"), "{}", ended.stderr);
    let mut machine = Machine::new(&Code::default());
    let socket = machine.text("api");
    machine.start_with(&["run", "--api-sock", &socket]);
    let why =
        refusal(machine.client().put("PUT", "/serial", &json!({ "output": "a", "serial_out_path": "b" })));
    assert!(why.contains("one of them"), "{why}");
}
