//! How long API calls take, each on a connection of its own, as clients make them.

use std::time::Instant;

use serde_json::{Value, json};

use crate::common::{Code, Machine, disk};
use crate::monitors::{Bench, Who};
use crate::report::{Goal, Report, Sample};

/// Goal: milliseconds.
const CALL_MS: f64 = 5.0;

/// Makes every call of a machine's life; the row is that of the slowest kind of call.
pub fn measure(bench: &Bench, runs: usize, report: &mut Report) {
    let mut calls: Vec<(String, Sample)> = Vec::new();
    for _ in 0..runs {
        // jmp self
        let mut machine = Machine::new(&Code::default().stop());
        machine.program = bench.monitor().to_owned();
        disk(&machine.path("disk"), 1 << 20);
        let socket = machine.text("api");
        machine.start_with(&["run", "--api-sock", &socket]);
        let client = machine.client();
        for (method, path, body) in life(&machine) {
            let text = if body.is_null() { String::new() } else { body.to_string() };
            let start = Instant::now();
            client.request(method, path, text.as_bytes()).unwrap();
            let milliseconds = start.elapsed().as_secs_f64() * 1e3;
            let what = body["action_type"].as_str().or(body["state"].as_str()).unwrap_or_default();
            let name = format!("{method} {path} {what}").trim_end().to_owned();
            match calls.iter_mut().find(|(known, _)| *known == name) {
                Some((_, sample)) => sample.add(Who::Roost, milliseconds),
                None => {
                    let mut sample = Sample::default();
                    sample.add(Who::Roost, milliseconds);
                    calls.push((name, sample));
                }
            }
        }
        machine.wait();
    }
    calls.sort_by(|(_, a), (_, b)| b.median(Who::Roost).total_cmp(&a.median(Who::Roost)));
    report.calls(&calls);
    if let Some((name, sample)) = calls.first() {
        report.compare(&format!("slowest API call: {name}"), "ms", sample, Goal::below(CALL_MS));
    }
}

/// Every call, in the order of a machine's life.
fn life(machine: &Machine) -> Vec<(&'static str, &'static str, Value)> {
    let action = |kind: &str| json!({ "action_type": kind });
    let drive = json!({ "drive_id": "root", "path_on_host": machine.text("disk"), "is_root_device": true });
    vec![
        ("GET", "/", Value::Null),
        ("GET", "/version", Value::Null),
        ("PUT", "/boot-source", machine.config["boot-source"].clone()),
        ("PUT", "/machine-config", json!({ "vcpu_count": 1, "mem_size_mib": 128 })),
        ("PUT", "/serial", machine.config["serial"].clone()),
        ("PUT", "/drives/root", drive),
        ("PUT", "/entropy", json!({})),
        ("PUT", "/smbios", json!({ "product": "t3.micro" })),
        ("GET", "/machine-config", Value::Null),
        ("GET", "/vm/config", Value::Null),
        ("PUT", "/actions", action("InstanceStart")),
        ("GET", "/metrics", Value::Null),
        ("PUT", "/serial/input", Value::Null),
        ("PATCH", "/vm", json!({ "state": "Paused" })),
        ("PATCH", "/vm", json!({ "state": "Resumed" })),
        ("PUT", "/actions", action("SendPowerButton")),
        ("PUT", "/actions", action("ForceStop")),
    ]
}
