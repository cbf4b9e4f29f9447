//! Requests that are finished later: with an engine that finishes in any order, and with both real ones.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use virtio_queue::Queue;
use vm_memory::{GuestAddress, GuestMemoryBackend};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::SharedImage;
use super::backend::Image;
use super::clear::PUNCH;
use super::engine::{Engine, ROOM, Work};
use super::flying::InFlight;
use super::metrics::Metrics;
use super::queue::{Disk, Host, complete, process};
use super::ranges::{Kind, Range};
use super::uring::Ring;
use super::worker::Worker;
use crate::config::DriveFormat;
use crate::devices::virtio::testing::{Buffer, Driver, hostile};
use crate::memory::{Memory, Slice};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const ZEROES: u32 = 13;
const DISK_BYTES: u64 = 1 << 20;

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

/// Keeps work until it is told to finish some.
#[derive(Default)]
struct Patient {
    kept: Vec<(u16, u64)>,
    done: VecDeque<(u16, io::Result<()>)>,
}

impl Patient {
    fn finish(&mut self, which: usize, result: io::Result<()>) {
        let (token, _) = self.kept.remove(which % self.kept.len());
        self.done.push_back((token, result));
    }
}

impl Engine for Patient {
    fn attach(&mut self, _: &Memory) {}
    fn submit(&mut self, token: u16, work: Work<Vec<Slice<'_>>>) {
        assert!(self.kept.iter().all(|(other, _)| *other != token), "token {token} names two");
        let offset = match work {
            Work::Read { offset, .. } | Work::Write { offset, .. } => offset,
            _ => u64::MAX,
        };
        self.kept.push((token, offset));
        assert!(self.kept.len() <= ROOM);
    }
    fn start(&mut self) {}
    fn finished(&mut self) -> Option<(u16, io::Result<()>)> {
        self.done.pop_front()
    }
    fn wait_all(&mut self) {
        (0..self.kept.len()).for_each(|_| self.finish(0, Ok(())));
    }
}

/// One look at a queue, and at what is finished.
fn turn(
    queue: &mut Queue,
    driver: &Driver,
    engine: &mut dyn Engine,
    flying: &mut InFlight,
    metrics: &mut Metrics,
) -> bool {
    let queues = std::slice::from_mut(queue);
    let before = complete(queues, &driver.memory, (engine, flying), "d", metrics).unwrap();
    let mut disk = Disk {
        host: Host::Beside(engine, flying, 0),
        size: DISK_BYTES,
        read_only: false,
        write_through: false,
        pace: None,
        id: "d",
    };
    process(&mut queues[0], &driver.memory, &mut disk, metrics).unwrap();
    engine.start();
    before | complete(queues, &driver.memory, (engine, flying), "d", metrics).unwrap()
}

fn read(driver: &mut Driver, sector: u64, length: u32) -> (u16, Buffer, Buffer) {
    let header = driver.give(&header(IN, sector));
    let (data, status) = (driver.want(length), driver.want(1));
    (driver.add(&[header, data, status]), data, status)
}

