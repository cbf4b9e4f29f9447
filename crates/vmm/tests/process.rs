//! The monitor as a process: its API, its command line, what it is handed, how it refuses.

mod common;

use std::fs::File;
use std::os::fd::AsRawFd;

use common::{Code, Machine, event_names, wait_for};
use roost_vmm::client::ClientError;
use roost_vmm::exit::ExitCode;
use serde_json::json;

/// Prints dots for ever.
fn busy() -> Code {
    // again: mov edx, 0x3f8; mov al, '.'; out dx, al; jmp again
    Code::default().bytes(&[0xba, 0xf8, 0x03, 0, 0, 0xb0, b'.', 0xee, 0xeb, 0xf6])
}

fn refusal(result: Result<(), ClientError>) -> String {
    match result {
        Err(ClientError::Refused(why)) => why,
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn a_held_machine_runs_when_told_and_pauses() {
    let mut machine = Machine::new(&busy());
    machine.start(&["--hold"]);
    let client = machine.client();
    assert_eq!(client.info().unwrap().state, "Not started");
    assert!(refusal(client.pause()).contains("not been started"));
    assert!(refusal(client.power_button()).contains("not been started"));
    assert_eq!(machine.console(), "");
    client.start().unwrap();
    assert!(refusal(client.start()).contains("already"));
    assert_eq!(client.info().unwrap().state, "Running");
    wait_for("output", || (!machine.console().is_empty()).then_some(()));
    client.pause().unwrap();
    assert_eq!(client.info().unwrap().state, "Paused");
    let written = client.metrics().unwrap()["serial"]["bytes_out"].as_u64().unwrap();
    assert_eq!(client.metrics().unwrap()["serial"]["bytes_out"].as_u64().unwrap(), written);
    client.resume().unwrap();
    wait_for("more output", || {
        (client.metrics().unwrap()["serial"]["bytes_out"].as_u64().unwrap() > written).then_some(())
    });
    client.power_button().unwrap();
    client.force_stop().unwrap();
    let ended = machine.wait();
    assert_eq!(ended.code, ExitCode::Killed.code(), "{}", ended.stderr);
    assert_eq!(event_names(&ended.events), ["built", "vcpus_running", "exited"]);
}

#[test]
fn a_machine_can_be_configured_through_the_api() {
    let mut machine = Machine::new(&Code::default().print("hi").power_off());
    let socket = machine.text("api");
    machine.start_with(&["run", "--api-sock", &socket]);
    let client = machine.client();
    let boot = machine.config["boot-source"].clone();
    client.put("PUT", "/boot-source", &boot).unwrap();
    client.put("PUT", "/machine-config", &json!({ "vcpu_count": 2, "mem_size_mib": 32 })).unwrap();
    client.put("PUT", "/serial", &machine.config["serial"].clone()).unwrap();
    client.put("PUT", "/entropy", &json!({})).unwrap();
    let why = refusal(client.put("PUT", "/machine-config", &json!({ "vcpu_count": 99, "mem_size_mib": 32 })));
    assert!(why.contains("vcpu_count 99"), "{why}");
    let why = refusal(client.put("PUT", "/boot-source", &json!({ "kernel_image_path": "x", "flavour": 1 })));
    assert!(why.contains("flavour"), "{why}");
    let why = refusal(client.put("PUT", "/drives/a", &json!({ "drive_id": "b", "path_on_host": "x" })));
    assert!(why.contains("\"a\"") && why.contains("\"b\""), "{why}");
    assert!(refusal(client.put("PUT", "/nonsense", &json!({}))).contains("/nonsense"));
    let config = client.request("GET", "/machine-config", b"").unwrap();
    assert!(String::from_utf8(config).unwrap().contains("\"vcpu_count\":2"));
    client.start().unwrap();
    let ended = machine.wait();
    assert_eq!((ended.code, ended.console.as_str()), (0, "hi"), "{}", ended.stderr);
}

#[test]
fn a_failed_start_through_the_api_can_be_corrected() {
    let mut machine = Machine::new(&Code::default().power_off());
    let socket = machine.text("api");
    machine.start_with(&["run", "--api-sock", &socket]);
    let client = machine.client();
    assert!(refusal(client.start()).contains("boot-source"));
    client.put("PUT", "/boot-source", &json!({ "kernel_image_path": "/no/such/kernel" })).unwrap();
    assert!(refusal(client.start()).contains("/no/such/kernel"));
    client.put("PUT", "/boot-source", &machine.config["boot-source"].clone()).unwrap();
    client.start().unwrap();
    assert_eq!(machine.wait().code, 0);
}

/// As the agent does it: every file is an open descriptor, and the names in the configuration are no paths.
#[test]
fn everything_can_be_handed_over_as_descriptors() {
    let mut machine = Machine::new(&Code::default().print("handed").power_off());
    machine.config = json!({
        "boot-source": { "kernel_image_path": "kernel" },
        "machine-config": { "vcpu_count": 1, "mem_size_mib": 16 },
        "drives": [{ "drive_id": "root", "path_on_host": "root", "is_root_device": true }],
        "serial": { "output": "console" },
        "status": "status",
    });
    std::fs::write(machine.path("config"), machine.config.to_string()).unwrap();
    common::disk(&machine.path("root"), 1 << 20);
    let open = |name: &str| {
        File::options()
            .read(true)
            .append(name == "status")
            .write(true)
            .create(true)
            .truncate(false)
            .open(machine.path(name))
            .unwrap()
    };
    let files: Vec<(&str, File)> = ["config", "kernel", "root", "console", "status"]
        .into_iter()
        .map(|name| (name, open(name)))
        .collect();
    let kvm = File::options().read(true).write(true).open("/dev/kvm").unwrap();
    let mut arguments = vec!["run".to_owned()];
    for (name, file) in files.iter().map(|(name, file)| (*name, file)).chain([("kvm", &kvm)]) {
        let number = file.as_raw_fd();
        // SAFETY: clears the close-on-exec flag of an open descriptor, so that the monitor inherits it.
        unsafe { libc::fcntl(number, libc::F_SETFD, 0) };
        arguments.extend(if name == "config" {
            ["--config-fd".to_owned(), number.to_string()]
        } else {
            ["--fd".to_owned(), format!("{name}={number}")]
        });
    }
    machine.start_with(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    let ended = machine.wait();
    assert_eq!((ended.code, ended.console.as_str()), (0, "handed"), "{}", ended.stderr);
    assert_eq!(event_names(&ended.events), ["built", "vcpus_running", "exited"]);
}

#[test]
fn bad_configurations_end_with_their_code_and_a_sentence() {
    let cases = [
        (
            json!({ "machine-config": { "vcpu_count": 40, "mem_size_mib": 16 } }),
            ExitCode::Config,
            "vcpu_count 40",
        ),
        (json!({ "boot-source": { "kernel_image_path": "/no/such" } }), ExitCode::HostIo, "/no/such"),
        (json!({ "flavour": 1 }), ExitCode::Config, "flavour"),
        (json!({}), ExitCode::Config, "boot-source is missing"),
        (json!({ "boot-source": { "kernel_image_path": "/dev/null" } }), ExitCode::Config, "kernel image"),
    ];
    for (config, code, word) in cases {
        let mut machine = Machine::new(&busy());
        machine.config = config.clone();
        let ended = machine.run();
        assert_eq!(ended.code, code.code(), "{config}: {}", ended.stderr);
        assert!(ended.stderr.contains(word), "{config}: {}", ended.stderr);
    }
}

#[test]
fn a_broken_disk_is_named() {
    let mut machine = Machine::new(&busy());
    std::fs::write(machine.path("disk"), "no qcow2").unwrap();
    machine.config["drives"] =
        json!([{ "drive_id": "root", "path_on_host": machine.text("disk"), "format": "qcow2" }]);
    let ended = machine.run();
    assert_eq!(ended.code, ExitCode::HostIo.code());
    assert!(ended.stderr.contains("disk \"root\""), "{}", ended.stderr);
}

#[test]
fn a_signal_ends_the_machine_in_order() {
    let mut machine = Machine::new(&busy());
    machine.start::<&str>(&[]);
    machine.client();
    let pid = libc::pid_t::try_from(machine.pid()).unwrap();
    // SAFETY: signals the child that this test started.
    unsafe { libc::kill(pid, libc::SIGTERM) };
    let ended = machine.wait();
    assert_eq!(ended.code, ExitCode::Killed.code());
    assert_eq!(event_names(&ended.events).last(), Some(&"exited"));
}

/// Each thread has its name and its filter, the vCPUs their own.
#[test]
fn all_threads_are_named_and_locked_down() {
    let mut machine = Machine::new(&busy());
    machine.config["machine-config"]["vcpu_count"] = json!(3);
    machine.start(&["--hold"]);
    machine.client();
    let mut names = Vec::new();
    for task in std::fs::read_dir(format!("/proc/{}/task", machine.pid())).unwrap() {
        let task = task.unwrap().path();
        names.push(std::fs::read_to_string(task.join("comm")).unwrap().trim().to_owned());
        let status = std::fs::read_to_string(task.join("status")).unwrap();
        assert!(status.contains("Seccomp:\t2"), "{status}");
        assert!(status.contains("NoNewPrivs:\t1"), "{status}");
    }
    // KVM has a worker of its own in each process.
    names.retain(|name| !name.starts_with("kvm-"));
    names.sort();
    assert_eq!(names, ["vcpu0", "vcpu1", "vcpu2", "vmm-api", "vmm-dev"]);
}

#[test]
fn the_probe_prints_a_report_that_parses() {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_roost-vmm"))
        .args(["probe", "--json"])
        .output()
        .unwrap();
    let report: roost_vmm::probe::Report = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(if report.usable() { 0 } else { ExitCode::Kvm.code() }));
    assert!(report.kvm.present && report.kvm.permitted, "{report:?}");
    assert!(report.speed.unwrap().instructions_per_second > 10_000);
    assert!(report.instructions.len() > 20);
}

#[test]
fn a_file_in_the_place_of_the_apis_socket_is_left_alone() {
    let mut machine = Machine::new(&Code::default().stop());
    std::fs::write(machine.path("api"), "mine").unwrap();
    machine.start::<&str>(&[]);
    let ended = machine.wait();
    assert_eq!(ended.code, ExitCode::HostIo.code(), "{}", ended.stderr);
    assert_eq!(std::fs::read(machine.path("api")).unwrap(), b"mine");
}

#[test]
fn errors_and_output_that_nobody_reads_change_no_exit_code() {
    let closed = || std::io::pipe().unwrap().1;
    let vmm = |arguments: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_roost-vmm"));
        command.args(arguments).stdout(closed()).stderr(closed()).status().unwrap().code()
    };
    assert_eq!(vmm(&["nonsense"]), Some(ExitCode::Config.code()));
    assert_eq!(vmm(&["run", "--config", "/nonexistent"]), Some(ExitCode::Config.code()));
    assert_eq!(vmm(&["rebase", "/nonexistent", "/nonexistent"]), Some(ExitCode::Config.code()));
    assert_eq!(vmm(&["--help"]), Some(0));
    assert_eq!(vmm(&["--version"]), Some(0));
}
