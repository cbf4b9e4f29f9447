//! Flush requests and their answers (virtio 1.2, 5.19.6): memory and a queue in, requests that wait for the host out.

use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, Queue, QueueT};
use vm_memory::{Address, Bytes, GuestAddress};

use super::metrics::Metrics;
use crate::devices::virtio::queue::{Answer, Broken, Buffers, Turn, copy_out, drain_some};
use crate::memory::Memory;

/// Bytes of a request: its kind.
pub const REQUEST: usize = 4;
/// Bytes of an answer.
pub const ANSWER: usize = 4;
/// The one kind of request.
pub const FLUSH: u32 = 0;
/// Answer: all that was written before is on stable storage.
pub const OK: u32 = 0;
/// Answer: it is not, or there is no such request (-1).
pub const FAILED: u32 = u32::MAX;
/// Requests that may wait for the host at a time. What is beyond waits in the guest's queue.
pub const ROOM: usize = 128;
/// Longest chain that is looked at, bytes.
const MAX_BYTES: u64 = 4096;

/// A flush that the guest waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flush {
    head: u16,
    /// Where each byte of the answer goes: a guest may cut it as it likes (virtio 1.2, 2.7.4).
    answer: [GuestAddress; ANSWER],
}

/// Takes every request that is in the queue. Flushes are put behind those that wait, and answered by [`give`].
///
/// # Errors
/// [`Broken`]: the guest broke the queue.
pub fn take(
    queue: &mut Queue,
    memory: &Memory,
    waiting: &mut Vec<Flush>,
    room: usize,
    metrics: &mut Metrics,
) -> Result<Turn, Broken> {
    drain_some(queue, memory, |chain| {
        let Some(chain) = chain else {
            return if waiting.len() < room { Answer::Used(0) } else { Answer::Leave };
        };
        let Some((kind, flush)) = request(memory, chain) else {
            metrics.refused += 1;
            return Answer::Used(0);
        };
        if kind == FLUSH {
            waiting.push(flush);
            return Answer::Kept;
        }
        metrics.unsupported += 1;
        Answer::Used(answer(memory, &flush, FAILED))
    })
}

/// Answers flushes, and says whether the guest wants an interrupt.
///
/// # Errors
/// [`Broken`]: the guest broke the queue.
pub fn give(
    queue: &mut Queue,
    memory: &Memory,
    flushes: impl Iterator<Item = Flush>,
    result: u32,
    metrics: &mut Metrics,
) -> Result<bool, Broken> {
    let mut any = false;
    for flush in flushes {
        let written = answer(memory, &flush, result);
        queue.add_used(memory, flush.head, written)?;
        metrics.flushes += 1;
        any = true;
    }
    Ok(any && queue.needs_notification(memory)?)
}

/// What is asked, and where the answer goes.
fn request(memory: &Memory, chain: DescriptorChain<&Memory>) -> Option<(u32, Flush)> {
    let head = chain.head_index();
    let buffers = Buffers::new(memory, chain.clone(), MAX_BYTES).ok()?;
    let mut kind = [0; REQUEST];
    if copy_out(&buffers.readable, &mut kind) < REQUEST {
        return None;
    }
    let mut bytes = chain.filter(Descriptor::is_write_only).flat_map(|descriptor| {
        (0..u64::from(descriptor.len())).map_while(move |byte| descriptor.addr().checked_add(byte))
    });
    let mut answer = [GuestAddress(0); ANSWER];
    for place in &mut answer {
        *place = bytes.next()?;
    }
    Some((u32::from_le_bytes(kind), Flush { head, answer }))
}

fn answer(memory: &Memory, flush: &Flush, result: u32) -> u32 {
    // It was inside guest memory when the request was taken, and that does not shrink.
    let pairs = result.to_le_bytes().into_iter().zip(flush.answer);
    pairs.map(|(byte, place)| u32::from(memory.write_obj(byte, place).is_ok())).sum()
}
