//! Requests as a guest makes them, against images on disk.

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use imago::FormatCreateBuilder;
use imago::qcow2::Qcow2;
use proptest::prelude::*;

use super::backend::{Backend, Image};
use super::metrics::Metrics;
use super::queue::{Disk, Host, process};
use crate::config::DriveFormat;
use crate::devices::virtio::testing::{Buffer, Driver, hostile, pieces};
use crate::memory::Slice;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut header = kind.to_le_bytes().to_vec();
    header.extend([0; 4]);
    header.extend(sector.to_le_bytes());
    header
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|n| (n * 7 % 251) as u8).collect()
}

fn raw(content: &[u8]) -> (tempfile::NamedTempFile, Image) {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().write_all_at(content, 0).unwrap();
    let image = Image::open(file.reopen().unwrap(), DriveFormat::Raw, None, true).unwrap();
    (file, image)
}

fn here(backend: &mut dyn Backend) -> Disk<'_> {
    let size = backend.size();
    Disk { host: Host::Here(backend), size, read_only: false, write_through: false, pace: None, id: "" }
}

/// Makes one request and returns (status, bytes used, data).
fn ask(
    backend: &mut dyn Backend,
    read_only: bool,
    kind: u32,
    sector: u64,
    source: &[u8],
    target: u32,
) -> (u8, u32, Vec<u8>) {
    let mut driver = Driver::new(16);
    let head = driver.give(&header(kind, sector));
    let data = if source.is_empty() { driver.want(target) } else { driver.give(source) };
    let status = driver.want(1);
    let chain: Vec<Buffer> = [head, data, status].into_iter().filter(|buffer| buffer.length > 0).collect();
    driver.add(&chain);
    let size = backend.size();
    let host = Host::Here(backend);
    let mut disk = Disk { host, size, read_only, write_through: false, pace: None, id: "vol-1" };
    let turn = process(&mut driver.queue(), &driver.memory, &mut disk, &mut Metrics::default()).unwrap();
    assert!(turn.interrupt && !turn.more);
    (driver.read(status)[0], driver.used()[0].1, driver.read(data))
}

#[test]
fn what_is_written_is_read_back_and_is_in_the_file() {
    let (file, mut image) = raw(&[0; 8192]);
    let content = pattern(1024);
    assert_eq!(ask(&mut image, false, OUT, 3, &content, 0).0, OK);
    let (status, used, data) = ask(&mut image, false, IN, 3, &[], 1024);
    assert_eq!((status, used, data), (OK, 1025, content.clone()));
    let mut bytes = vec![0; 1024];
    file.as_file().read_exact_at(&mut bytes, 3 * 512).unwrap();
    assert_eq!(bytes, content);
}

#[test]
fn an_overlay_reads_through_and_never_touches_its_base() {
    let base = tempfile::NamedTempFile::new().unwrap();
    let content = pattern(1 << 20);
    base.as_file().write_all_at(&content, 0).unwrap();
    let overlay = tempfile::NamedTempFile::new().unwrap();
    let storage = imago::file::File::try_from(overlay.reopen().unwrap()).unwrap();
    // The overlay is larger than its base, and names a base that must never be opened.
    Qcow2::<imago::file::File>::create_builder(storage)
        .size(2 << 20)
        .backing("/etc/passwd".into(), "raw".into())
        .create()
        .unwrap();
    let open = || {
        let read_only_base = File::open(base.path()).unwrap();
        Image::open(overlay.reopen().unwrap(), DriveFormat::Qcow2, Some(read_only_base), true).unwrap()
    };
    let mut image = open();
    assert_eq!(image.size(), 2 << 20);
    assert_eq!(ask(&mut image, false, IN, 8, &[], 512).2, content[4096..4608]);
    assert_eq!(ask(&mut image, false, OUT, 8, &[0xaa; 512], 0).0, OK);
    assert_eq!(ask(&mut image, false, OUT, 3000, &[0xbb; 512], 0).0, OK);
    assert_eq!(ask(&mut image, false, FLUSH, 0, &[], 0).0, OK);
    drop(image);
    let mut image = open();
    assert_eq!(ask(&mut image, false, IN, 8, &[], 512).2, [0xaa; 512]);
    assert_eq!(ask(&mut image, false, IN, 9, &[], 512).2, content[4608..5120]);
    assert_eq!(ask(&mut image, false, IN, 3000, &[], 512).2, [0xbb; 512]);
    assert_eq!(ask(&mut image, false, IN, 4000, &[], 512).2, [0; 512]);
    assert_eq!(std::fs::read(base.path()).unwrap(), content);
}

