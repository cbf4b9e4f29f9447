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
pub const SAME_CPU: &str = "idle, no guest watches its TSC: CPU time of the monitor";
pub const SAME_EXITS: &str = "idle, no guest watches its TSC: exits";

/// What our monitor says to a guest by itself (`docs/monitor.md`).
const NO_WATCHDOG: &str = "tsc=nowatchdog";

/// What a guest does after its start is over by then.
const SETTLE: Duration = Duration::from_secs(10);

/// The time is cut into this many windows.
const WINDOWS: u32 = 5;
/// Machines of each monitor: which of the host's CPUs a machine's threads come to is chance, and one CPU has more to do than the other.
const EACH: usize = 4;
const COUNTERS: [&str; 6] =
    ["exits", "halt_exits", "io_exits", "mmio_exits", "irq_injections", "halt_successful_poll"];

/// Watches guests of both monitors with the same command line, and then such that are told the same.
pub fn measure(seconds: u64) {
    watch(seconds, "", CPU, EXITS);
    watch(seconds, NO_WATCHDOG, SAME_CPU, SAME_EXITS);
}

/// Watches all at the same time, each with devices of its own: what else the machine does meets all alike.
fn watch(seconds: u64, words: &'static str, cpu_row: &str, exits_row: &str) {
    // Neither is always the one that comes second.
    let order = [Who::Roost, Who::Qemu, Who::Qemu, Who::Roost].into_iter().cycle().take(2 * EACH);
    let machines: Vec<(Who, Up)> =
        order.enumerate().map(|(number, who)| (who, start(who, number, words))).collect();
    let of = |who| machines.iter().filter(move |(is, _)| *is == who).map(|(_, up)| up);
    sleep(SETTLE);
    let monitors = [Who::Roost, Who::Qemu];
    let begin = Instant::now();
    let first = monitors.map(|who| of(who).map(|up| (up.threads(), counters(up))).collect::<Vec<_>>());
    for _ in 0..WINDOWS {
        let read = |who| {
            let (cpu, exits): (Vec<Duration>, Vec<u64>) =
                of(who).map(|up| (up.cpu_time(), up.counter("exits"))).unzip();
            (Instant::now(), cpu.into_iter().sum::<Duration>(), exits.into_iter().sum::<u64>())
        };
        let before = monitors.map(read);
        sleep(Duration::from_secs(seconds) / WINDOWS);
        for (who, (start, cpu, exits)) in monitors.into_iter().zip(before) {
            let (now, cpu_now, exits_now) = read(who);
            let passed = (now - start).as_secs_f64() * EACH as f64;
            figure(cpu_row, who, (cpu_now - cpu).as_secs_f64() * 1e3 / passed);
            figure(exits_row, who, (exits_now - exits) as f64 / passed);
        }
    }
    for (who, first) in monitors.into_iter().zip(first) {
        let passed = begin.elapsed().as_secs_f64();
        let mut text = Vec::new();
        for (index, name) in COUNTERS.iter().enumerate() {
            let more: u64 = of(who).zip(&first).map(|(up, (_, was))| up.counter(name) - was[index]).sum();
            text.push(format!("{name} {:.1} per s", more as f64 / passed / EACH as f64));
        }
        for (up, (was, _)) in of(who).zip(&first) {
            for ((name, now), (_, before)) in up.threads().iter().zip(was) {
                text.push(format!("thread {name} {:.3} ms per s", (now - before) as f64 / 1e6 / passed));
            }
        }
        let name = if who == Who::Roost { "Roost" } else { "QEMU" };
        about(&format!("exits of {name} {words}"), &text.join(", "));
    }
}

fn start(who: Who, number: usize, words: &'static str) -> Up {
    let disk = format!("/tmp/disk-{number}");
    File::create(&disk).unwrap().set_len(64 << 20).unwrap();
    // The monitor has the tap from here on.
    let tap = tap::create().unwrap();
    let devices = Devices { disk: &disk, disk_queues: 1, tap: &tap, vhost: false };
    Up::start(command(who, Machine { devices: Some(devices), words, ..Machine::PLAIN }))
}

fn counters(up: &Up) -> [u64; COUNTERS.len()] {
    COUNTERS.map(|name| up.counter(name))
}
