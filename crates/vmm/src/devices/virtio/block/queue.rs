//! Block requests (virtio 1.2, 5.2.6): memory and a queue in, work for the host and completions out. No descriptors, no events.
//!
//! The host does its work at once, or an [`Engine`] takes it over and the chain goes back to the guest once that is done, in
//! whatever order that is. A flush covers writes that were finished before it came (virtio 1.2, 5.2.6.2), so it waits for no other.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_queue::{DescriptorChain, Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::backend::Backend;
use super::engine::{Engine, Work};
use super::flying::{InFlight, Ticket, What};
use super::metrics::Metrics;
use super::ranges::{self, Kind};
use crate::devices::virtio::pace::Pace;
use crate::devices::virtio::queue::{
    Answer, Broken, Buffers, Turn, copy_in, copy_out, drain_some, length, split_at,
};
use crate::memory::{Memory, Slice};

/// Bytes of a sector, whatever the image's own blocks are.
pub const SECTOR: u64 = 512;
/// Bytes of a request's header: type, reserved, sector.
const HEADER: usize = 16;
/// Longest request that is taken.
pub const MAX_REQUEST: u64 = 32 << 20;

/// Who does the host's work.
pub enum Host<'a> {
    /// The image itself, at once.
    Here(&'a mut dyn Backend),
    /// An engine, for the queue of this number.
    Beside(&'a mut dyn Engine, &'a mut InFlight, usize),
}

/// A disk, as a queue's requests see it.
pub struct Disk<'a> {
    /// Who works.
    pub host: Host<'a>,
    /// Bytes.
    pub size: u64,
    /// The guest may not write.
    pub read_only: bool,
    /// The guest has no FLUSH, so each write must be stable before it is acknowledged (virtio 1.2, 5.2.6.2).
    pub write_through: bool,
    /// How much the guest may do.
    pub pace: Option<&'a mut Pace>,
    /// Serial number.
    pub id: &'a str,
}

/// Takes every request that is in the queue. With an engine, [`Engine::start`] and [`complete`] are due then.
///
/// # Errors
/// [`Broken`]: the guest broke the queue.
pub fn process(
    queue: &mut Queue,
    memory: &Memory,
    disk: &mut Disk<'_>,
    metrics: &mut Metrics,
) -> Result<Turn, Broken> {
    drain_some(queue, memory, |chain| {
        let Some(chain) = chain else {
            if let Host::Beside(_, flying, queue) = &mut disk.host
                && !flying.has_room(*queue)
            {
                return Answer::Leave;
            }
            let passes = disk.pace.as_mut().is_none_or(|pace| pace.may_pass());
            metrics.limited += u64::from(!passes);
            return if passes { Answer::Used(0) } else { Answer::Leave };
        };
        let (bytes, answer) = match request(memory, chain, disk, metrics) {
            Request::Answered(written) => (0, Answer::Used(written)),
            Request::Work(ticket, work) => {
                // Where the host cannot make a hole, zeroes are written like anything else.
                let moves = matches!(ticket.what, What::Read | What::Write | What::Zero);
                let bytes = if moves { ticket.bytes } else { 0 };
                (bytes, begin(memory, ticket, work, disk, metrics))
            }
        };
        if let Some(pace) = &mut disk.pace {
            pace.charge(bytes);
        }
        answer
    })
}

/// Does a request's work, or lets the engine do it.
fn begin(
    memory: &Memory,
    ticket: Ticket,
    work: Work<Vec<Slice<'_>>>,
    disk: &mut Disk<'_>,
    metrics: &mut Metrics,
) -> Answer {
    match &mut disk.host {
        Host::Here(backend) => {
            let result = work.perform(*backend);
            Answer::Used(finish(memory, &ticket, result, disk.id, metrics))
        }
        Host::Beside(engine, flying, queue) => match flying.add(*queue, ticket) {
            Some(token) => {
                engine.submit(token, work);
                Answer::Kept
            }
            // There was room when that was asked.
            None => Answer::Leave,
        },
    }
}

/// Gives finished requests back to the guest; says whether it wants an interrupt.
///
/// # Errors
/// [`Broken`]: the guest broke a queue.
pub fn complete(
    queues: &mut [Queue],
    memory: &Memory,
    (engine, flying): (&mut dyn Engine, &mut InFlight),
    id: &str,
    metrics: &mut Metrics,
) -> Result<bool, Broken> {
    let mut touched = 0_u64;
    while let Some((token, result)) = engine.finished() {
        let Some((index, ticket)) = flying.take(token) else { continue };
        let Some(queue) = queues.get_mut(index) else { continue };
        let written = finish(memory, &ticket, result, id, metrics);
        queue.add_used(memory, ticket.head, written)?;
        touched |= 1 << index;
    }
    let mut interrupt = false;
    for (index, queue) in queues.iter_mut().enumerate().filter(|(index, _)| touched >> index & 1 == 1) {
        debug_assert!(index < 64);
        interrupt |= queue.needs_notification(memory)?;
    }
    Ok(interrupt)
}

/// A request, looked at.
enum Request<'m> {
    /// It needs nothing of the host: so many bytes were written into the chain.
    Answered(u32),
    /// The host has work.
    Work(Ticket, Work<Vec<Slice<'m>>>),
}

