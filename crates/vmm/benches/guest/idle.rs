//! What a guest costs that does nothing: one vCPU, a disk, an interface.

use std::fs::File;
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::common::tap;
use crate::host::{about, figure};
use crate::monitors::{Devices, Machine, Up, command};
use crate::report::Who;

/// Names of rows.
pub const CPU: &str = "idle: CPU time of the monitor";
pub const EXITS: &str = "idle: exits";

/// What a guest does after its start is over by then.
const SETTLE: Duration = Duration::from_secs(10);

/// The time is cut into this many windows.
const WINDOWS: u32 = 5;
const COUNTERS: [&str; 6] =
    ["exits", "halt_exits", "io_exits", "mmio_exits", "irq_injections", "halt_successful_poll"];

/// Watches both at the same time, each with devices of its own: what else the machine does meets both alike.
pub fn measure(seconds: u64) {
    let machines = [Who::Roost, Who::Qemu].map(|who| {
        let disk = format!("/tmp/disk-{who:?}");
        File::create(&disk).unwrap().set_len(64 << 20).unwrap();
        let tap = tap::create().unwrap();
        let devices = Devices { disk: &disk, disk_queues: 1, tap: &tap, vhost: false };
        let up = Up::start(command(who, Machine { devices: Some(devices), ..Machine::PLAIN }));
        (who, up, tap)
    });
    sleep(SETTLE);
    let read = |up: &Up| (Instant::now(), up.threads(), COUNTERS.map(|name| up.counter(name)));
    let first = machines.each_ref().map(|(_, up, _)| read(up));
    for _ in 0..WINDOWS {
        let before =
            machines.each_ref().map(|(_, up, _)| (Instant::now(), up.cpu_time(), up.counter("exits")));
        sleep(Duration::from_secs(seconds) / WINDOWS);
        for ((who, up, _), (start, cpu, exits)) in machines.iter().zip(before) {
            let passed = start.elapsed().as_secs_f64();
            figure(CPU, *who, (up.cpu_time() - cpu).as_secs_f64() * 1e3 / passed);
            figure(EXITS, *who, (up.counter("exits") - exits) as f64 / passed);
        }
    }
    for ((who, up, _), (start, threads, counters)) in machines.iter().zip(first) {
        let passed = start.elapsed().as_secs_f64();
        let counted = COUNTERS.iter().zip(counters);
        let mut text: Vec<String> = counted
            .map(|(name, before)| format!("{name} {:.1} per s", (up.counter(name) - before) as f64 / passed))
            .collect();
        for ((name, now), (_, before)) in up.threads().iter().zip(threads) {
            text.push(format!("thread {name} {:.3} ms per s", (now - before) as f64 / 1e6 / passed));
        }
        about(if *who == Who::Roost { "exits of Roost" } else { "exits of QEMU" }, &text.join(", "));
    }
}
