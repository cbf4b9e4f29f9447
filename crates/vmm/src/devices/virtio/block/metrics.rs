//! What a disk has done.

use serde::Serialize;

/// Counters since the monitor started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Metrics {
    /// Read requests.
    pub reads: u64,
    /// Bytes that the guest was given.
    pub read_bytes: u64,
    /// Write requests.
    pub writes: u64,
    /// Bytes that the guest wrote.
    pub write_bytes: u64,
    /// Discard requests.
    pub discards: u64,
    /// Requests to write zeroes.
    pub zeroings: u64,
    /// Bytes that the guest discarded or zeroed.
    pub cleared_bytes: u64,
    /// Flush requests.
    pub flushes: u64,
    /// Times that the image was replaced, or looked at again.
    pub replaced: u64,
    /// Times that the disk waited because of its limits.
    pub limited: u64,
    /// Requests that the guest formed badly, and those of kinds that the disk does not have.
    pub refused: u64,
    /// Requests that the host could not do.
    pub failed: u64,
}