fn request<'m>(
    memory: &'m Memory,
    chain: DescriptorChain<&Memory>,
    disk: &Disk<'_>,
    metrics: &mut Metrics,
) -> Request<'m> {
    let head = chain.head_index();
    let parts = Buffers::new(memory, chain, MAX_REQUEST).ok().and_then(|buffers| {
        // The status is the last writable byte, wherever descriptors begin and end.
        let status = buffers.last_writable?;
        let data = usize::try_from(length(&buffers.writable)).ok()?.checked_sub(1)?;
        let (target, _) = split_at(&buffers.writable, data).ok()?;
        let (header, source) = split_at(&buffers.readable, HEADER).ok()?;
        Some((header, source, target, status))
    });
    let Some((header_slices, source, target, status)) = parts else {
        metrics.refused += 1;
        return Request::Answered(0);
    };
    let mut header = [0; HEADER];
    let _ = copy_out(&header_slices, &mut header);
    let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let sector = u64::from(word(8)) | u64::from(word(12)) << 32;
    let stable = disk.write_through;

    let work = match word(0) {
        VIRTIO_BLK_T_IN => {
            let bytes = length(&target);
            range(sector, bytes, disk.size)
                .map(|offset| (What::Read, offset, bytes, Work::Read { offset, data: target }))
                .ok_or(VIRTIO_BLK_S_IOERR)
        }
        VIRTIO_BLK_T_OUT => {
            let bytes = length(&source);
            range(sector, bytes, disk.size)
                .filter(|_| !disk.read_only)
                .map(|offset| (What::Write, offset, bytes, Work::Write { offset, data: source, stable }))
                .ok_or(VIRTIO_BLK_S_IOERR)
        }
        VIRTIO_BLK_T_DISCARD => clear(disk, Kind::Discard, &source),
        VIRTIO_BLK_T_WRITE_ZEROES => clear(disk, Kind::Zero, &source),
        VIRTIO_BLK_T_FLUSH => Ok((What::Flush, 0, 0, Work::Flush)),
        VIRTIO_BLK_T_GET_ID => {
            let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
            for (byte, value) in id.iter_mut().zip(disk.id.bytes()) {
                *byte = value;
            }
            let count = copy_in(&target, &id);
            return Request::Answered(answer(memory, status, VIRTIO_BLK_S_OK, count as u64));
        }
        _ => Err(VIRTIO_BLK_S_UNSUPP),
    };
    match work {
        Ok((what, offset, bytes, work)) => Request::Work(Ticket { head, status, what, offset, bytes }, work),
        Err(refused) => {
            metrics.refused += 1;
            Request::Answered(answer(memory, status, refused, 0))
        }
    }
}

/// What a request asks of the host: what it is, where on the disk it begins, how many bytes it is about, and the work.
type Asked<'m> = (What, u64, u64, Work<Vec<Slice<'m>>>);

/// The ranges that a request lists, to be discarded or zeroed.
fn clear<'m>(disk: &Disk<'_>, kind: Kind, source: &[Slice<'_>]) -> Result<Asked<'m>, u32> {
    let mut bytes = vec![0; ranges::BYTES * (ranges::MAX_DISCARD_RANGES as usize + 1)];
    // A longer list is one that is too long, too.
    let count = copy_out(source, &mut bytes);
    let ranges = ranges::parse(kind, &bytes[..count], disk.size)?;
    if disk.read_only {
        return Err(VIRTIO_BLK_S_IOERR);
    }
    let what = match kind {
        Kind::Discard => What::Discard,
        Kind::Zero => What::Zero,
    };
    // What is discarded may be lost or not, so that it need not be stable either.
    let stable = disk.write_through && kind == Kind::Zero;
    let (first, total) = (ranges[0].offset, ranges.iter().map(|range| range.length).sum());
    Ok((what, first, total, Work::Clear { kind, ranges, stable }))
}

/// Answers a request whose work is done; returns how many bytes were written into its chain.
fn finish(
    memory: &Memory,
    ticket: &Ticket,
    result: std::io::Result<()>,
    id: &str,
    metrics: &mut Metrics,
) -> u32 {
    if let Err(error) = result {
        static LOG: crate::log::Limited = crate::log::Limited::new();
        metrics.failed += 1;
        LOG.line(|| format!("disk {id:?}: {:?} at {:#x} failed: {error}", ticket.what, ticket.offset));
        return answer(memory, ticket.status, VIRTIO_BLK_S_IOERR, 0);
    }
    let bytes = ticket.bytes;
    match ticket.what {
        What::Read => (metrics.reads, metrics.read_bytes) = (metrics.reads + 1, metrics.read_bytes + bytes),
        What::Write => {
            (metrics.writes, metrics.write_bytes) = (metrics.writes + 1, metrics.write_bytes + bytes);
        }
        What::Discard => metrics.discards += 1,
        What::Zero => metrics.zeroings += 1,
        What::Flush => metrics.flushes += 1,
    }
    if matches!(ticket.what, What::Discard | What::Zero) {
        metrics.cleared_bytes += bytes;
    }
    let written = if ticket.what == What::Read { bytes } else { 0 };
    answer(memory, ticket.status, VIRTIO_BLK_S_OK, written)
}

/// Writes the status behind so many bytes of data; returns how many bytes that is together.
fn answer(memory: &Memory, at: GuestAddress, status: u32, written: u64) -> u32 {
    // It was in guest memory when the chain was taken, and that does not go away.
    let _ = memory.write_obj(u8::try_from(status).unwrap_or(u8::MAX), at);
    u32::try_from(written + 1).unwrap_or(u32::MAX)
}

/// The byte offset of a request that is whole sectors and lies inside the disk.
fn range(sector: u64, count: u64, size: u64) -> Option<u64> {
    let offset = sector.checked_mul(SECTOR)?;
    let end = offset.checked_add(count)?;
    (count.is_multiple_of(SECTOR) && end <= size / SECTOR * SECTOR).then_some(offset)
}
