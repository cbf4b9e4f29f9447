//! CPUs that come and go, from the API to the guest's processors and back.

// Tests build bytes out of numbers whose size they know.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use common::cpus::{CPUS, EJECT, EVENT, INSERTING, PLUGGED, REMOVING, STARTED};
use common::{Code, Machine, refusal, says, wait_for};
use roost_vmm::client::{Client, ClientError};
use serde_json::{Value, json};

fn machine(code: &Code, count: u8, max: Option<u8>) -> Machine {
    let mut machine = Machine::new(code);
    machine.config["machine-config"]["vcpu_count"] = json!(count);
    if let Some(max) = max {
        machine.config["machine-config"]["max_vcpu_count"] = json!(max);
    }
    machine
}

fn want(client: &Client, count: u8) -> Result<(), ClientError> {
    client.put("PATCH", "/machine-config", &json!({ "vcpu_count": count }))
}

fn vcpus(client: &Client) -> Value {
    client.metrics().unwrap()["vcpus"].clone()
}

#[test]
fn a_cpu_comes_runs_goes_and_comes_again() {
    let added = PLUGGED | INSERTING;
    // What is sent to a CPU that has never been there is over when it comes.
    let code = Code::default().other_cpus().wait_port(CPUS + 1, 0).start_cpu(1).print("r");
    let code = code.see_cpu(1, added).look16(STARTED, 1, 10_000).expect32(STARTED, 0);
    let code = code.started_cpu(1).print("u");
    let code = code.see_cpu(1, PLUGGED | REMOVING).eject_cpu(1).print("e");
    // A CPU that is not there (the next event comes when it has been put away) does not start, nor does it when it comes: what was
    // sent to it before is over.
    let code = code.wait_cpus_event().start_cpu(1);
    let code = code.look16(STARTED, 1, 10_000).expect32(STARTED, 0).print("n");
    let code = code.wait_cpus_event().look16(STARTED, 1, 10_000).expect32(STARTED, 0);
    let code = code.wait_port(CPUS + 1, added).out(CPUS + 1, INSERTING).started_cpu(1).print("a");
    let mut machine = machine(&code.power_off(), 1, Some(2));
    machine.start::<&str>(&[]);
    let client = machine.client();
    says(&machine, "r");
    assert_eq!(vcpus(&client), json!({ "wanted": 1, "plugged": 1, "taken": 1 }));
    want(&client, 2).unwrap();
    says(&machine, "r1u");
    assert_eq!(vcpus(&client), json!({ "wanted": 2, "plugged": 2, "taken": 2 }));
    want(&client, 1).unwrap();
    assert_eq!(vcpus(&client)["wanted"], json!(1));
    says(&machine, "r1ue");
    assert_eq!(vcpus(&client), json!({ "wanted": 1, "plugged": 1, "taken": 1 }));
    want(&client, 1).unwrap();
    says(&machine, "r1uen");
    want(&client, 2).unwrap();
    let ended = machine.wait();
    assert_eq!((ended.code, ended.console.as_str()), (0, "r1uen1a"), "{}", ended.stderr);
}

/// The interrupt controller itself is asked: its request register shows that the event device's line rose.
#[test]
fn a_wish_raises_the_event_devices_interrupt() {
    // again: mov al, 0x0a; out 0x20, al; in al, 0x20; test al, 1 << 5; jz again
    let interrupted = [0xb0, 0x0a, 0xe6, 0x20, 0xe4, 0x20, 0xa8, 0x20, 0x74, 0xf6];
    let code = Code::default().wait_port(EVENT, 0).print("r").bytes(&interrupted);
    let mut machine = machine(&code.see_cpu(1, PLUGGED | INSERTING).power_off(), 1, Some(32));
    machine.start::<&str>(&[]);
    let client = machine.client();
    says(&machine, "r");
    want(&client, 2).unwrap();
    assert_eq!(machine.wait().code, 0);
}

