//! Fork → first KVM_RUN, and private memory there.

use crate::common::footprint;
use crate::common::hold::Held;
use crate::monitors::{Bench, LIMIT, MEMORY_MIB};
use crate::report::{Goal, Report, Sample};

/// Goal: the median, milliseconds, and as a part of QEMU's.
const FIRST_RUN_MS: f64 = 5.0;
const FIRST_RUN_RATIO: f64 = 0.2;
/// Goal: KiB.
pub const PRIVATE_DIRTY_KIB: f64 = 280.0;

/// Starts everyone in turn, so that what else the machine does meets all alike.
pub fn measure(bench: &Bench, runs: usize, report: &mut Report) {
    let (mut times, mut dirty) = (Sample::default(), Sample::default());
    // Once unmeasured: programs and kernel are in the page cache then.
    for who in bench.everyone() {
        drop(Held::start(&mut bench.command(who), LIMIT).unwrap());
    }
    for _ in 0..runs {
        for who in bench.everyone() {
            let held = Held::start(&mut bench.command(who), LIMIT).unwrap();
            times.add(who, held.elapsed.as_secs_f64() * 1e3);
            dirty.add(who, footprint::of(held.pid(), MEMORY_MIB).unwrap().private_dirty_kib as f64);
        }
    }
    report.compare(
        "fork → first KVM_RUN",
        "ms",
        &times,
        Goal::below(FIRST_RUN_MS).and_ratio(FIRST_RUN_RATIO),
    );
    report.compare("private dirty beyond guest memory there", "KiB", &dirty, Goal::below(PRIVATE_DIRTY_KIB));
}
