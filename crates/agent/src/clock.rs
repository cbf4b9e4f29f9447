//! Time on a host: CLOCK_BOOTTIME, which counts from boot through sleep and which no one sets, beside the boot id
//! that says from which boot.

use crate::error::{Error, Result};
use rustix::time::{ClockId, clock_gettime};

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
