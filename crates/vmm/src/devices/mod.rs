//! What the guest finds at its ports and registers.

pub mod power;
pub mod serial;
pub mod virtio;
