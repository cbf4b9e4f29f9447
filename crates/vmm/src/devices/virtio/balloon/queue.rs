//! Lists of pages, statistics and free ranges (virtio 1.2, 5.5.6): memory and a queue in, ranges to give back out.

use std::io;

use virtio_queue::{DescriptorChain, Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::metrics::Metrics;
use super::statistics::{self, Statistics};
use crate::devices::virtio::queue::{BUDGET, Broken, Buffers, Turn, copy_out, drain_while, length, next};
use crate::memory::{Memory, PAGE, Range};

/// `VIRTIO_BALLOON_F_STATS_VQ`.
pub const F_STATISTICS: u64 = 1 << 1;
/// `VIRTIO_BALLOON_F_DEFLATE_ON_OOM`.
pub const F_DEFLATE_ON_OOM: u64 = 1 << 2;
/// `VIRTIO_BALLOON_F_PAGE_REPORTING`.
pub const F_REPORTING: u64 = 1 << 5;

/// Longest list of pages that is taken. Linux sends 256 pages at a time, Windows 1024.
pub const MAX_PAGES: usize = 2048;
/// Most descriptors of one report that are looked at. Linux reports 32 ranges at a time.
pub const MAX_RANGES: usize = 256;
/// Ranges that one turn gives back: each is a call of the host's, and other devices wait meanwhile.
const CALLS: usize = 1024;

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Pages go into the balloon.
    Inflate,
    /// Pages come out of it.
    Deflate,
    /// What the guest says about its memory.
    Statistics,
    /// Ranges that the guest does not use.
    Reporting,
}

impl Role {
    /// The role of a queue under these features.
    ///
    /// Queues have fixed numbers (virtio 1.2, 5.5.2: statistics 2, reporting 4), but Linux before 6.11 leaves no gaps for
    /// those that it does not use. As free page hinting, number 3, is never offered, both ways of counting can be served.
    #[must_use]
    pub const fn of(queue: usize, features: u64) -> Option<Self> {
        match queue {
            0 => Some(Self::Inflate),
            1 => Some(Self::Deflate),
            2 if features & F_STATISTICS != 0 => Some(Self::Statistics),
            2..=4 if features & F_REPORTING != 0 => Some(Self::Reporting),
            _ => None,
        }
    }
}

/// Turns a list of page numbers into as few ranges as it can be said with: in order, each page once.
pub fn runs(pages: &mut Vec<u32>) -> impl Iterator<Item = Range> {
    pages.sort_unstable();
    pages.dedup();
    pages
        .chunk_by(|one, other| one.checked_add(1) == Some(*other))
        .map(|run| Range { start: u64::from(run[0]) * PAGE, size: run.len() as u64 * PAGE })
}

/// Takes a turn in which each range that is given back counts.
fn turn<F>(queue: &mut Queue, memory: &Memory, mut handle: F) -> Result<Turn, Broken>
where
    F: FnMut(DescriptorChain<&Memory>) -> usize,
{
    let (mut calls, mut stopped) = (0, false);
    let turn = drain_while(queue, memory, |chain| match chain {
        None => {
            stopped = calls >= CALLS;
            (!stopped).then_some(0)
        }
        Some(chain) => {
            calls += handle(chain);
            Some(0)
        }
    })?;
    Ok(Turn { more: turn.more || stopped, ..turn })
}

/// Gives the pages of every list in the queue back. `scratch` is room for one list.
///
/// # Errors
/// [`Broken`]: the guest broke the queue.
pub fn inflate(
    queue: &mut Queue,
    memory: &Memory,
    scratch: &mut Vec<u32>,
    mut give_back: impl FnMut(Range) -> io::Result<u64>,
    metrics: &mut Metrics,
) -> Result<Turn, Broken> {
    turn(queue, memory, |chain| {
        if !read_list(memory, chain, scratch) {
            metrics.refused += 1;
            return 0;
        }
        let said = scratch.len();
        scratch.retain(|page| memory.address_in_range(GuestAddress(u64::from(*page) * PAGE)));
        metrics.refused += (said - scratch.len()) as u64;
        metrics.inflated_pages += scratch.len() as u64;
        runs(scratch).map(|run| note(give_back(run), metrics)).sum()
    })
}

/// Takes every list of pages that come out. The host has nothing to do for them: they are there when they are touched.
///
/// # Errors
/// [`Broken`]: the guest broke the queue.
pub fn deflate(
    queue: &mut Queue,
    memory: &Memory,
    scratch: &mut Vec<u32>,
    metrics: &mut Metrics,
) -> Result<Turn, Broken> {
    turn(queue, memory, |chain| {
        if read_list(memory, chain, scratch) {
            metrics.deflated_pages += scratch.len() as u64;
        } else {
            metrics.refused += 1;
        }
        0
    })
}

