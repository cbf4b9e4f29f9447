//! Memory after a guest has used a disk and an interface. The guest is bare metal, so this is ours alone: it speaks to
//! devices at the addresses that our machine has them at.

use crate::common::machines::{self, MEMORY_MIB};
use crate::common::{footprint, tap, wait_for};
use crate::monitors::{Bench, Who};
use crate::report::{Goal, Report, Sample};

/// Goal: KiB.
const PRIVATE_DIRTY_KIB: f64 = 3.0 * 1024.0;

/// Runs the guest and reads the monitor's memory when the guest says that it is up.
pub fn measure(bench: &Bench, runs: usize, report: &mut Report) {
    let mut dirty = Sample::default();
    for _ in 0..runs {
        let Some(tap) = tap::create() else { return };
        let mut machine = machines::with_disk_and_interface();
        machine.program = bench.monitor().to_owned();
        machine.start(&machines::tap_argument(&tap));
        wait_for("the guest", || machine.console().contains(machines::UP).then_some(()));
        dirty.add(Who::Roost, footprint::of(machine.pid(), MEMORY_MIB).unwrap().private_dirty_kib as f64);
    }
    report.compare(
        "private dirty beyond guest memory, disk and NIC in use",
        "KiB",
        &dirty,
        Goal::below(PRIVATE_DIRTY_KIB),
    );
}
