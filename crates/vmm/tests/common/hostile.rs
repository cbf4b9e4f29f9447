//! What attacks on queues share: where the guest has them, and what nobody may touch.

use super::virtio::Ring;

/// Looks that a device is given to answer to an attack, which it mostly does not.
pub const LOOKS: u32 = 2_000;
pub const BUFFER: u32 = 0x80_0000;
/// Behind the used ring: no device may write there.
pub const CANARY: u32 = 0x5afe_5afe;

pub fn queue(queue: u32) -> Ring {
    Ring { queue, size: 8, base: 0x20_0000 + 0x10_0000 * queue }
}

pub fn canary(ring: Ring) -> u32 {
    ring.used() + 4 + 8 * u32::from(ring.size) + 4
}
