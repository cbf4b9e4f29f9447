//! What a balloon has done.

use serde::Serialize;

/// Counters since the monitor started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Metrics {
    /// Pages that the guest put into the balloon.
    pub inflated_pages: u64,
    /// Pages that the guest says it has taken out again.
    pub deflated_pages: u64,
    /// Bytes that the guest reported as not used.
    pub reported_bytes: u64,
    /// Bytes that went back to the host, by either way.
    pub given_back_bytes: u64,
    /// Lists of statistics that the guest sent.
    pub statistics: u64,
    /// Pages, lists and ranges of the guest that were malformed or outside of its memory.
    pub refused: u64,
    /// Ranges that the host did not take back.
    pub failed: u64,
}
