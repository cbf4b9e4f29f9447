//! Snapshots of a guest that has booted, in counted time. QEMU has nothing that compares: it saves all of memory into one stream.

use std::fs::{self, File};
use std::process::Stdio;
use std::time::Instant;

use roost_vmm::client::Client;
use serde_json::json;

use crate::host::figure;
use crate::monitors::{LIMIT, Machine, Up, command};
use crate::report::Who;

/// Names of rows.
pub const CREATE: &str = "counted: snapshot of the booted guest, create";
pub const LOAD: &str = "counted: snapshot, load and resume";

const SOCKET: &str = "/tmp/api";

/// The time of each request, from connecting to its answer.
pub fn measure(runs: u64) {
    for _ in 0..runs {
        let mut first = command(Who::Roost, Machine::PLAIN);
        first.args(["--api-sock", SOCKET]);
        let up = Up::start(first);
        let client = Client::new(SOCKET);
        client.pause().unwrap();
        for name in ["state", "memory"] {
            let file =
                File::options().read(true).write(true).create(true).truncate(true).open(place(name)).unwrap();
            client.hand_over(name, &file).unwrap();
        }
        let files = json!({ "snapshot_path": "state", "mem_file_path": "memory" });
        figure(CREATE, Who::Roost, timed(|| client.put("PUT", "/snapshot/create", &files).unwrap()));
        drop(up);

        let _ = fs::remove_file(SOCKET);
        let mut second = std::process::Command::new("/bin/roost-vmm");
        second.args(["run", "--api-sock", SOCKET]).stdin(Stdio::null()).stdout(Stdio::null());
        let mut second = second.spawn().unwrap();
        let start = Instant::now();
        // It waits for requests: what it does before it listens is no part of one.
        while client.info().is_err() {
            assert!(start.elapsed() < LIMIT, "no API");
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        let files = json!({
            "snapshot_path": place("state"),
            "mem_backend": { "backend_type": "File", "backend_path": place("memory") },
            "resume_vm": true,
        });
        figure(LOAD, Who::Roost, timed(|| client.put("PUT", "/snapshot/load", &files).unwrap()));
        second.kill().unwrap();
        second.wait().unwrap();
        let _ = fs::remove_file(SOCKET);
    }
}

fn place(name: &str) -> String {
    format!("/tmp/snapshot-{name}")
}

/// Milliseconds that something takes.
fn timed(act: impl FnOnce()) -> f64 {
    let start = Instant::now();
    act();
    start.elapsed().as_secs_f64() * 1e3
}