#[test]
fn a_name_inside_an_image_opens_nothing() {
    let overlay = tempfile::NamedTempFile::new().unwrap();
    let storage = imago::file::File::try_from(overlay.reopen().unwrap()).unwrap();
    Qcow2::<imago::file::File>::create_builder(storage)
        .size(1 << 20)
        .backing("/etc/passwd".into(), "raw".into())
        .create()
        .unwrap();
    let base = tempfile::tempfile().unwrap();
    let mut image = Image::open(overlay.reopen().unwrap(), DriveFormat::Qcow2, Some(base), true).unwrap();
    assert_eq!(ask(&mut image, false, IN, 0, &[], 512).2, [0; 512]);
}

#[test]
fn rubbish_is_no_qcow2() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().write_all_at(&[7; 4096], 0).unwrap();
    assert!(Image::open(file.reopen().unwrap(), DriveFormat::Qcow2, None, true).is_err());
}

#[test]
fn what_the_disk_does_not_do_is_answered_as_the_standard_says() {
    let (_file, mut image) = raw(&[0; 8192]);
    for (name, answer, expected) in [
        ("read beyond the end", ask(&mut image, false, IN, 16, &[], 512), IO_ERROR),
        ("read across the end", ask(&mut image, false, IN, 15, &[], 1024), IO_ERROR),
        ("read at the end of the world", ask(&mut image, false, IN, u64::MAX, &[], 512), IO_ERROR),
        ("half a sector", ask(&mut image, false, IN, 0, &[], 100), IO_ERROR),
        ("write beyond the end", ask(&mut image, false, OUT, 16, &[1; 512], 0), IO_ERROR),
        ("write to a read-only disk", ask(&mut image, true, OUT, 0, &[1; 512], 0), IO_ERROR),
        ("an unknown request", ask(&mut image, false, 77, 0, &[], 512), UNSUPPORTED),
        ("a flush", ask(&mut image, false, FLUSH, 0, &[], 0), OK),
    ] {
        assert_eq!(answer.0, expected, "{name}");
        assert_eq!(answer.1, 1, "{name}: only the status is written");
    }
    let (status, used, id) = ask(&mut image, false, GET_ID, 0, &[], 20);
    assert_eq!((status, used), (OK, 21));
    assert_eq!(&id, b"vol-1\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
}

/// A range of a discard or write-zeroes request.
fn range(sector: u64, count: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
}

/// Bytes that a file takes on its file system.
fn allocated(file: &tempfile::NamedTempFile) -> u64 {
    use std::os::unix::fs::MetadataExt;
    file.as_file().sync_all().unwrap();
    file.as_file().metadata().unwrap().blocks() * 512
}

#[test]
fn zeroes_are_written_and_nothing_beside_them() {
    for unmap in [0, 1] {
        let content = pattern(64 << 10);
        let (file, mut image) = raw(&content);
        // Not on any boundary that a file system likes.
        let (status, used, _) = ask(&mut image, false, WRITE_ZEROES, 0, &range(3, 70, unmap), 0);
        assert_eq!((status, used), (OK, 1));
        let after = std::fs::read(file.path()).unwrap();
        assert!(after[..3 * 512] == content[..3 * 512] && after[73 * 512..] == content[73 * 512..]);
        assert!(after[3 * 512..73 * 512].iter().all(|byte| *byte == 0));
    }
}

#[test]
fn discarded_space_goes_back_to_the_host() {
    let (file, mut image) = raw(&pattern(1 << 20));
    let before = allocated(&file);
    let ranges = [range(0, 1024, 0), range(1536, 512, 0)].concat();
    assert_eq!(ask(&mut image, false, DISCARD, 0, &ranges, 0).0, OK);
    let after = allocated(&file);
    assert!(after + (700 << 10) <= before, "{before} bytes before, {after} after");
    assert_eq!(file.as_file().metadata().unwrap().len(), 1 << 20, "the disk keeps its size");
    assert_eq!(ask(&mut image, false, IN, 1024, &[], 512).2, pattern(1 << 20)[1024 * 512..1025 * 512]);
}

#[test]
fn an_overlay_zeroes_what_its_base_holds() {
    let base = tempfile::NamedTempFile::new().unwrap();
    base.as_file().write_all_at(&pattern(1 << 20), 0).unwrap();
    let overlay = tempfile::NamedTempFile::new().unwrap();
    let storage = imago::file::File::try_from(overlay.reopen().unwrap()).unwrap();
    Qcow2::<imago::file::File>::create_builder(storage)
        .size(1 << 20)
        .backing("base".into(), "raw".into())
        .create()
        .unwrap();
    let file = File::open(base.path()).unwrap();
    let mut image = Image::open(overlay.reopen().unwrap(), DriveFormat::Qcow2, Some(file), true).unwrap();
    for (sector, unmap) in [(1, 0), (300, 1), (1024, 1)] {
        assert_eq!(ask(&mut image, false, WRITE_ZEROES, 0, &range(sector, 256, unmap), 0).0, OK);
        assert_eq!(ask(&mut image, false, IN, sector, &[], 256 * 512).2, vec![0; 256 * 512]);
    }
    assert_eq!(ask(&mut image, false, DISCARD, 0, &range(1024, 256, 0), 0).0, OK);
    assert_eq!(ask(&mut image, false, IN, 0, &[], 512).2, pattern(1 << 20)[..512]);
    assert_eq!(std::fs::read(base.path()).unwrap(), pattern(1 << 20));
}

#[test]
fn ranges_that_do_not_fit_change_nothing() {
    let content = pattern(8192);
    let (file, mut image) = raw(&content);
    let good = range(0, 8, 0);
    for (name, answer, expected) in [
        ("read-only", ask(&mut image, true, WRITE_ZEROES, 0, &good, 0), IO_ERROR),
        ("beyond the end", ask(&mut image, false, WRITE_ZEROES, 0, &range(16, 1, 0), 0), IO_ERROR),
        ("across the end", ask(&mut image, false, DISCARD, 0, &range(15, 2, 0), 0), IO_ERROR),
        ("one of two", ask(&mut image, false, DISCARD, 0, &[good, range(99, 1, 0)].concat(), 0), IO_ERROR),
        ("flags", ask(&mut image, false, DISCARD, 0, &range(0, 8, 1), 0), UNSUPPORTED),
        ("nothing", ask(&mut image, false, DISCARD, 0, &[], 16), IO_ERROR),
    ] {
        assert_eq!((answer.0, answer.1), (expected, 1), "{name}");
    }
    assert_eq!(std::fs::read(file.path()).unwrap(), content);
}

#[test]
fn a_last_half_sector_of_a_file_is_no_part_of_the_disk() {
    let (_file, mut image) = raw(&[0; 1024 + 100]);
    assert_eq!(ask(&mut image, false, IN, 1, &[], 512).0, OK);
    assert_eq!(ask(&mut image, false, IN, 2, &[], 512).0, IO_ERROR);
}

/// Counts flushes and can fail.
struct Faulty {
    flushes: Cell<u32>,
    broken: bool,
}

impl Backend for Faulty {
    fn size(&self) -> u64 {
        4096
    }
    fn read(&self, _: u64, _: &[Slice<'_>]) -> io::Result<()> {
        if self.broken { Err(io::Error::other("broken")) } else { Ok(()) }
    }
    fn write(&self, _: u64, _: &[Slice<'_>]) -> io::Result<()> {
        self.read(0, &[])
    }
    fn discard(&mut self, _: u64, _: u64) -> io::Result<()> {
        self.read(0, &[])
    }
    fn write_zeroes(&mut self, _: u64, _: u64, _: bool) -> io::Result<()> {
        self.read(0, &[])
    }
    fn flush(&self) -> io::Result<()> {
        self.flushes.set(self.flushes.get() + 1);
        self.read(0, &[])
    }
}

#[test]
fn the_hosts_errors_reach_the_guest() {
    let disk = Faulty { flushes: Cell::new(0), broken: true };
    // Faulty is used from one thread only.
    let mut disk = OneThread(disk);
    for kind in [IN, OUT, FLUSH, DISCARD, WRITE_ZEROES] {
        let range = range(0, 8, 0);
        let source: &[u8] = match kind {
            OUT => &[1; 512],
            DISCARD | WRITE_ZEROES => &range,
            _ => &[],
        };
        assert_eq!(ask(&mut disk, false, kind, 0, source, if kind == IN { 512 } else { 0 }).0, IO_ERROR);
    }
}

struct OneThread(Faulty);

impl Backend for OneThread {
    fn size(&self) -> u64 {
        self.0.size()
    }
    fn read(&self, offset: u64, target: &[Slice<'_>]) -> io::Result<()> {
        self.0.read(offset, target)
    }
    fn write(&self, offset: u64, source: &[Slice<'_>]) -> io::Result<()> {
        self.0.write(offset, source)
    }
    fn discard(&mut self, offset: u64, length: u64) -> io::Result<()> {
        self.0.discard(offset, length)
    }
    fn write_zeroes(&mut self, offset: u64, length: u64, unmap: bool) -> io::Result<()> {
        self.0.write_zeroes(offset, length, unmap)
    }
    fn flush(&self) -> io::Result<()> {
        self.0.flush()
    }
}

#[test]
fn a_guest_without_flush_gets_stable_writes() {
    for (write_through, flushes) in [(true, 1), (false, 0)] {
        let mut backend = OneThread(Faulty { flushes: Cell::new(0), broken: false });
        let mut driver = Driver::new(16);
        let chain = [driver.give(&header(OUT, 0)), driver.give(&[1; 512]), driver.want(1)];
        driver.add(&chain);
        let mut disk = Disk { write_through, ..here(&mut backend) };
        process(&mut driver.queue(), &driver.memory, &mut disk, &mut Metrics::default()).unwrap();
        assert_eq!(backend.0.flushes.get(), flushes);
    }
}

#[test]
fn a_chain_without_room_for_a_status_is_returned_unanswered() {
    let (_file, mut image) = raw(&[0; 4096]);
    let mut driver = Driver::new(16);
    let chain = [driver.give(&header(OUT, 0)), driver.give(&[1; 512])];
    driver.add(&chain);
    let short = [driver.give(&[0; 15]), driver.want(1)];
    driver.add(&short);
    let mut disk = here(&mut image);
    let mut metrics = Metrics::default();
    process(&mut driver.queue(), &driver.memory, &mut disk, &mut metrics).unwrap();
    assert_eq!(driver.used(), [(0, 0), (2, 0)]);
    assert_eq!(metrics.refused, 2);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// virtio 1.2, 2.7.4: the device must not care how a request is cut into descriptors.
    #[test]
    fn framing_does_not_matter(head in pieces(16), data in pieces(1024), tail in pieces(1025)) {
        let content = pattern(1024);
        let (_file, mut image) = raw(&[0; 4096]);
        let mut disk = here(&mut image);
        let mut driver = Driver::new(64);
        let give = |driver: &mut Driver, bytes: &[u8], cuts: &[usize]| {
            let mut at = 0;
            cuts.iter().map(|cut| { at += cut; driver.give(&bytes[at - cut..at]) }).collect::<Vec<_>>()
        };
        let mut chain = give(&mut driver, &header(OUT, 1), &head);
        chain.extend(give(&mut driver, &content, &data));
        let status = driver.want(1);
        chain.push(status);
        driver.add(&chain);
        let mut chain = give(&mut driver, &header(IN, 1), &head);
        let wanted: Vec<Buffer> = tail.iter().map(|length| driver.want(u32::try_from(*length).unwrap())).collect();
        chain.extend(&wanted);
        driver.add(&chain);
        process(&mut driver.queue(), &driver.memory, &mut disk, &mut Metrics::default()).unwrap();
        prop_assert_eq!(driver.read(status), vec![OK]);
        let mut read: Vec<u8> = wanted.iter().flat_map(|buffer| driver.read(*buffer)).collect();
        prop_assert_eq!(read.pop(), Some(OK));
        prop_assert_eq!(read, content);
        prop_assert_eq!(driver.used()[1].1, 1025);
    }

    /// Whatever a guest writes into its queue: no panic, no endless loop.
    #[test]
    fn a_hostile_queue_is_survived(queue in hostile()) {
        let (_file, mut image) = raw(&[0; 4096]);
        let mut disk = here(&mut image);
        let driver = Driver::new(16);
        queue.write(&driver);
        let _ = process(&mut driver.queue(), &driver.memory, &mut disk, &mut Metrics::default());
    }
}
