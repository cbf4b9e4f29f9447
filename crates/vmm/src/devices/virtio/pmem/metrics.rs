//! What persistent memory has done.

use serde::Serialize;

/// Counters since the monitor started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Metrics {
    /// Flushes that the guest asked for, and got an answer to.
    pub flushes: u64,
    /// Times that the host put the file on stable storage for them: one for all flushes that wait at that moment.
    pub syncs: u64,
    /// Times that the host could not.
    pub failed: u64,
    /// Requests of a kind that is not there.
    pub unsupported: u64,
    /// Buffers that hold no request or have no room for an answer.
    pub refused: u64,
    /// Times that flushes waited because of the limits.
    pub limited: u64,
    /// Writes of the guest's to a read-only region, which went nowhere.
    pub discarded_writes: u64,
}
