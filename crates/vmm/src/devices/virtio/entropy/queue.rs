//! Entropy requests: fill what the guest offers, up to a limit per request.

use serde::Serialize;
use virtio_queue::Queue;

use crate::devices::virtio::queue::{Broken, Buffers, Turn, copy_in, drain, length};
use crate::memory::Memory;

/// Bytes per request at most (the device may always give less).
const MAX_BYTES: usize = 4096;

/// Counters since the monitor started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Metrics {
    /// Requests.
    pub requests: u64,
    /// Bytes given.
    pub bytes: u64,
    /// Requests that the guest formed badly.
    pub refused: u64,
}

/// Fills every request that is in the queue from `random`.
///
/// # Errors
/// [`Broken`]: the guest broke the queue.
pub fn process(
    queue: &mut Queue,
    memory: &Memory,
    mut random: impl FnMut(&mut [u8]) -> usize,
    metrics: &mut Metrics,
) -> Result<Turn, Broken> {
    drain(queue, memory, |chain| {
        let Ok(buffers) = Buffers::new(memory, chain, u64::from(u32::MAX)) else {
            metrics.refused += 1;
            return 0;
        };
        let count = usize::try_from(length(&buffers.writable)).unwrap_or(usize::MAX).min(MAX_BYTES);
        let mut bytes = [0; MAX_BYTES];
        let filled = random(&mut bytes[..count]);
        let written = copy_in(&buffers.writable, &bytes[..filled]);
        metrics.requests += 1;
        metrics.bytes += written as u64;
        u32::try_from(written).unwrap_or(0)
    })
}
