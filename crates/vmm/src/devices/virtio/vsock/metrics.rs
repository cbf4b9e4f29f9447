//! What a vsock device has carried.

use serde::Serialize;

/// Counters since the monitor started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Metrics {
    /// Connections that exist now, those included that are being made.
    pub open: u64,
    /// Connections that guests made.
    pub from_guest: u64,
    /// Connections that host programs made.
    pub from_host: u64,
    /// Bytes from the guest to host programs.
    pub bytes_to_host: u64,
    /// Bytes from host programs to the guest.
    pub bytes_to_guest: u64,
    /// Connections of the guest that no host program takes, or that are too many.
    pub unanswered: u64,
    /// Connections that ended because the guest broke the rules.
    pub broken: u64,
    /// Packets of the guest that were malformed or for nobody, and its buffers that hold no packet.
    pub refused: u64,
    /// Answers that the guest gave no buffers for in time.
    pub lost: u64,
}
