//! One body, two births: with `ROOST_BIRTH=snapshot` every machine that a test starts is built by one monitor, goes into a snapshot
//! before its first instruction, and runs in another monitor that is made from it. `scripts/test` runs the guests' tests both ways.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::process::{Command, Stdio};
use std::time::Instant;

use roost_vmm::client::Client;
use serde_json::{Value, json};

use super::{DEADLINE, Machine};

/// Whether machines come from snapshots.
fn from_snapshot() -> bool {
    match std::env::var("ROOST_BIRTH").as_deref() {
        Err(_) | Ok("boot") => false,
        Ok("snapshot") => true,
        Ok(other) => panic!("ROOST_BIRTH is {other:?}: boot and snapshot are there"),
    }
}

/// The configuration of a machine that goes on from a snapshot of this one, which is taken for it. Nothing: it is not asked for, or
/// the monitor refuses the machine, which is what the test is about then.
pub fn config<T: AsRef<OsStr>>(machine: &mut Machine, arguments: &[T]) -> Option<Value> {
    if !from_snapshot() {
        return None;
    }
    let socket = machine.path("birth.api");
    let own = machine.config.clone();
    // Its life is none that the test should know of.
    for name in ["status", "logger", "metrics"] {
        machine.config.as_object_mut()?.remove(name);
    }
    let command = machine.command(arguments);
    machine.config = own.clone();
    let api = machine.path("api");
    let words =
        command.get_args().map(|word| if word == api { socket.clone().into() } else { word.to_owned() });
    let mut words: Vec<OsString> = words.collect();
    for word in ["--hold", "--open-paths"] {
        if !words.iter().any(|there| there == word) {
            words.push(word.into());
        }
    }
    let mut held = Command::new(&machine.program);
    held.args(words).stdin(Stdio::null()).stdout(Stdio::null());
    let mut held = held.stderr(File::create(machine.path("birth.stderr")).unwrap()).spawn().unwrap();
    let client = Client::new(&socket);
    let start = Instant::now();
    while client.info().is_err() {
        if held.try_wait().unwrap().is_some() {
            return None;
        }
        assert!(start.elapsed() < DEADLINE, "the machine before the snapshot has no API");
        std::thread::yield_now();
    }
    let (state, memory) = (machine.text("birth.state"), machine.text("birth.memory"));
    let files = json!({ "snapshot_path": state, "mem_file_path": memory });
    client.put("PUT", "/snapshot/create", &files).unwrap();
    client.force_stop().unwrap();
    held.wait().unwrap();

    let tracked = own["machine-config"]["track_dirty_pages"] == json!(true);
    let snapshot = json!({ "snapshot_path": state, "mem_file_path": memory, "track_dirty_pages": tracked });
    let mut config = json!({ "snapshot": snapshot });
    for name in ["serial", "status", "logger", "metrics"] {
        if let Some(value) = own.get(name) {
            config[name] = value.clone();
        }
    }
    Some(config)
}
