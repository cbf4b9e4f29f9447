//! Entropy requests: fill what the guest offers, up to a limit per request.

use serde::Serialize;
use virtio_queue::Queue;

use crate::devices::virtio::pace::Pace;
use crate::devices::virtio::queue::{Broken, Buffers, Turn, copy_in, drain_while, length};
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
    /// Times that the guest waited because of the limits.
    pub limited: u64,
    /// Requests that the guest formed badly.
    pub refused: u64,
}

/// Fills every request that is in the queue from `random`, as far as the pace allows.
///
/// # Errors
/// [`Broken`]: the guest broke the queue.
pub fn process(
    queue: &mut Queue,
    memory: &Memory,
    mut random: impl FnMut(&mut [u8]) -> usize,
    mut pace: Option<&mut Pace>,
    metrics: &mut Metrics,
) -> Result<Turn, Broken> {
    drain_while(queue, memory, |chain| {
        let Some(chain) = chain else {
            let passes = pace.as_mut().is_none_or(|pace| pace.may_pass());
            metrics.limited += u64::from(!passes);
            return passes.then_some(0);
        };
        let Ok(buffers) = Buffers::new(memory, chain, u64::from(u32::MAX)) else {
            metrics.refused += 1;
            // Without an answer or not: it was work.
            if let Some(pace) = &mut pace {
                pace.charge(0);
            }
            return Some(0);
        };
        let count = usize::try_from(length(&buffers.writable)).unwrap_or(usize::MAX).min(MAX_BYTES);
        let mut bytes = [0; MAX_BYTES];
        let filled = random(&mut bytes[..count]);
        let written = copy_in(&buffers.writable, &bytes[..filled]);
        metrics.requests += 1;
        metrics.bytes += written as u64;
        if let Some(pace) = &mut pace {
            pace.charge(written as u64);
        }
        Some(u32::try_from(written).unwrap_or(0))
    })
}