#[test]
fn cpus_stop_and_go_on_with_the_machine() {
    let code = Code::default().other_cpus().print("r").see_cpu(1, PLUGGED | INSERTING);
    let code = code.wait_port(CPUS + 2, PLUGGED | INSERTING).out(CPUS + 2, INSERTING);
    let code = code.started_cpu(1).started_cpu(2).print("u");
    let mut machine = machine(&code.stop(), 1, Some(4));
    machine.start::<&str>(&[]);
    let client = machine.client();
    says(&machine, "r");
    // A paused machine is told, and its guest finds out when it goes on.
    client.pause().unwrap();
    want(&client, 3).unwrap();
    assert_eq!(vcpus(&client), json!({ "wanted": 3, "plugged": 3, "taken": 1 }));
    client.resume().unwrap();
    says(&machine, "r12u");
    for _ in 0..3 {
        client.pause().unwrap();
        client.resume().unwrap();
    }
    client.force_stop().unwrap();
    machine.wait();
}

/// A board keeps the processors in its sockets when it is reset: they are enabled in the tables of the next start.
#[test]
fn a_reset_keeps_the_cpus_that_are_wanted() {
    // The second start finds the second CPU, and what the host asked for and the first guest kept is gone.
    let again = Code::default().other_cpus().wait_port(CPUS + 1, PLUGGED).wait_port(CPUS + 2, 0);
    let again = again.started_cpu(1).print("a").power_off();
    let first = Code::default().print("r").wait_port(CPUS + 1, PLUGGED | INSERTING);
    let first = first.print("s").wait_port(CPUS + 2, PLUGGED | REMOVING).reset();
    // The first start has one CPU in its tables, and none that is new: in al, dx of CPU 1 tells the two apart.
    // mov edx, PORT; in al, dx; cmp al, 1; je over the first start's code
    let code = Code::default().bytes(&[0xba]).bytes(&u32::from(CPUS + 1).to_le_bytes());
    let code = code.bytes(&[0xec, 0x3c, PLUGGED, 0x0f, 0x84]).bytes(&(first.0.len() as u32).to_le_bytes());
    let mut machine = machine(&code.bytes(&first.0).bytes(&again.0), 1, Some(4));
    machine.start::<&str>(&[]);
    let client = machine.client();
    says(&machine, "r");
    want(&client, 3).unwrap();
    says(&machine, "s");
    want(&client, 2).unwrap();
    let ended = machine.wait();
    assert_eq!((ended.code, ended.console.as_str()), (0, "rs1a"), "{}", ended.stderr);
}

/// All registers, all values, all widths; CPUs that are not there.
#[test]
fn a_guest_that_writes_anything_hurts_only_itself() {
    let mut code = Code::default().other_cpus();
    for id in 1..4 {
        code = code.started_cpu(id);
    }
    for port in CPUS - 4..CPUS + 40 {
        // Two and four bytes at once: mov eax, ~0; mov edx, PORT; out dx, eax; out dx, ax; in eax, dx; in ax, dx
        code = code.bytes(&[0xb8, 0xff, 0xff, 0xff, 0xff, 0xba]).bytes(&u32::from(port).to_le_bytes());
        code = code.bytes(&[0xef, 0x66, 0xef, 0xed, 0x66, 0xed]);
    }
    for value in [0, EJECT, INSERTING, REMOVING, 0xff, 0x0f, PLUGGED] {
        code = code.out(CPUS, value).out(CPUS + 2, value).out(CPUS + 31, value);
    }
    code = code.wait_port(CPUS, PLUGGED).wait_port(CPUS + 2, 0).print("s");
    code = code.see_cpu(2, PLUGGED | INSERTING).started_cpu(2).print("u");
    let mut machine = machine(&code.power_off(), 4, Some(4));
    machine.start::<&str>(&[]);
    let client = machine.client();
    says(&machine, "123s");
    assert_eq!(vcpus(&client), json!({ "wanted": 4, "plugged": 1, "taken": 1 }));
    want(&client, 4).unwrap();
    let ended = machine.wait();
    assert_eq!((ended.code, ended.console.as_str()), (0, "123s2u"), "{}", ended.stderr);
}

