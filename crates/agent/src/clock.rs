//! Time on a host: CLOCK_BOOTTIME, which counts from boot through sleep and which no one sets, beside the boot id
//! that says from which boot.

use crate::error::{Error, Result};
use crate::trouble::Troubles;
use rustix::time::{ClockId, Timespec, clock_gettime};
use std::time::Duration;

/// How often the wall clock is compared with CLOCK_BOOTTIME.
const LOOK: Duration = Duration::from_secs(5);
/// A larger difference between two looks is a step of the clock, not drift.
const STEP_NS: i128 = 2_000_000_000;
/// How long a step is reported, in nanoseconds.
const TOLD_NS: i128 = 10 * 60 * 1_000_000_000;

/// CLOCK_BOOTTIME now, in nanoseconds.
pub fn boottime_ns() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

/// This boot of the host.
///
/// # Errors
/// `/proc` is not mounted.
pub fn boot_id() -> Result<String> {
    let path = "/proc/sys/kernel/random/boot_id";
    let text = std::fs::read_to_string(path).map_err(Error::file("read", path))?;
    Ok(text.trim().to_owned())
}

/// Microseconds from `then_ns` to `now_ns`; 0 when `then` is later.
pub const fn age_us(now_ns: u64, then_ns: u64) -> u64 {
    now_ns.saturating_sub(then_ns) / 1000
}

const fn nanos(at: Timespec) -> i128 {
    at.tv_sec as i128 * 1_000_000_000 + at.tv_nsec as i128
}

/// Detects steps of CLOCK_REALTIME.
#[derive(Debug, Default)]
struct Steps {
    /// CLOCK_REALTIME less CLOCK_BOOTTIME at the last look.
    offset: Option<i128>,
    /// Sum of the recent steps, and the time of the newest one.
    step: Option<(i128, i128)>,
}

impl Steps {
    /// Compares the two clocks. Returns the sentence for the host's owner if a step is being
    /// reported.
    fn look(&mut self, wall_ns: i128, boottime_ns: i128) -> Option<String> {
        let offset = wall_ns - boottime_ns;
        let jump = self.offset.replace(offset).map_or(0, |before| offset - before);
        self.step = self.step.filter(|(_, at)| boottime_ns - at < TOLD_NS);
        if jump.abs() > STEP_NS {
            let before = self.step.map_or(0, |(by, _)| by);
            self.step = Some((before + jump, boottime_ns));
        }
        let (by, _) = self.step?;
        let side = if by < 0 { "back" } else { "ahead" };
        Some(format!(
            "the clock of this host was set {} s {side} within the last {} minutes: bills and limits do not notice, \
             but what else goes by it may; `timedatectl` says whether it is synchronised",
            by.abs() / 1_000_000_000,
            TOLD_NS / 60_000_000_000
        ))
    }
}

/// Reports each step of the clock to the host's owner for ten minutes. Never returns.
pub async fn watch(troubles: &Troubles) {
    let mut steps = Steps::default();
    loop {
        let (wall, boottime) = (clock_gettime(ClockId::Realtime), clock_gettime(ClockId::Boottime));
        troubles.set("clock", steps.look(nanos(wall), nanos(boottime)));
        tokio::time::sleep(LOOK).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: i128 = 1_000_000_000;

    #[test]
    fn a_clock_that_was_set_is_told_for_ten_minutes_and_drift_is_not() {
        let mut steps = Steps::default();
        let mut wall = 1_000_000 * SECOND;
        let mut boottime = 100 * SECOND;
        let mut look = |passed: i128, set: i128| {
            boottime += passed;
            wall += passed + set;
            steps.look(wall, boottime)
        };
        assert_eq!(look(0, 0), None, "where it stands at first is no step");
        for _ in 0..100 {
            assert_eq!(look(5 * SECOND, SECOND / 1000), None);
        }
        assert!(look(5 * SECOND, 3600 * SECOND).unwrap().contains("3600 s ahead"));
        assert!(look(599 * SECOND, 0).is_some());
        assert_eq!(look(SECOND, 0), None);
        assert!(look(5 * SECOND, -3600 * SECOND).unwrap().contains("3600 s back"));
        assert!(look(5 * SECOND, 3590 * SECOND).unwrap().contains("10 s back"), "steps add up");
    }
}
