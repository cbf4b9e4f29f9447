//! What all devices do with a queue: take chains, hand them to the device, return them, say whether to interrupt.

use std::ops::Deref;

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryRegion};

use crate::memory::{Memory, Slice};

/// Chains that one turn takes from one queue: a guest that keeps refilling it must not starve the other devices.
pub const BUDGET: usize = 1024;

/// A queue that the guest has broken. The device stops until it is reset.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the guest broke a queue: {0}")]
pub struct Broken(pub String);

impl From<virtio_queue::Error> for Broken {
    fn from(error: virtio_queue::Error) -> Self {
        Self(error.to_string())
    }
}

/// What a turn left behind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Turn {
    /// The guest wants an interrupt.
    pub interrupt: bool,
    /// There is more, but the budget is used up.
    pub more: bool,
}

/// Takes every available chain as [`drain_while`] does, without asking.
///
/// # Errors
/// [`Broken`].
pub fn drain<F>(queue: &mut Queue, memory: &Memory, mut handle: F) -> Result<Turn, Broken>
where
    F: FnMut(DescriptorChain<&Memory>) -> u32,
{
    drain_while(queue, memory, |chain| chain.map_or(Some(0), |chain| Some(handle(chain))))
}

/// Takes every available chain, lets `handle` say how many bytes it wrote into it, and returns it as used. Before each chain `handle`
/// is asked without one: `None` leaves the rest in the queue, and whoever says so takes care that another turn comes.
///
/// # Errors
/// [`Broken`].
pub fn drain_while<F>(queue: &mut Queue, memory: &Memory, mut handle: F) -> Result<Turn, Broken>
where
    F: FnMut(Option<DescriptorChain<&Memory>>) -> Option<u32>,
{
    drain_some(queue, memory, |chain| handle(chain).map_or(Answer::Leave, Answer::Used))
}

/// What becomes of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Nothing: it stays in the queue with all that follow. Whoever says so takes care that another turn comes.
    Leave,
    /// It goes back, with so many bytes written into it.
    Used(u32),
    /// It is kept, and goes back later.
    Kept,
}

/// Takes every available chain as [`drain_while`] does, and lets `handle` say what becomes of it. Asked without a chain, any answer but
/// [`Answer::Leave`] means that one may come.
///
/// # Errors
/// [`Broken`].
pub fn drain_some<F>(queue: &mut Queue, memory: &Memory, handle: F) -> Result<Turn, Broken>
where
    F: FnMut(Option<DescriptorChain<&Memory>>) -> Answer,
{
    rounds(queue, memory, handle, || ())
}

/// The rounds of [`drain_while`]. `looked` is called in each between its last look for a chain and its end: what the guest does
/// at that moment, tests do there.
fn rounds<F, L>(queue: &mut Queue, memory: &Memory, mut handle: F, mut looked: L) -> Result<Turn, Broken>
where
    F: FnMut(Option<DescriptorChain<&Memory>>) -> Answer,
    L: FnMut(),
{
    let mut left = BUDGET;
    let mut any = false;
    // The guest had made a chain available when the last round ended. One that it makes available between the look
    // for a chain and the end of a round is no fault of its own: the next round must find it.
    let mut promised = false;
    loop {
        queue.disable_notification(memory)?;
        let mut found = false;
        while left > 0 {
            if handle(None) == Answer::Leave {
                // The guest need not ring meanwhile.
                let interrupt = any && queue.needs_notification(memory)?;
                return Ok(Turn { interrupt, more: false });
            }
            let Some(chain) = next(queue, memory)? else { break };
            let head = chain.head_index();
            if let Answer::Used(written) = handle(Some(chain)) {
                queue.add_used(memory, head, written)?;
                any = true;
            }
            found = true;
            left -= 1;
        }
        looked();
        if promised && !found {
            return Err(Broken("available chains that cannot be taken".into()));
        }
        let more = queue.enable_notification(memory)?;
        if !more || left == 0 {
            let interrupt = any && queue.needs_notification(memory)?;
            return Ok(Turn { interrupt, more });
        }
        promised = true;
    }
}

/// Takes the next available chain, if any.
///
/// # Errors
/// [`Broken`] for an available index that is out of bounds.
pub fn next<'m>(
    queue: &mut Queue,
    memory: &'m Memory,
) -> Result<Option<DescriptorChain<&'m Memory>>, Broken> {
    Ok(queue.iter(memory)?.next())
}

/// Where the entries of a used ring begin, and how long each is; where those of an available ring begin (virtio 1.2, 2.7.6, 2.7.8).
const USED_ENTRIES: u64 = 4;
const USED_ENTRY: u64 = 8;
const AVAILABLE_ENTRIES: u64 = 4;

/// Gives several chains back at once, each with the bytes written to it: the guest, which may be looking meanwhile, finds all of them or
/// none (virtio 1.2, 5.1.6.4: a packet in several buffers).
///
/// # Errors
/// [`Broken`]: the ring is nowhere.
pub fn add_used_together(queue: &mut Queue, memory: &Memory, used: &[(u16, u32)]) -> Result<(), Broken> {
    let Some(((head, length), before)) = used.split_last() else { return Ok(()) };
    let first = queue.next_used();
    for ((head, length), place) in before.iter().zip(0..) {
        let place = u64::from(first.wrapping_add(place) % queue.size());
        let mut entry = [0; 8];
        entry[..4].copy_from_slice(&u32::from(*head).to_le_bytes());
        entry[4..].copy_from_slice(&length.to_le_bytes());
        let address = queue.used_ring().wrapping_add(USED_ENTRIES + USED_ENTRY * place);
        memory
            .write_slice(&entry, GuestAddress(address))
            .map_err(|error| Broken(format!("the used ring: {error}")))?;
    }
    // The last one moves the index over all of them.
    queue.set_next_used(first.wrapping_add(u16::try_from(before.len()).unwrap_or(0)));
    Ok(queue.add_used(memory, *head, *length)?)
}

