//! Flush requests and their answers (virtio 1.2, 5.19.6): memory and a queue in, work for the host and answers out.

use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, Queue, QueueT};
use vm_memory::{Address, Bytes, GuestAddress};

use super::metrics::Metrics;
use crate::devices::virtio::queue::{Answer, Broken, Buffers, Turn, copy_out, drain, drain_some};
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

/// Flushes that the guest waits for. A call of the host's covers those that were taken before it began.
///
/// ```text
///   queue ──take──▶ waiting ──begin──▶ under way ──finish──▶ queue
/// ```
#[derive(Debug, Default)]
pub struct Flushes {
    /// The host knows nothing of them yet.
    waiting: Vec<Flush>,
    /// What the call that is under way is for. Nothing: none is.
    under_way: Vec<Flush>,
}

impl Flushes {
    /// How many there are.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.waiting.len() + self.under_way.len()
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes every request that is in the queue, as long as there is room.
    ///
    /// # Errors
    /// [`Broken`]: the guest broke the queue.
    pub fn take(
        &mut self,
        queue: &mut Queue,
        memory: &Memory,
        metrics: &mut Metrics,
    ) -> Result<Turn, Broken> {
        drain_some(queue, memory, |chain| {
            let Some(chain) = chain else {
                return if self.len() < ROOM { Answer::Used(0) } else { Answer::Leave };
            };
            match request(memory, chain) {
                Some((FLUSH, flush)) => {
                    self.waiting.push(flush);
                    Answer::Kept
                }
                other => Answer::Used(refuse(memory, other, metrics)),
            }
        })
    }

    /// Whether the host is to be asked now.
    #[must_use]
    pub const fn may_begin(&self) -> bool {
        self.under_way.is_empty() && !self.waiting.is_empty()
    }

    /// The host is asked, for all that wait.
    pub fn begin(&mut self) {
        if self.may_begin() {
            std::mem::swap(&mut self.waiting, &mut self.under_way);
        }
    }

    /// The host is done; says whether the guest wants an interrupt.
    ///
    /// # Errors
    /// [`Broken`]: the guest broke the queue.
    pub fn finish(
        &mut self,
        queue: &mut Queue,
        memory: &Memory,
        done: bool,
        metrics: &mut Metrics,
    ) -> Result<bool, Broken> {
        let mut any = false;
        for flush in std::mem::take(&mut self.under_way) {
            let written = answer(memory, &flush, if done { OK } else { FAILED });
            queue.add_used(memory, flush.head, written)?;
            metrics.flushes += 1;
            any = true;
        }
        Ok(any && queue.needs_notification(memory)?)
    }

    /// Nobody waits any more.
    pub fn forget(&mut self) {
        self.waiting.clear();
        self.under_way.clear();
    }
}

/// Answers every request in the queue of a file that nobody can have written.
///
/// # Errors
/// [`Broken`]: the guest broke the queue.
pub fn serve_read_only(queue: &mut Queue, memory: &Memory, metrics: &mut Metrics) -> Result<Turn, Broken> {
    drain(queue, memory, |chain| match request(memory, chain) {
        Some((FLUSH, flush)) => {
            metrics.flushes += 1;
            answer(memory, &flush, OK)
        }
        other => refuse(memory, other, metrics),
    })
}

/// Answers a chain that asks for no flush; returns how many bytes that took.
fn refuse(memory: &Memory, request: Option<(u32, Flush)>, metrics: &mut Metrics) -> u32 {
    let Some((_, place)) = request else {
        metrics.refused += 1;
        return 0;
    };
    metrics.unsupported += 1;
    answer(memory, &place, FAILED)
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
