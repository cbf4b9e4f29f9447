//! What must hold of a qcow2 image before it is opened: the image may be anybody's, and the driver trusts some of it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Sizes of clusters that the driver takes, powers of two.
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
/// Bits of a reference count table's entry that are the block's place (QEMU's docs/interop/qcow2.txt).
const PLACE: u64 = !0x1ff;

/// Refused incompatible features by bit (QEMU's docs/interop/qcow2.txt).
const REFUSED: [&str; 5] = [
    "was not closed cleanly (dirty bit): `qemu-img check -r leaks IMAGE` mends it",
    "is marked corrupt: `qemu-img check -r all IMAGE` mends what can be mended",
    "keeps its data in another file: `qemu-img convert -O qcow2 IMAGE NEW` makes one file of them",
    "uses another compression than zlib: `qemu-img convert -O qcow2 IMAGE NEW` unpacks it",
    "has extended L2 entries: `qemu-img convert -O qcow2 -o extended_l2=off IMAGE NEW` makes one without",
];
/// Longest name of a backing file.
const MAX_NAME: u32 = 1023;

/// Refuses an image that the driver would misread: an encrypted image, one with unsupported
/// features, or an overlay without a given base. The base is read as raw, and must be no qcow2
/// image.
fn check_kind(header: &[u8; 72], file: &File, base: Option<&File>) -> io::Result<()> {
    let refuse =
        |what: &str| Err(io::Error::new(io::ErrorKind::Unsupported, format!("the qcow2 image {what}")));
    let encryption = u32_at(header, 32);
    if encryption != 0 {
        let method = ["AES", "LUKS"].get(encryption as usize - 1).copied().unwrap_or("an unknown method");
        return refuse(&format!(
            "is encrypted ({method}), which is not taken: `qemu-img convert` with its key makes a plain one"
        ));
    }
    let version = u32_at(header, 4);
    let mut features = [0; 8];
    if version >= 3 {
        file.read_exact_at(&mut features, 72)?;
    }
    let features = u64::from_be_bytes(features);
    if features != 0 {
        let bit = features.trailing_zeros();
        return match REFUSED.get(bit as usize) {
            Some(what) => refuse(what),
            None => refuse(&format!("has incompatible feature {bit}, which is unknown here")),
        };
    }
    let snapshots = u32_at(header, 60);
    if snapshots != 0 {
        return refuse(&format!(
            "holds {snapshots} internal snapshots, which are not taken: `qemu-img snapshot -d NAME IMAGE` removes one"
        ));
    }
    let place = u64_at(header, 8);
    if place != 0 && base.is_none() {
        let mut name = vec![0; u32_at(header, 16).min(MAX_NAME) as usize];
        let name = file.read_exact_at(&mut name, place).map(|()| String::from_utf8_lossy(&name).into_owned());
        return refuse(&format!(
            "is an overlay on {:?}, and no base is given: `backing` names one",
            name.unwrap_or_default()
        ));
    }
    let mut first = [0; 4];
    if let Some(base) = base
        && base.read_exact_at(&mut first, 0).is_ok()
        && first == MAGIC
    {
        return refuse(
            "lies on another qcow2 image: a base must be raw, which `qemu-img convert -O raw BASE NEW` makes",
        );
    }
    Ok(())
}

/// Refuses an image of an unsupported kind, and an image whose reference counts declare its first
/// cluster free. The driver would allocate new clusters over the header of the latter. Also, imago
/// 0.2.6 reads a refcount block at offset 0 as absent, and searches for room until its stack is
/// full.
///
/// Returns the bytes of a cluster.
///
/// # Errors
/// What is wrong, or the host's error.
pub fn check(file: &File, base: Option<&File>) -> io::Result<u64> {
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
    check_kind(&header, file, base)?;
    let cluster_bits = u32_at(&header, 20);
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

fn u32_at(bytes: &[u8; 72], at: usize) -> u32 {
    bytes[at..at + 4].iter().fold(0, |value, byte| value << 8 | u32::from(*byte))
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

    #[test]
    fn what_would_be_read_as_what_it_is_not_is_refused_by_name() {
        for (at, bytes, words) in [
            (32, &1_u32.to_be_bytes()[..], "is encrypted (AES)"),
            (32, &2_u32.to_be_bytes(), "is encrypted (LUKS)"),
            (32, &3_u32.to_be_bytes(), "is encrypted (an unknown method)"),
            (72, &1_u64.to_be_bytes(), "dirty bit"),
            (72, &2_u64.to_be_bytes(), "marked corrupt"),
            (72, &4_u64.to_be_bytes(), "keeps its data in another file"),
            (72, &8_u64.to_be_bytes(), "another compression than zlib"),
            (72, &16_u64.to_be_bytes(), "extended L2 entries"),
            (72, &(1_u64 << 63).to_be_bytes(), "incompatible feature 63"),
            (60, &2_u32.to_be_bytes(), "holds 2 internal snapshots"),
        ] {
            let (file, ..) = image();
            file.as_file().write_all_at(bytes, at).unwrap();
            let error = open(&file).unwrap_err().to_string();
            assert!(error.starts_with("the qcow2 image ") && error.contains(words), "{at}: {error}");
        }
    }

    #[test]
    fn an_overlay_without_a_base_or_on_another_overlay_is_refused_by_name() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let storage = imago::file::File::try_from(file.reopen().unwrap()).unwrap();
        let builder = Qcow2::<imago::file::File>::create_builder(storage).size(1 << 20);
        builder.backing("debian.raw".into(), "raw".into()).create().unwrap();
        let error = open(&file).unwrap_err().to_string();
        assert!(error.contains("overlay on \"debian.raw\"") && error.contains("`backing`"), "{error}");

        let (base, ..) = image();
        let on = |base: File| Image::open(file.reopen().unwrap(), DriveFormat::Qcow2, Some(base), true);
        let error = on(base.reopen().unwrap()).unwrap_err().to_string();
        assert!(error.contains("a base must be raw"), "{error}");
        on(tempfile::tempfile().unwrap()).unwrap();
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
