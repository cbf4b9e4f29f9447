//! Block requests (virtio 1.2, 5.2.6): memory and a queue in, completions out. No descriptors, no events.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_queue::{DescriptorChain, Queue};

use super::backend::Backend;
use super::metrics::Metrics;
use super::ranges::{self, Kind};
use crate::devices::virtio::pace::Pace;
use crate::devices::virtio::queue::{
    Broken, Buffers, Turn, copy_in, copy_out, drain_while, length, split_at,
};
use crate::memory::{Memory, Slice};

/// Bytes of a sector, whatever the image's own blocks are.
pub const SECTOR: u64 = 512;
/// Bytes of a request's header: type, reserved, sector.
const HEADER: usize = 16;
/// Longest request that is taken.
pub const MAX_REQUEST: u64 = 32 << 20;

/// What a disk does beyond its image.
pub struct Disk<'a> {
    /// The image.
    pub backend: &'a mut dyn Backend,
    /// The guest may not write.
    pub read_only: bool,
    /// The guest has no FLUSH, so each write must be stable before it is acknowledged (virtio 1.2, 5.2.6.2).
    pub write_through: bool,
    /// How much the guest may do.
    pub pace: Option<&'a mut Pace>,
    /// Serial number.
    pub id: &'a str,
}

/// Does every request that is in the queue.
///
/// # Errors
/// [`Broken`]: the guest broke the queue.
pub fn process(
    queue: &mut Queue,
    memory: &Memory,
    disk: &mut Disk<'_>,
    metrics: &mut Metrics,
) -> Result<Turn, Broken> {
    drain_while(queue, memory, |chain| match chain {
        None => {
            let passes = disk.pace.as_mut().is_none_or(|pace| pace.may_pass());
            metrics.limited += u64::from(!passes);
            passes.then_some(0)
        }
        Some(chain) => {
            let before = metrics.bytes();
            let written = request(memory, chain, disk, metrics);
            if let Some(pace) = &mut disk.pace {
                pace.charge(metrics.bytes() - before);
            }
            Some(written)
        }
    })
}

/// Does one request; returns how many bytes were written into the chain.
fn request(
    memory: &Memory,
    chain: DescriptorChain<&Memory>,
    disk: &mut Disk<'_>,
    metrics: &mut Metrics,
) -> u32 {
    let Ok(buffers) = Buffers::new(memory, chain, MAX_REQUEST) else {
        metrics.refused += 1;
        return 0;
    };
    let writable = length(&buffers.writable);
    // The status is the last writable byte, wherever descriptors begin and end.
    let parts = usize::try_from(writable).ok().and_then(|n| n.checked_sub(1)).and_then(|data| {
        let (data, status) = split_at(&buffers.writable, data).ok()?;
        let (header, rest) = split_at(&buffers.readable, HEADER).ok()?;
        Some((header, rest, data, status))
    });
    let Some((header_slices, source, target, status_slice)) = parts else {
        metrics.refused += 1;
        return 0;
    };
    let mut header = [0; HEADER];
    let _ = copy_out(&header_slices, &mut header);
    let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let sector = u64::from(word(8)) | u64::from(word(12)) << 32;

    let (status, written) = match word(0) {
        VIRTIO_BLK_T_IN => {
            let count = length(&target);
            match range(sector, count, disk.backend.size()) {
                Some(offset) => match disk.backend.read(offset, &target) {
                    Ok(()) => {
                        metrics.reads += 1;
                        metrics.read_bytes += count;
                        (VIRTIO_BLK_S_OK, count)
                    }
                    Err(error) => failed(metrics, disk.id, "read", offset, &error),
                },
                None => refused(metrics, VIRTIO_BLK_S_IOERR),
            }
        }
        VIRTIO_BLK_T_OUT => {
            let count = length(&source);
            match range(sector, count, disk.backend.size()) {
                Some(offset) if !disk.read_only => {
                    let result = disk.backend.write(offset, &source);
                    let result =
                        if disk.write_through { result.and_then(|()| disk.backend.flush()) } else { result };
                    match result {
                        Ok(()) => {
                            metrics.writes += 1;
                            metrics.write_bytes += count;
                            (VIRTIO_BLK_S_OK, 0)
                        }
                        Err(error) => failed(metrics, disk.id, "write", offset, &error),
                    }
                }
                _ => refused(metrics, VIRTIO_BLK_S_IOERR),
            }
        }
        VIRTIO_BLK_T_DISCARD => clear(disk, Kind::Discard, &source, metrics),
        VIRTIO_BLK_T_WRITE_ZEROES => clear(disk, Kind::Zero, &source, metrics),
        VIRTIO_BLK_T_FLUSH => match disk.backend.flush() {
            Ok(()) => {
                metrics.flushes += 1;
                (VIRTIO_BLK_S_OK, 0)
            }
            Err(error) => failed(metrics, disk.id, "flush", 0, &error),
        },
        VIRTIO_BLK_T_GET_ID => {
            let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
            for (byte, value) in id.iter_mut().zip(disk.id.bytes()) {
                *byte = value;
            }
            let count = copy_in(&target, &id);
            (VIRTIO_BLK_S_OK, count as u64)
        }
        _ => refused(metrics, VIRTIO_BLK_S_UNSUPP),
    };
    let _ = copy_in(&status_slice, &[u8::try_from(status).unwrap_or(u8::MAX)]);
    u32::try_from(written + 1).unwrap_or(u32::MAX)
}

