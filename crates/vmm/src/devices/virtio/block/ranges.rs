//! Discard and write-zeroes requests (virtio 1.2, 5.2.6): lists of ranges instead of data.

use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP};

use super::queue::SECTOR;

/// Ranges of one discard request at most.
pub const MAX_DISCARD_RANGES: u32 = 64;
/// Sectors of one discarded range at most: 2 GiB, which costs the host one call.
pub const MAX_DISCARD_SECTORS: u32 = 4 << 20;
/// Ranges of one write-zeroes request at most.
pub const MAX_ZERO_RANGES: u32 = 1;
/// Sectors of one zeroed range at most: 32 MiB, as for writes, as a host that cannot make holes writes them.
pub const MAX_ZERO_SECTORS: u32 = 64 << 10;
/// Bytes of a range in a request.
pub const BYTES: usize = 16;
/// Flag: the space may be given back.
const UNMAP: u32 = 1;

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The guest does not need the content any more.
    Discard,
    /// The guest wants zeroes.
    Zero,
}

/// A range inside the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// Bytes from the disk's begin.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
    /// The space may be given back.
    pub unmap: bool,
}

/// Reads the ranges of a request; every one is checked before the first is touched.
///
/// # Errors
/// The status that the guest gets.
pub fn parse(kind: Kind, bytes: &[u8], disk_bytes: u64) -> Result<Vec<Range>, u32> {
    let (most, most_sectors, flags) = match kind {
        Kind::Discard => (MAX_DISCARD_RANGES, MAX_DISCARD_SECTORS, 0),
        Kind::Zero => (MAX_ZERO_RANGES, MAX_ZERO_SECTORS, UNMAP),
    };
    let (ranges, rest) = bytes.as_chunks::<BYTES>();
    if ranges.is_empty() || ranges.len() > most as usize || !rest.is_empty() {
        return Err(VIRTIO_BLK_S_IOERR);
    }
    ranges
        .iter()
        .map(|range| {
            let word =
                |at: usize| u32::from_le_bytes([range[at], range[at + 1], range[at + 2], range[at + 3]]);
            let sector = u64::from(word(0)) | u64::from(word(4)) << 32;
            let (count, given) = (word(8), word(12));
            // virtio 1.2, 5.2.6.2: unknown flags, and unmap in a discard, are not supported.
            if given & !flags != 0 {
                return Err(VIRTIO_BLK_S_UNSUPP);
            }
            let end = sector.checked_add(u64::from(count)).ok_or(VIRTIO_BLK_S_IOERR)?;
            if count > most_sectors || end > disk_bytes / SECTOR {
                return Err(VIRTIO_BLK_S_IOERR);
            }
            Ok(Range {
                offset: sector * SECTOR,
                length: u64::from(count) * SECTOR,
                unmap: given & UNMAP != 0,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn range(sector: u64, count: u32, flags: u32) -> Vec<u8> {
        [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
    }

    #[test]
    fn the_limits_are_where_the_configuration_space_says() {
        let (disk, far) = (16 << 30, u64::MAX);
        for (kind, bytes, expected) in [
            (Kind::Discard, range(0, MAX_DISCARD_SECTORS, 0), None),
            (Kind::Discard, range(0, MAX_DISCARD_SECTORS + 1, 0), Some(VIRTIO_BLK_S_IOERR)),
            (Kind::Discard, range(0, 8, UNMAP), Some(VIRTIO_BLK_S_UNSUPP)),
            (Kind::Discard, range(0, 8, 0).repeat(64), None),
            (Kind::Discard, range(0, 8, 0).repeat(65), Some(VIRTIO_BLK_S_IOERR)),
            (Kind::Zero, range(0, MAX_ZERO_SECTORS, 1), None),
            (Kind::Zero, range(0, MAX_ZERO_SECTORS + 1, 0), Some(VIRTIO_BLK_S_IOERR)),
            (Kind::Zero, range(0, 8, 2), Some(VIRTIO_BLK_S_UNSUPP)),
            (Kind::Zero, range(0, 8, 0).repeat(2), Some(VIRTIO_BLK_S_IOERR)),
            (Kind::Zero, range(disk / 512, 1, 0), Some(VIRTIO_BLK_S_IOERR)),
            (Kind::Zero, range(disk / 512 - 1, 1, 0), None),
            (Kind::Zero, range(far, 1, 0), Some(VIRTIO_BLK_S_IOERR)),
            (Kind::Zero, range(far / 512, 1, 0), Some(VIRTIO_BLK_S_IOERR)),
            (Kind::Zero, Vec::new(), Some(VIRTIO_BLK_S_IOERR)),
            (Kind::Zero, vec![0; 15], Some(VIRTIO_BLK_S_IOERR)),
            (Kind::Zero, vec![0; 17], Some(VIRTIO_BLK_S_IOERR)),
        ] {
            assert_eq!(parse(kind, &bytes, disk).err(), expected, "{kind:?} {bytes:?}");
        }
    }

    proptest! {
        /// Whatever bytes a guest writes: what is taken lies inside the disk.
        #[test]
        fn what_is_taken_lies_inside_the_disk(
            bytes in proptest::collection::vec(any::<u8>(), 0..100), sectors in 0..5000_u64, zero in any::<bool>()
        ) {
            let kind = if zero { Kind::Zero } else { Kind::Discard };
            for range in parse(kind, &bytes, sectors * 512).unwrap_or_default() {
                prop_assert!(range.offset + range.length <= sectors * 512);
            }
        }
    }
}
