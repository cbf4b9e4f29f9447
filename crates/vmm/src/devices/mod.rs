//! What the guest finds at its ports and registers.

pub mod cpus;
pub mod limiter;
pub mod power;
pub mod serial;
pub mod virtio;