/// Discards or zeroes the ranges that a request lists.
fn clear(disk: &mut Disk<'_>, kind: Kind, source: &[Slice<'_>], metrics: &mut Metrics) -> (u32, u64) {
    let mut bytes = vec![0; ranges::BYTES * (ranges::MAX_DISCARD_RANGES as usize + 1)];
    // A longer list is one that is too long, too.
    let count = copy_out(source, &mut bytes);
    let ranges = match ranges::parse(kind, &bytes[..count], disk.backend.size()) {
        Ok(_) if disk.read_only => return refused(metrics, VIRTIO_BLK_S_IOERR),
        Ok(ranges) => ranges,
        Err(status) => return refused(metrics, status),
    };
    for range in ranges {
        let result = match kind {
            Kind::Discard => disk.backend.discard(range.offset, range.length),
            Kind::Zero => disk.backend.write_zeroes(range.offset, range.length, range.unmap),
        };
        let stable = disk.write_through && kind == Kind::Zero;
        let result = if stable { result.and_then(|()| disk.backend.flush()) } else { result };
        if let Err(error) = result {
            return failed(metrics, disk.id, "clearing", range.offset, &error);
        }
        metrics.cleared_bytes += range.length;
    }
    match kind {
        Kind::Discard => metrics.discards += 1,
        Kind::Zero => metrics.zeroings += 1,
    }
    (VIRTIO_BLK_S_OK, 0)
}

/// The byte offset of a request that is whole sectors and lies inside the disk.
fn range(sector: u64, count: u64, size: u64) -> Option<u64> {
    let offset = sector.checked_mul(SECTOR)?;
    let end = offset.checked_add(count)?;
    (count.is_multiple_of(SECTOR) && end <= size / SECTOR * SECTOR).then_some(offset)
}

fn refused(metrics: &mut Metrics, status: u32) -> (u32, u64) {
    metrics.refused += 1;
    (status, 0)
}

fn failed(metrics: &mut Metrics, id: &str, what: &str, offset: u64, error: &std::io::Error) -> (u32, u64) {
    static LOG: crate::log::Limited = crate::log::Limited::new();
    metrics.failed += 1;
    LOG.line(|| format!("disk {id:?}: {what} at {offset:#x} failed: {error}"));
    (VIRTIO_BLK_S_IOERR, 0)
}
