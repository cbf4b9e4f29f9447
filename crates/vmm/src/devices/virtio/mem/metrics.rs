//! What memory that comes and goes has done.

use serde::Serialize;

/// Counters since the monitor started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Metrics {
    /// Requests of the guest, of any kind, that were answered.
    pub requests: u64,
    /// Bytes that came.
    pub plugged_bytes: u64,
    /// Bytes that went.
    pub unplugged_bytes: u64,
    /// Requests for more than the host wants the guest to have.
    pub too_much: u64,
    /// Requests that made no sense: outside, not of whole blocks, plugged already or not at all.
    pub errors: u64,
    /// Buffers that hold no request or have no room for an answer.
    pub refused: u64,
    /// Ranges that the host did not take back.
    pub failed: u64,
}