proptest! {
    /// In whatever order the host finishes: each chain goes back once, with its own answer, when its own work is done.
    #[test]
    fn each_chain_goes_back_when_its_own_work_is_done(
        order in proptest::collection::vec((0..40_usize, any::<bool>()), 1..40), room in 1..8_usize,
    ) {
        let mut driver = Driver::new(256);
        let (mut engine, mut flying, mut metrics) = (Patient::default(), InFlight::default(), Metrics::default());
        let mut queue = driver.queue();
        let requests: Vec<_> = (0..order.len()).map(|n| read(&mut driver, n as u64, 512)).collect();
        // So many of the guest's own are there already that few have room.
        for n in 0..ROOM - room {
            let ticket = super::flying::Ticket {
                head: 0, status: GuestAddress(0), what: super::flying::What::Flush, offset: n as u64, bytes: 0,
            };
            flying.add(0, ticket).unwrap();
        }
        let mut expected = Vec::new();
        turn(&mut queue, &driver, &mut engine, &mut flying, &mut metrics);
        for (which, good) in &order {
            prop_assert!(!engine.kept.is_empty() && engine.kept.len() <= room);
            let n = (engine.kept[which % engine.kept.len()].1 / 512) as usize;
            engine.finish(*which, if *good { Ok(()) } else { Err(io::Error::other("broken")) });
            let interrupt = turn(&mut queue, &driver, &mut engine, &mut flying, &mut metrics);
            prop_assert!(interrupt);
            expected.push((u32::from(requests[n].0), if *good { 513 } else { 1 }));
            prop_assert_eq!(driver.used(), expected.clone());
            prop_assert_eq!(driver.read(requests[n].2), vec![u8::from(!good)]);
        }
        prop_assert!(engine.kept.is_empty());
        prop_assert_eq!(metrics.reads + metrics.failed, order.len() as u64);
    }

    /// Whatever a guest writes into its queue, while requests of others are under way: no panic, no endless loop.
    #[test]
    fn a_hostile_queue_is_survived(queue in hostile(), again in hostile()) {
        let driver = Driver::new(16);
        let (mut engine, mut flying, mut metrics) = (Patient::default(), InFlight::default(), Metrics::default());
        let mut seen = driver.queue();
        for hostile in [queue, again] {
            hostile.write(&driver);
            let host = Host::Beside(&mut engine, &mut flying, 0);
            let mut disk = Disk { host, size: 4096, read_only: false, write_through: false, pace: None, id: "" };
            let _ = process(&mut seen, &driver.memory, &mut disk, &mut metrics);
        }
        engine.wait_all();
        let work = (&mut engine as &mut dyn Engine, &mut flying);
        let _ = complete(std::slice::from_mut(&mut seen), &driver.memory, work, "", &mut metrics);
        prop_assert!(flying.is_empty());
    }
}

/// A guest that offers one chain again and again, without waiting for it, gets no more than there is room for.
#[test]
fn the_same_head_many_times_has_no_more_room_than_others() {
    let mut driver = Driver::new(256);
    let (mut engine, mut flying, mut metrics) = (Patient::default(), InFlight::default(), Metrics::default());
    let mut queue = driver.queue();
    read(&mut driver, 0, 512);
    for _ in 0..250 {
        driver.offer_again(0);
    }
    turn(&mut queue, &driver, &mut engine, &mut flying, &mut metrics);
    assert_eq!((engine.kept.len(), flying.take_stalled()), (ROOM, 1));
    engine.wait_all();
    turn(&mut queue, &driver, &mut engine, &mut flying, &mut metrics);
    engine.wait_all();
    turn(&mut queue, &driver, &mut engine, &mut flying, &mut metrics);
    assert_eq!((driver.used().len(), metrics.reads, flying.is_empty()), (251, 251, true));
}

fn image(content: &[u8]) -> (File, SharedImage) {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(content, 0).unwrap();
    let image = Image::open(file.try_clone().unwrap(), DriveFormat::Raw, None, true).unwrap();
    (file, Arc::new(Mutex::new(Box::new(image))))
}

/// Both engines, each with what tells of finished work and the file that it works on.
fn engines() -> Vec<(&'static str, Box<dyn Engine>, File, File)> {
    let content: Vec<u8> = (0..DISK_BYTES).map(|n| (n / 512) as u8).collect();
    let mut engines: Vec<(&str, Box<dyn Engine>, File, File)> = Vec::new();
    let (bell, (file, shared)) = (EventFd::new(libc::EFD_NONBLOCK).unwrap(), image(&content));
    let worker = Worker::new(shared, bell.try_clone().unwrap()).unwrap();
    engines.push(("a thread", Box::new(worker), again(bell.as_raw_fd()), file));
    let (file, _) = image(&content);
    match Ring::new(&file) {
        Ok(ring) => {
            let bell = again(ring.descriptor().unwrap());
            engines.push(("io_uring", Box::new(ring), bell, file));
        }
        Err(error) => eprintln!("not tested, as this host has no io_uring for us: {error}"),
    }
    engines
}

