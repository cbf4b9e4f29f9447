//! What an interface has carried.

use serde::Serialize;

/// Counters since the monitor started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Metrics {
    /// Packets to the guest.
    pub rx_packets: u64,
    /// Bytes to the guest, without the virtio header.
    pub rx_bytes: u64,
    /// Packets for the guest that did not fit its buffers.
    pub rx_dropped: u64,
    /// Times that packets to the guest waited because of the interface's limits.
    pub rx_limited: u64,
    /// Packets from the guest.
    pub tx_packets: u64,
    /// Bytes from the guest, without the virtio header.
    pub tx_bytes: u64,
    /// Packets from the guest that were malformed or that the tap did not take.
    pub tx_dropped: u64,
    /// Times that packets from the guest waited because of the interface's limits.
    pub tx_limited: u64,
}