/// Reads a list of page numbers; false if it is none, or too long.
fn read_list(memory: &Memory, chain: DescriptorChain<&Memory>, pages: &mut Vec<u32>) -> bool {
    pages.clear();
    let Ok(buffers) = Buffers::new(memory, chain, 4 * MAX_PAGES as u64) else { return false };
    let mut bytes = [0; 4 * MAX_PAGES];
    let count = copy_out(&buffers.readable, &mut bytes);
    let words = bytes[..count].chunks_exact(4).filter_map(|word| <[u8; 4]>::try_from(word).ok());
    pages.extend(words.map(u32::from_le_bytes));
    count > 0 && count.is_multiple_of(4)
}

/// Gives every range that is reported in the queue back. Nobody holds the guest to what it reports: what it still uses there
/// is lost to it.
///
/// # Errors
/// [`Broken`]: the guest broke the queue.
pub fn report(
    queue: &mut Queue,
    memory: &Memory,
    mut give_back: impl FnMut(Range) -> io::Result<u64>,
    metrics: &mut Metrics,
) -> Result<Turn, Broken> {
    turn(queue, memory, |chain| {
        let mut calls = 0;
        for descriptor in chain.take(MAX_RANGES) {
            let range = whole_pages(descriptor.addr().0, descriptor.len());
            let range = range.filter(|range| descriptor.is_write_only() && inside(memory, *range));
            let Some(range) = range else {
                metrics.refused += 1;
                continue;
            };
            metrics.reported_bytes += range.size;
            calls += note(give_back(range), metrics);
        }
        calls
    })
}

/// The whole pages within a buffer, if any.
fn whole_pages(address: u64, length: u32) -> Option<Range> {
    let start = address.checked_next_multiple_of(PAGE)?;
    let end = address.checked_add(length.into())? / PAGE * PAGE;
    let size = end.checked_sub(start).filter(|size| *size > 0)?;
    Some(Range { start, size })
}

fn inside(memory: &Memory, range: Range) -> bool {
    usize::try_from(range.size).is_ok_and(|size| memory.check_range(GuestAddress(range.start), size))
}

/// Counts one call.
fn note(given: io::Result<u64>, metrics: &mut Metrics) -> usize {
    static LOG: crate::log::Limited = crate::log::Limited::new();
    match given {
        Ok(bytes) => metrics.given_back_bytes += bytes,
        Err(error) => {
            metrics.failed += 1;
            LOG.line(|| format!("balloon: memory could not be given back: {error}"));
        }
    }
    1
}

/// Takes statistics. The device keeps the guest's buffer until it wants to know again (virtio 1.2, 5.5.6.3); of several the
/// last is kept in `held`.
///
/// # Errors
/// [`Broken`]: the guest broke the queue.
pub fn take_statistics(
    queue: &mut Queue,
    memory: &Memory,
    held: &mut Option<u16>,
    latest: &mut Statistics,
    metrics: &mut Metrics,
) -> Result<Turn, Broken> {
    let mut any = false;
    let mut promised = false;
    for _ in 0..BUDGET {
        let Some(chain) = next(queue, memory)? else {
            if promised {
                return Err(Broken("available chains that cannot be taken".into()));
            }
            // Ask for a bell, then look once more: a buffer may have come in between.
            promised = queue.enable_notification(memory)?;
            if promised {
                continue;
            }
            return Ok(Turn { interrupt: any && queue.needs_notification(memory)?, more: false });
        };
        promised = false;
        if let Some(older) = held.replace(chain.head_index()) {
            queue.add_used(memory, older, 0)?;
            any = true;
        }
        match Buffers::new(memory, chain, u64::from(u32::MAX)) {
            Ok(buffers) if length(&buffers.readable) > 0 => {
                let mut bytes = [0; statistics::MAX_BYTES];
                let count = copy_out(&buffers.readable, &mut bytes);
                latest.update(&bytes[..count]);
                metrics.statistics += 1;
            }
            _ => metrics.refused += 1,
        }
    }
    Ok(Turn { interrupt: any && queue.needs_notification(memory)?, more: true })
}

/// Asks for statistics by returning the buffer that is held; says whether the guest wants an interrupt.
///
/// # Errors
/// [`Broken`]: the guest broke the queue.
pub fn ask(queue: &mut Queue, memory: &Memory, held: &mut Option<u16>) -> Result<bool, Broken> {
    let Some(head) = held.take() else { return Ok(false) };
    queue.add_used(memory, head, 0)?;
    Ok(queue.needs_notification(memory)?)
}
