//! What must hold of a qcow2 image before it is opened: the image may be anybody's, and the driver trusts some of it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Sizes of clusters that the driver takes, powers of two.
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
/// Bits of a reference count table's entry that are the block's place (QEMU's docs/interop/qcow2.txt).
const PLACE: u64 = !0x1ff;

/// Refuses an image whose own first cluster is free by its reference counts: new clusters would be put over its header, and
/// imago 0.2.6, to which a block of counts at 0 is one that is not there, looks for room for it until its stack is full.
///
/// Returns the bytes of a cluster.
///
/// # Errors
/// What is wrong, or the host's error.
pub fn check(file: &File) -> io::Result<u64> {
    let broken = |what: String| io::Error::new(io::ErrorKind::InvalidData, format!("qcow2: {what}"));
    let read = |at: u64, bytes: &mut [u8]| {
        file.read_exact_at(bytes, at)
            .map_err(|error| broken(format!("{} bytes at {at:#x}: {error}", bytes.len())))
    };
    let mut header = [0; 72];
    read(0, &mut header)?;
    if header[..4] != MAGIC {
        return Err(broken("wrong magic".into()));
    }
    let cluster_bits = u32::from_be_bytes([header[20], header[21], header[22], header[23]]);
    if !CLUSTER_BITS.contains(&cluster_bits) {
        return Err(broken(format!("clusters of 2^{cluster_bits} bytes")));
    }
    let table = u64_at(&header, 48);
    let mut entry = [0; 8];
    read(table, &mut entry)?;
    let block = u64::from_be_bytes(entry) & PLACE;
    // Up to version 2 a count has 16 bits, later 1 << order of them; of those below 8 the first one is the lowest.
    let mut order = [0, 0, 0, 4];
    if header[4..8] != [0, 0, 0, 2] {
        read(96, &mut order)?;
    }
    let bits = 1_u64.checked_shl(u32::from_be_bytes(order)).filter(|bits| (1..=64).contains(bits));
    let bits =
        bits.ok_or_else(|| broken(format!("reference counts of order {}", u32::from_be_bytes(order))))?;
    let mut count = [0; 8];
    let count = &mut count[..usize::try_from(bits.div_ceil(8)).unwrap_or(8)];
    read(block, count)?;
    if bits < 8 {
        count[0] &= (1 << bits) - 1;
    }
    if table == 0 || block == 0 || count.iter().all(|byte| *byte == 0) {
        return Err(broken("the image's own first cluster has no reference count".into()));
    }
    Ok(1 << cluster_bits)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::DriveFormat;
    use crate::devices::virtio::block::backend::{Backend, Image};
    use crate::memory::slice_of;
    use imago::FormatCreateBuilder;
    use imago::qcow2::Qcow2;

    /// An image of 1 MiB; where its table of counts is, and its first block of them.
    fn image() -> (tempfile::NamedTempFile, u64, u64) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let storage = imago::file::File::try_from(file.reopen().unwrap()).unwrap();
        Qcow2::<imago::file::File>::create_builder(storage).size(1 << 20).create().unwrap();
        let word = |at| {
            let mut bytes = [0; 8];
            file.as_file().read_exact_at(&mut bytes, at).unwrap();
            u64::from_be_bytes(bytes)
        };
        let table = word(48);
        let block = word(table);
        (file, table, block)
    }

    fn open(file: &tempfile::NamedTempFile) -> io::Result<Image> {
        Image::open(file.reopen()?, DriveFormat::Qcow2, None, true)
    }

    #[test]
    fn an_image_that_counts_its_clusters_is_opened_and_written() {
        let (file, ..) = image();
        let image = open(&file).unwrap();
        let mut bytes = [7; 512];
        image.write(0, &[slice_of(&mut bytes[..])]).unwrap();
        let mut read = [0; 512];
        image.read(0, &[slice_of(&mut read[..])]).unwrap();
        assert_eq!(read, bytes);
    }

    /// Found by the fuzz target `qcow2`, too.
    #[test]
    fn zeroing_a_part_of_a_disk_smaller_than_a_cluster_leaves_the_rest() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let storage = imago::file::File::try_from(file.reopen().unwrap()).unwrap();
        Qcow2::<imago::file::File>::create_builder(storage).size(32 << 10).create().unwrap();
        let mut image = open(&file).unwrap();
        for unmap in [false, true] {
            image.write(0, &[slice_of(&mut [7; 32 << 10][..])]).unwrap();
            image.write_zeroes(8 << 10, 8 << 10, unmap).unwrap();
            let mut read = vec![1; 32 << 10];
            image.read(0, &[slice_of(&mut read[..])]).unwrap();
            let expected = [vec![7; 8 << 10], vec![0; 8 << 10], vec![7; 16 << 10]].concat();
            assert!(read == expected, "unmap {unmap}");
        }
        for offset in [0, 512, 32 << 10] {
            image.write_zeroes(offset, 0, true).unwrap();
        }
    }

    /// Found by the fuzz target `qcow2`: the first write went round until the stack was full.
    #[test]
    fn one_whose_first_cluster_is_free_is_refused() {
        type Damage = fn(table: u64, block: u64) -> (u64, Vec<u8>);
        let damage: [Damage; 5] = [
            |table, _| (table, vec![0; 8]),
            |_, block| (block, vec![0; 2]),
            |_, _| (48, vec![0; 8]),
            |_, _| (48, vec![0x7f; 8]),
            |_, _| (96, vec![0, 0, 0, 7]),
        ];
        for damage in damage {
            let (file, table, block) = image();
            let (at, bytes) = damage(table, block);
            file.as_file().write_all_at(&bytes, at).unwrap();
            let error = open(&file).unwrap_err();
            assert!(error.to_string().starts_with("qcow2: "), "{at:#x}: {error}");
        }
    }
}