/// The same descriptor once more.
fn again(descriptor: RawFd) -> File {
    // SAFETY: the caller has it open.
    let borrowed = unsafe { std::os::fd::BorrowedFd::borrow_raw(descriptor) };
    borrowed.try_clone_to_owned().unwrap().into()
}

/// Whether there is something within so many milliseconds.
fn tells(bell: &File, within: i32) -> bool {
    let mut poll = libc::pollfd { fd: bell.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd, which lives until the call returns.
    unsafe { libc::poll(&raw mut poll, 1, within) == 1 }
}

/// Waits for finished work.
fn wait(mut bell: &File) {
    assert!(tells(bell, 20_000), "nobody tells");
    // A ring is not read: its entries are taken.
    let _ = bell.read(&mut [0; 8]);
}

#[test]
fn real_engines_read_write_zero_and_flush() {
    for (name, mut engine, bell, file) in engines() {
        let mut driver = Driver::new(256);
        let mut queue = driver.queue();
        let (mut flying, mut metrics) = (InFlight::default(), Metrics::default());
        engine.attach(&driver.memory);
        let reads: Vec<_> = (0..40_u64).map(|n| (n, read(&mut driver, n, 512))).collect();
        // In three pieces, one of them of one byte.
        let head = driver.give(&header(IN, 100));
        let pieces: Vec<Buffer> = [1, 700, 835].map(|length| driver.want(length)).to_vec();
        let status = driver.want(1);
        driver.add(&[&[head][..], &pieces, &[status]].concat());
        let chain = [
            driver.give(&header(OUT, 200)),
            driver.give(&[0xaa; 500]),
            driver.give(&[0xbb; 524]),
            driver.want(1),
        ];
        driver.add(&chain);
        let range = [&300_u64.to_le_bytes()[..], &2_u32.to_le_bytes(), &[0; 4]].concat();
        let zero = [driver.give(&header(ZEROES, 0)), driver.give(&range), driver.want(1)];
        driver.add(&zero);
        let flush = [driver.give(&header(FLUSH, 0)), driver.want(1)];
        driver.add(&flush);
        let beyond = read(&mut driver, DISK_BYTES / 512, 512);

        let start = Instant::now();
        turn(&mut queue, &driver, engine.as_mut(), &mut flying, &mut metrics);
        while !flying.is_empty() {
            wait(&bell);
            turn(&mut queue, &driver, engine.as_mut(), &mut flying, &mut metrics);
            assert!(start.elapsed() < Duration::from_secs(20), "{name}: {flying:?}");
        }
        assert_eq!(driver.used().len(), 45, "{name}");
        for (n, (_, data, status)) in reads {
            assert_eq!((driver.read(data), driver.read(status)), (vec![n as u8; 512], vec![0]), "{name}");
        }
        let scattered: Vec<u8> = pieces.iter().flat_map(|piece| driver.read(*piece)).collect();
        assert_eq!(scattered, [[100; 512], [101; 512], [102; 512]].concat(), "{name}");
        let statuses = [status, chain[3], zero[2], flush[1], beyond.2].map(|at| driver.read(at)[0]);
        assert_eq!(statuses, [0, 0, 0, 0, 1], "{name}");
        let mut bytes = [0; 2048];
        file.read_exact_at(&mut bytes, 200 * 512).unwrap();
        assert_eq!(bytes[..1024], [&[0xaa; 500][..], &[0xbb; 524]].concat(), "{name}");
        file.read_exact_at(&mut bytes, 299 * 512).unwrap();
        assert!(bytes[510..1540] == [&[43; 2][..], &[0; 1024], &[46; 4]].concat(), "{name}");
        assert_eq!(
            (metrics.reads, metrics.writes, metrics.zeroings, metrics.flushes),
            (41, 1, 1, 1),
            "{name}"
        );
        assert_eq!((metrics.refused, metrics.failed), (1, 0), "{name}");
    }
}

/// Whoever submits a discard or zeroes does not wait for the host: nothing is done before it is begun, and the bell tells of the end.
#[test]
fn engines_clear_beside_who_asks() {
    for (name, mut engine, bell, file) in engines() {
        for (token, (kind, unmap)) in
            (0..).zip([(Kind::Discard, false), (Kind::Zero, false), (Kind::Zero, true)])
        {
            let offset = 4096 + u64::from(token) * (256 << 10);
            let ranges = vec![Range { offset, length: 128 << 10, unmap }; 2];
            engine.submit(token, Work::Clear { kind, ranges, stable: true });
            assert!(engine.finished().is_none(), "{name}: the submission did the work");
        }
        engine.start();
        let mut done = Vec::new();
        while done.len() < 3 {
            wait(&bell);
            while let Some((token, result)) = engine.finished() {
                result.unwrap();
                done.push(token);
            }
        }
        let mut bytes = vec![1; DISK_BYTES as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        for offset in [4096, 4096 + (256 << 10), 4096 + (512 << 10)] {
            assert!(bytes[offset..][..128 << 10].iter().all(|byte| *byte == 0), "{name} at {offset}");
        }
        assert_eq!((bytes[4095], bytes[4096 + (128 << 10)]), (7, 8), "{name}");
    }
}

/// A file in memory has holes, but no ranges that are zeroed in place: zeroes are written there.
#[test]
fn what_the_host_cannot_zero_is_written() {
    // SAFETY: the name is a string that ends with a NUL; the result is checked.
    let descriptor = unsafe { libc::memfd_create(c"disk".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(descriptor >= 0);
    // SAFETY: memfd_create just made this descriptor, and nothing else owns it.
    let file = File::from(unsafe { std::os::fd::OwnedFd::from_raw_fd(descriptor) });
    file.write_all_at(&vec![7; 1 << 20], 0).unwrap();
    let Ok(mut ring) = Ring::new(&file) else { return };
    let ranges = vec![Range { offset: 512, length: 300 << 10, unmap: false }];
    ring.submit(0, Work::Clear { kind: Kind::Zero, ranges, stable: true });
    ring.wait_all();
    assert!(matches!(ring.finished(), Some((0, Ok(())))));
    let mut bytes = vec![1; 1 << 20];
    file.read_exact_at(&mut bytes, 0).unwrap();
    let end = 512 + (300 << 10);
    assert!(bytes[512..end].iter().all(|byte| *byte == 0));
    assert!(bytes[..512].iter().chain(&bytes[end..]).all(|byte| *byte == 7));
}

/// A file that the host made shorter than its disk: the guest has an error, and the engine goes on.
#[test]
fn a_file_that_became_shorter_is_an_error_of_the_disk() {
    for (name, mut engine, _bell, file) in engines() {
        let mut driver = Driver::new(64);
        let mut queue = driver.queue();
        let (mut flying, mut metrics) = (InFlight::default(), Metrics::default());
        engine.attach(&driver.memory);
        file.set_len(8192).unwrap();
        let there = read(&mut driver, 0, 512);
        let beyond = read(&mut driver, 100, 512);
        let across = read(&mut driver, 15, 1024);
        turn(&mut queue, &driver, engine.as_mut(), &mut flying, &mut metrics);
        engine.wait_all();
        turn(&mut queue, &driver, engine.as_mut(), &mut flying, &mut metrics);
        assert!(flying.is_empty(), "{name}");
        assert_eq!(driver.read(there.2)[0], 0, "{name}");
        // imago reads zeroes there, the kernel nothing.
        let expected = if name == "io_uring" { 1 } else { 0 };
        assert_eq!((driver.read(beyond.2)[0], driver.read(across.2)[0]), (expected, expected), "{name}");
    }
}

/// What the host finishes while it takes the work is there to be looked at, and wakes nobody afterwards; of all else the end is told, however
/// close it is to the look.
#[test]
fn no_end_is_missed_and_none_is_told_twice() {
    let (file, _) = image(&[0; 4096]);
    let Ok(mut ring) = Ring::new(&file) else { return };
    let epoll = Epoll::new().unwrap();
    let edge = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0);
    let bell = again(ring.descriptor().unwrap());
    epoll.ctl(ControlOperation::Add, bell.as_raw_fd(), edge).unwrap();
    let mut driver = Driver::new(16);
    let data = driver.want(512);
    let slice = || driver.memory.get_slice(GuestAddress(data.address), 512).unwrap();
    ring.attach(&driver.memory);
    let mut at_once = 0;
    for n in 0..5000 {
        // Reads of what is in memory end inside the call, flushes in a thread of the kernel's.
        if n % 2 == 0 {
            ring.submit(0, Work::Flush);
        } else {
            ring.submit(0, Work::Read { offset: 0, data: vec![slice()] });
        }
        ring.start();
        let mut events = [EpollEvent::default(); 1];
        let mut turns = 0;
        while ring.finished().is_none() {
            turns += 1;
            match epoll.wait(20_000, &mut events) {
                Ok(count) => assert_eq!(count, 1, "nobody told of work {n}"),
                Err(error) => assert_eq!(error.kind(), ErrorKind::Interrupted),
            }
        }
        at_once += i32::from(turns == 0);
        assert!(ring.finished().is_none());
        assert!(!tells(&bell, 0), "told of work {n} after the look");
    }
    assert!(at_once >= 2500, "{at_once} ended inside the call");
}

/// What is under way when an engine goes is finished first: memory may go then.
#[test]
fn an_engine_that_goes_waits_for_its_work() {
    for (name, mut engine, _bell, file) in engines() {
        let mut driver = Driver::new(256);
        let mut queue = driver.queue();
        let (mut flying, mut metrics) = (InFlight::default(), Metrics::default());
        engine.attach(&driver.memory);
        for n in 0..60 {
            let chain = [driver.give(&header(OUT, n)), driver.give(&[0xcc; 512]), driver.want(1)];
            driver.add(&chain);
        }
        let host = Host::Beside(engine.as_mut(), &mut flying, 0);
        let mut disk =
            Disk { host, size: DISK_BYTES, read_only: false, write_through: true, pace: None, id: "" };
        process(&mut queue, &driver.memory, &mut disk, &mut metrics).unwrap();
        engine.start();
        drop(engine);
        let mut bytes = vec![0; 60 * 512];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes.iter().all(|byte| *byte == 0xcc), "{name}");
    }
}

/// The ring does what it is for, and nothing else, whoever asks.
#[test]
fn a_ring_is_restricted_for_good() {
    use io_uring::{opcode, types};
    let (file, _) = image(&[0; 4096]);
    let Ok(mut ring) = Ring::new(&file) else { return };
    let path = c"/dev/null";
    let mut byte = [0_u8; 1];
    let fd = types::Fd(file.as_raw_fd());
    let fixed = types::Fixed(0);
    for (name, entry, expected) in [
        (
            "a descriptor that is not registered",
            opcode::Read::new(fd, byte.as_mut_ptr(), 1).build(),
            -libc::EACCES,
        ),
        (
            "a path is opened",
            opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), path.as_ptr()).build(),
            -libc::EACCES,
        ),
        ("no operation", opcode::Nop::new().build(), -libc::EACCES),
        ("a socket", opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build(), -libc::EACCES),
        ("a hole is made", opcode::Fallocate::new(fixed, 512).mode(PUNCH).build(), 0),
        ("the file is read", opcode::Read::new(fixed, byte.as_mut_ptr(), 1).build(), 1),
    ] {
        assert_eq!(ring.try_entry(&entry), expected, "{name}");
    }
    assert!(ring.try_registration().is_err());
    ring.set_file(&tempfile::tempfile().unwrap()).unwrap();
    let entry = opcode::Read::new(fixed, byte.as_mut_ptr(), 1).build();
    assert_eq!(ring.try_entry(&entry), 0, "the other file is empty");
}
