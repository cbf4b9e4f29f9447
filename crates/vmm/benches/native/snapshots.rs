//! How long snapshots take: 128 MiB, of which the guest has written a quarter, and a disk.

use std::time::Instant;

use serde_json::json;

use crate::common::{Code, Machine, disk, hand, wait_for};
use crate::monitors::Bench;
use crate::report::{Goal, Report, Sample, Who};

/// Goal: milliseconds from the request to its answer, in a monitor that waits for it.
const LOAD_MS: f64 = 4.0;
/// Pages that the guest has written.
const PAGES: u32 = 32 * 256;

/// Takes a snapshot and loads it, each time with new processes.
pub fn measure(bench: &Bench, runs: usize, report: &mut Report) {
    let (mut created, mut loaded) = (Sample::default(), Sample::default());
    for _ in 0..runs {
        let mut machine = Machine::new(&Code::default().fill_pages(0x200_0000, PAGES, 7).print("up").stop());
        machine.program = bench.monitor().to_owned();
        disk(&machine.path("disk"), 1 << 20);
        machine.config["machine-config"]["mem_size_mib"] = json!(128);
        machine.config["drives"] = json!([{ "drive_id": "root", "path_on_host": machine.text("disk") }]);
        let (_files, arguments) = hand(&machine, &["state", "memory"]);
        machine.start(&arguments);
        wait_for("the guest", || machine.console().contains("up").then_some(()));
        let client = machine.client();
        client.pause().unwrap();
        let files = json!({ "snapshot_path": "state", "mem_file_path": "memory" });
        created.add(Who::Roost, timed(|| client.put("PUT", "/snapshot/create", &files).unwrap()));
        client.force_stop().unwrap();
        machine.wait();

        let socket = machine.text("api");
        std::fs::remove_file(&socket).unwrap();
        machine.start_with(&["run", "--api-sock", &socket]);
        let client = machine.client();
        let files = json!({
            "snapshot_path": machine.path("state"),
            "mem_backend": { "backend_type": "File", "backend_path": machine.path("memory") },
            "resume_vm": true,
        });
        loaded.add(Who::Roost, timed(|| client.put("PUT", "/snapshot/load", &files).unwrap()));
        client.force_stop().unwrap();
        machine.wait();
    }
    report.compare(
        "snapshot of 128 MiB, 32 MiB written: create, to stable storage",
        "ms",
        &created,
        Goal::default(),
    );
    report.compare("snapshot of 128 MiB: load and resume", "ms", &loaded, Goal::below(LOAD_MS));
}

/// Milliseconds that something takes.
fn timed(act: impl FnOnce()) -> f64 {
    let start = Instant::now();
    act();
    start.elapsed().as_secs_f64() * 1e3
}