/// Whether the guest wants an interrupt for what was used since the used ring's index was `before`.
///
/// # Errors
/// [`Broken`]: the ring is nowhere.
pub fn wants_interrupt(queue: &mut Queue, memory: &Memory, before: u16) -> Result<bool, Broken> {
    // Counts each call of `add_used` once, and is the barrier before the guest's word is read.
    if queue.needs_notification(memory)? {
        return Ok(true);
    }
    // virtio 1.2, 2.7.10: used_event stands behind the available ring's entries.
    let address = queue.avail_ring().wrapping_add(AVAILABLE_ENTRIES + 2 * u64::from(queue.size()));
    let event: u16 =
        memory.read_obj(GuestAddress(address)).map_err(|error| Broken(format!("the used event: {error}")))?;
    let now = queue.next_used();
    Ok(now.wrapping_sub(u16::from_le(event)).wrapping_sub(1) < now.wrapping_sub(before))
}

/// A chain as two lists of memory: what the guest gives (readable), then what it wants filled (writable).
#[derive(Debug, Default)]
pub struct Buffers<'m> {
    /// The readable part, in order.
    pub readable: Vec<Slice<'m>>,
    /// The writable part, in order.
    pub writable: Vec<Slice<'m>>,
    /// Where the last byte of that is.
    pub last_writable: Option<GuestAddress>,
}

impl<'m> Buffers<'m> {
    /// Resolves a chain. Refuses one that leaves guest memory, is longer than `max_bytes`, loops, or has a readable
    /// descriptor behind a writable one (virtio 1.2, 2.7.4.2).
    ///
    /// # Errors
    /// What is wrong.
    pub fn new<M>(memory: &'m Memory, chain: DescriptorChain<M>, max_bytes: u64) -> Result<Self, &'static str>
    where
        M: Deref,
        M::Target: GuestMemory,
    {
        let mut buffers = Self::default();
        let mut total = 0_u64;
        for descriptor in chain {
            let length = descriptor.len();
            total += u64::from(length);
            if total > max_bytes {
                return Err("longer than allowed");
            }
            if length == 0 {
                continue;
            }
            let list = if descriptor.is_write_only() {
                &mut buffers.writable
            } else if buffers.writable.is_empty() {
                &mut buffers.readable
            } else {
                return Err("a readable descriptor behind a writable one");
            };
            let count = usize::try_from(length).map_err(|_| "too long")?;
            append(memory, descriptor.addr(), count, list)?;
            if descriptor.is_write_only() {
                // It is in guest memory, or appending would have failed.
                buffers.last_writable = descriptor.addr().checked_add(u64::from(length - 1));
            }
        }
        Ok(buffers)
    }
}

/// A buffer may lie across the border of two regions of memory.
fn append<'m>(
    memory: &'m Memory,
    mut address: GuestAddress,
    mut count: usize,
    list: &mut Vec<Slice<'m>>,
) -> Result<(), &'static str> {
    while count > 0 {
        let region = memory.find_region(address).ok_or("outside of guest memory")?;
        let offset = region.to_region_addr(address).ok_or("outside of guest memory")?;
        let here = usize::try_from(region.len() - offset.raw_value()).unwrap_or(usize::MAX).min(count);
        list.push(region.get_slice(offset, here).map_err(|_| "outside of guest memory")?);
        count -= here;
        address = address.checked_add(here as u64).ok_or("outside of guest memory")?;
    }
    Ok(())
}

/// Bytes of a list.
#[must_use]
pub fn length(list: &[Slice<'_>]) -> u64 {
    list.iter().map(|slice| slice.len() as u64).sum()
}

/// Splits a list after `at` bytes.
///
/// # Errors
/// The list is shorter.
pub fn split_at<'m>(
    list: &[Slice<'m>],
    mut at: usize,
) -> Result<(Vec<Slice<'m>>, Vec<Slice<'m>>), &'static str> {
    let (mut head, mut tail) = (Vec::new(), Vec::with_capacity(list.len()));
    for slice in list {
        if at >= slice.len() {
            head.push(*slice);
            at -= slice.len();
        } else if at == 0 {
            tail.push(*slice);
        } else {
            let (first, second) = slice.split_at(at).map_err(|_| "too short")?;
            head.push(first);
            tail.push(second);
            at = 0;
        }
    }
    if at == 0 { Ok((head, tail)) } else { Err("too short") }
}

/// Copies bytes out of a list; returns how many there were.
#[must_use]
pub fn copy_out(list: &[Slice<'_>], target: &mut [u8]) -> usize {
    let mut done = 0;
    for slice in list {
        if done == target.len() {
            break;
        }
        done += slice.copy_to(&mut target[done..]);
    }
    done
}

/// Copies bytes into a list; returns how many found room.
#[must_use]
pub fn copy_in(list: &[Slice<'_>], source: &[u8]) -> usize {
    let mut done = 0;
    for slice in list {
        let count = slice.len().min(source.len() - done);
        if count == 0 {
            break;
        }
        slice.copy_from(&source[done..done + count]);
        done += count;
    }
    done
}

#[cfg(test)]
mod exhaustive;
#[cfg(test)]
mod tests;
