//! How fast VMs are started when all stay, and what each of them costs.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use crate::common::footprint;
use crate::common::hold::Held;
use crate::monitors::{Bench, LIMIT, MEMORY_MIB, Who};
use crate::report::{Goal, Report, Sample};

/// Starts at the same time.
const AT_A_TIME: usize = 2;
/// Goal: times QEMU's rate.
const RATE_RATIO: f64 = 5.0;
/// Goal: KiB.
const PSS_KIB: f64 = 300.0;

/// Starts `count` of each kind and holds them before their first instruction.
pub fn measure(bench: &Bench, count: usize, report: &mut Report) {
    let (mut rates, mut pss) = (Sample::default(), Sample::default());
    for who in bench.everyone() {
        let (rate, kib) = hold(bench, who, count);
        rates.add(who, rate);
        pss.add(who, kib);
    }
    let goal = Goal::default().and_ratio_at_least(RATE_RATIO);
    report.compare(&format!("VMs started and held ({count})"), "per second", &rates, goal);
    report.compare("PSS beyond guest memory, each", "KiB", &pss, Goal::below(PSS_KIB));
}

fn hold(bench: &Bench, who: Who, count: usize) -> (f64, f64) {
    let (next, all) = (AtomicUsize::new(0), Mutex::new(Vec::with_capacity(count)));
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..AT_A_TIME {
            scope.spawn(|| {
                while next.fetch_add(1, Ordering::Relaxed) < count {
                    let held = Held::start(&mut bench.command(who), LIMIT).unwrap();
                    all.lock().unwrap().push(held);
                }
            });
        }
    });
    let seconds = start.elapsed().as_secs_f64();
    let all = all.into_inner().unwrap();
    let sum: u64 = all.iter().map(|held| footprint::of(held.pid(), MEMORY_MIB).unwrap().pss_kib).sum();
    (count as f64 / seconds, sum as f64 / count as f64)
}