#[test]
fn cpus_that_let_go_of_themselves_come_again() {
    let code = Code::default().other_cpus_that_leave();
    let code = code.started_cpu(1).wait_port(CPUS + 1, 0).started_cpu(2).wait_port(CPUS + 2, 0).print("s");
    let code = (0..3).fold(code, |code, _| {
        let code = code.see_cpu(2, PLUGGED | INSERTING).out(CPUS + 1, INSERTING);
        code.started_cpu(1).wait_port(CPUS + 1, 0).started_cpu(2).wait_port(CPUS + 2, 0).print(".")
    });
    let mut machine = machine(&code.power_off(), 3, Some(3));
    machine.start::<&str>(&[]);
    let client = machine.client();
    let mut said = "12s".to_owned();
    for _ in 0..3 {
        says(&machine, &said);
        assert_eq!(vcpus(&client), json!({ "wanted": 3, "plugged": 1, "taken": 1 }));
        want(&client, 3).unwrap();
        said.push_str("12.");
    }
    let ended = machine.wait();
    assert_eq!((ended.code, ended.console), (0, said), "{}", ended.stderr);
}

#[test]
fn the_api_says_what_is_illegal_when() {
    let mut machine = Machine::new(&Code::default().stop());
    let socket = machine.text("api");
    machine.start_with(&["run", "--api-sock", &socket]);
    let client = machine.client();
    let put = |body: Value| client.put("PUT", "/machine-config", &body);
    let why = refusal(put(json!({ "vcpu_count": 3, "max_vcpu_count": 2, "mem_size_mib": 16 })));
    assert!(why.contains("max_vcpu_count 2 is outside 3–32"), "{why}");
    let why = refusal(put(json!({ "vcpu_count": 3, "max_vcpu_count": 33, "mem_size_mib": 16 })));
    assert!(why.contains("max_vcpu_count 33 is outside 3–32"), "{why}");
    let why =
        refusal(put(json!({ "vcpu_count": 1, "max_vcpu_count": 2, "mem_size_mib": 16, "acpi": false })));
    assert!(why.contains("max_vcpu_count 2 without acpi"), "{why}");
    put(json!({ "vcpu_count": 1, "max_vcpu_count": 3, "mem_size_mib": 16 })).unwrap();
    // Before the start it is the number to start with.
    want(&client, 2).unwrap();
    assert!(refusal(want(&client, 4)).contains("max_vcpu_count 3 is outside 4–32"));
    client.put("PUT", "/boot-source", &machine.config["boot-source"].clone()).unwrap();
    client.put("PUT", "/serial", &json!({})).unwrap();
    client.start().unwrap();
    for count in [0, 4, 255] {
        let why = refusal(want(&client, count));
        assert!(why.contains(&format!("vcpu_count {count}: outside 1–3")), "{why}");
    }
    want(&client, 3).unwrap();
    let get =
        |path: &str| -> Value { serde_json::from_slice(&client.request("GET", path, b"").unwrap()).unwrap() };
    assert_eq!(get("/machine-config")["vcpu_count"], json!(3));
    assert_eq!(get("/vm/config")["machine-config"]["vcpu_count"], json!(2));
    client.force_stop().unwrap();
    machine.wait();
}

#[test]
fn a_machine_without_spare_cpus_says_so() {
    let mut machine = machine(&Code::default().stop(), 2, None);
    machine.start::<&str>(&[]);
    let client = machine.client();
    wait_for("the start", || (client.info().unwrap().state == "Running").then_some(()));
    want(&client, 2).unwrap();
    let why = refusal(want(&client, 1));
    assert!(why.contains("vcpu_count 1: the machine was started without max_vcpu_count"), "{why}");
    assert_eq!(vcpus(&client), json!({ "wanted": 2, "plugged": 2, "taken": 2 }));
    client.force_stop().unwrap();
    machine.wait();
}

#[test]
fn a_held_machine_is_not_resized() {
    let mut machine = machine(&Code::default().power_off(), 1, Some(2));
    machine.start(&["--hold"]);
    let client = machine.client();
    assert!(refusal(want(&client, 2)).contains("built but not started"));
    client.start().unwrap();
    assert_eq!(machine.wait().code, 0);
}
