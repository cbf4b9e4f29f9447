//! Machines that go on from a snapshot: what runs after it is what ran before it.

// Tests build bytes out of numbers whose size they know.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use std::path::Path;

use common::machines::echo;
use common::{Code, Machine, hand, wait_for};
use roost_vmm::client::{Client, ClientError};
use serde_json::{Value, json};

fn types(machine: &Machine, client: &Client, byte: &str, answer: &str) {
    client.console_input(byte.as_bytes()).unwrap();
    wait_for(answer, || machine.console().ends_with(answer).then_some(()));
}

fn snapshot(client: &Client, kind: &str, state: &str, memory: &str) -> Result<(), ClientError> {
    let body = json!({ "snapshot_type": kind, "snapshot_path": state, "mem_file_path": memory });
    client.put("PUT", "/snapshot/create", &body)
}

/// A monitor that has loaded files of this folder.
fn load(from: &Path, state: &str, memory: &str, more: &Value) -> (Machine, Client) {
    let (clone, client) = bare();
    let mut body = json!({
        "snapshot_path": from.join(state),
        "mem_backend": { "backend_type": "File", "backend_path": from.join(memory) },
        "serial_override": { "output": clone.text("console") },
        "resume_vm": true,
    });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    client.put("PUT", "/snapshot/load", &body).unwrap();
    (clone, client)
}

/// A monitor that has nothing yet.
fn bare() -> (Machine, Client) {
    let mut machine = Machine::new(&Code::default());
    let socket = machine.text("api");
    machine.start_with(&["run", "--api-sock", &socket]);
    let client = machine.client();
    (machine, client)
}

fn refusal<T: std::fmt::Debug>(result: Result<T, ClientError>) -> String {
    match result {
        Err(ClientError::Refused(why)) => why,
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn clones_go_on_where_the_snapshot_was_taken_and_so_does_the_original() {
    let mut machine = Machine::new(&echo());
    machine.config["machine-config"]["vcpu_count"] = json!(2);
    let (_files, arguments) = hand(&machine, &["state", "memory"]);
    machine.start(&arguments);
    let client = machine.client();
    types(&machine, &client, "a", "a1");
    client.pause().unwrap();
    // Input that the guest has not read yet comes with the snapshot.
    client.console_input(b"b").unwrap();
    snapshot(&client, "Full", "state", "memory").unwrap();
    client.resume().unwrap();
    wait_for("the original", || (machine.console() == "a1b2").then_some(()));
    types(&machine, &client, "x", "x3");

    for _ in 0..2 {
        let (clone, client) = load(machine.dir.path(), "state", "memory", &json!({}));
        wait_for("the clone", || (clone.console() == "b2").then_some(()));
        types(&clone, &client, "c", "c3");
        types(&clone, &client, "d", "d4");
        client.force_stop().unwrap();
    }
}
