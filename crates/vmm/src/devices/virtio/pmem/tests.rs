use std::collections::VecDeque;
use std::os::unix::fs::FileExt;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryRegion, MemoryRegionAddress};

use super::image::ALIGNMENT;
use super::queue::{FAILED, OK, ROOM};
use super::*;
use crate::devices::virtio::Interrupt;
use crate::devices::virtio::mmio::page::Pages;
use crate::devices::virtio::testing::{Buffer, Driver, hostile, pieces};
use crate::memory::{self as ram, PAGE};

const START: u64 = 0x1_0800_0000;

fn image(bytes: u64, read_only: bool) -> Arc<Image> {
    let file = tempfile::tempfile().unwrap();
    file.set_len(bytes).unwrap();
    Arc::new(Image::new(file, bytes, START, read_only).unwrap())
}

fn config(text: &str) -> PmemConfig {
    serde_json::from_str(text).unwrap()
}

fn pmem(image: Arc<Image>) -> Pmem {
    let config = config(r#"{"id":"data","path_on_host":"d"}"#);
    Pmem::new(&config, image, Pace::new(None).unwrap()).unwrap()
}

fn activate(pmem: &mut Pmem, driver: &Driver) {
    let interrupt =
        Arc::new(Interrupt::new(EventFd::new(libc::EFD_NONBLOCK).unwrap(), Pages::new(1).unwrap().page(0)));
    let active =
        Active { memory: driver.memory.clone(), queues: vec![driver.queue()], features: 0, interrupt };
    pmem.activate(active).unwrap();
}

/// A host that finishes when it is told to.
#[derive(Clone, Default)]
struct Slow(Arc<Mutex<(usize, VecDeque<io::Result<()>>)>>);

impl Slow {
    /// How many calls it has been given.
    fn begun(&self) -> usize {
        self.0.lock().unwrap().0
    }

    fn finish(&self, result: io::Result<()>) {
        self.0.lock().unwrap().1.push_back(result);
    }
}

impl Engine for Slow {
    fn attach(&mut self, _: &ram::Memory) {}

    fn submit(&mut self, _: u16, work: Work<Vec<Slice<'_>>>) {
        assert!(matches!(work, Work::Flush));
        self.0.lock().unwrap().0 += 1;
    }

    fn start(&mut self) {}

    fn finished(&mut self) -> Option<(u16, io::Result<()>)> {
        self.0.lock().unwrap().1.pop_front().map(|result| (0, result))
    }

    fn wait_all(&mut self) {
        self.finish(Ok(()));
    }
}

/// Makes a flush available; returns where its answer goes.
fn flush(driver: &mut Driver) -> Buffer {
    let (request, answer) = (driver.give(&queue::FLUSH.to_le_bytes()), driver.want(4));
    driver.memory.write_obj(77_u32, GuestAddress(answer.address)).unwrap();
    driver.add(&[request, answer]);
    answer
}

fn answered(driver: &Driver, answer: Buffer) -> u32 {
    driver.memory.read_obj(GuestAddress(answer.address)).unwrap()
}

#[test]
fn one_call_of_the_hosts_answers_all_that_came_before_it() {
    let (mut driver, host) = (Driver::new(64), Slow::default());
    let mut pmem = pmem(image(ALIGNMENT, false));
    pmem.engine = Some(Box::new(host.clone()));
    activate(&mut pmem, &driver);
    let first = [flush(&mut driver), flush(&mut driver)];
    pmem.queue_event(0);
    let second = [flush(&mut driver), flush(&mut driver), flush(&mut driver)];
    pmem.queue_event(0);
    // The second three may be of writes that came after the call began.
    assert_eq!((host.begun(), driver.used().len()), (1, 0));
    host.finish(Ok(()));
    pmem.backend_event();
    assert_eq!((host.begun(), driver.used()), (2, vec![(0, 4), (2, 4)]));
    assert_eq!(first.map(|answer| answered(&driver, answer)), [OK; 2]);
    assert_eq!(second.map(|answer| answered(&driver, answer)), [77; 3]);
    host.finish(Err(io::Error::from_raw_os_error(libc::EIO)));
    pmem.backend_event();
    assert_eq!(second.map(|answer| answered(&driver, answer)), [FAILED; 3]);
    assert_eq!((pmem.metrics.flushes, pmem.metrics.syncs, pmem.metrics.failed), (5, 2, 1));
}

/// A host that is done before it is waited for, and tells nobody.
struct Quick(VecDeque<io::Result<()>>);

impl Engine for Quick {
    fn attach(&mut self, _: &ram::Memory) {}

    fn submit(&mut self, _: u16, _: Work<Vec<Slice<'_>>>) {
        self.0.push_back(Ok(()));
    }

    fn start(&mut self) {}

    fn finished(&mut self) -> Option<(u16, io::Result<()>)> {
        self.0.pop_front().map(|result| (0, result))
    }

    fn wait_all(&mut self) {}
}

#[test]
fn a_flush_that_is_done_at_once_is_answered_at_once() {
    let mut driver = Driver::new(16);
    let mut pmem = pmem(image(ALIGNMENT, false));
    pmem.engine = Some(Box::new(Quick(VecDeque::new())));
    activate(&mut pmem, &driver);
    for count in 1..=3 {
        let answer = flush(&mut driver);
        pmem.queue_event(0);
        assert_eq!((driver.used().len(), answered(&driver, answer)), (count, OK));
    }
    assert_eq!((pmem.metrics.flushes, pmem.metrics.syncs), (3, 3));
}

#[test]
fn no_more_wait_than_there_is_room_for_and_none_is_forgotten() {
    let (mut driver, host) = (Driver::new(16), Slow::default());
    let mut pmem = pmem(image(ALIGNMENT, false));
    pmem.engine = Some(Box::new(host.clone()));
    activate(&mut pmem, &driver);
    flush(&mut driver);
    pmem.queue_event(0);
    // The same chain again and again, as no good driver does.
    let mut offered = 1;
    while pmem.flushes.len() == offered {
        (0..15).for_each(|_| driver.offer_again(0));
        offered += 15;
        pmem.queue_event(0);
    }
    assert_eq!(pmem.flushes.len(), ROOM);
    while !pmem.flushes.is_empty() {
        host.finish(Ok(()));
        pmem.backend_event();
    }
    assert_eq!(pmem.metrics.flushes, offered as u64);
}

#[test]
fn a_reset_forgets_what_was_asked_for() {
    let (mut driver, host) = (Driver::new(16), Slow::default());
    let mut pmem = pmem(image(ALIGNMENT, false));
    pmem.engine = Some(Box::new(host));
    activate(&mut pmem, &driver);
    flush(&mut driver);
    pmem.queue_event(0);
    flush(&mut driver);
    pmem.queue_event(0);
    pmem.reset();
    assert!(pmem.flushes.is_empty());
    assert!(driver.used().is_empty());
    // The next driver begins with empty rings.
    let mut driver = Driver::new(16);
    activate(&mut pmem, &driver);
    let answer = flush(&mut driver);
    pmem.queue_event(0);
    pmem.quiesce();
    assert_eq!((driver.used().len(), answered(&driver, answer)), (1, OK));
}

/// By the ring and by the thread, as they are.
#[test]
fn a_flush_is_answered_by_the_host() {
    for thread in [false, true] {
        let mut driver = Driver::new(16);
        let image = image(ALIGNMENT, false);
        let mut pmem = pmem(Arc::clone(&image));
        if thread {
            let file: SharedImage = Arc::new(Mutex::new(Box::new(Stable(image))));
            pmem.engine = Some(Box::new(Worker::new(file, pmem.bell.try_clone().unwrap()).unwrap()));
        } else {
            pmem.prepare().unwrap();
        }
        activate(&mut pmem, &driver);
        let answer = flush(&mut driver);
        pmem.queue_event(0);
        let second = flush(&mut driver);
        pmem.queue_event(0);
        pmem.quiesce();
        assert_eq!([answer, second].map(|answer| answered(&driver, answer)), [OK; 2]);
        assert_eq!(driver.used().len(), 2);
    }
}

#[test]
fn a_read_only_file_has_nothing_to_flush() {
    let mut driver = Driver::new(64);
    let mut pmem = pmem(image(ALIGNMENT + 1, true));
    pmem.prepare().unwrap();
    activate(&mut pmem, &driver);
    let answers = [flush(&mut driver), flush(&mut driver)];
    assert!(!pmem.queue_event(0));
    assert_eq!(answers.map(|answer| answered(&driver, answer)), [OK; 2]);
    assert_eq!((pmem.metrics.flushes, pmem.metrics.syncs), (2, 0));
}

#[test]
fn limits_make_flushes_wait_for_their_alarm_and_a_snapshot_does_not() {
    let (mut driver, host) = (Driver::new(16), Slow::default());
    let mut pmem = pmem(image(ALIGNMENT, false));
    pmem.engine = Some(Box::new(host.clone()));
    let bucket = r#"{"ops":{"size":1,"refill_time":100000}}"#;
    pmem.change_limits(serde_json::from_str(bucket).unwrap());
    activate(&mut pmem, &driver);
    for _ in 0..2 {
        flush(&mut driver);
        pmem.queue_event(0);
        host.finish(Ok(()));
        pmem.backend_event();
    }
    assert_eq!((host.begun(), driver.used().len()), (1, 1));
    assert!(pmem.metrics.limited > 0);
    pmem.quiesce();
    assert_eq!((host.begun(), driver.used().len()), (2, 2));
}

fn byte(memory: &ram::Memory, address: u64) -> u8 {
    memory.read_obj(GuestAddress(address)).unwrap()
}

#[test]
fn devices_reach_a_file_and_write_only_where_they_may() {
    let ram = ram::create(4).unwrap();
    let written = image(ALIGNMENT, false);
    let reach = image::reach(&ram, &[Arc::clone(&written)]).unwrap();
    assert_eq!((ram::bytes(&ram), ram::bytes(&reach)), (4 << 20, 6 << 20));
    reach.write_obj(7_u8, GuestAddress(START + ALIGNMENT - 1)).unwrap();
    let mut last = [0];
    written.file().read_exact_at(&mut last, ALIGNMENT - 1).unwrap();
    assert_eq!(last, [7]);
    assert!(reach.write_obj(7_u8, GuestAddress(START + ALIGNMENT)).is_err());

    // Half a page more than one: zeroes behind it, and nothing goes into the file.
    let file = tempfile::tempfile().unwrap();
    let bytes = PAGE + 2048;
    file.write_all_at(&vec![9; bytes as usize], 0).unwrap();
    let image = Arc::new(Image::new(file, bytes, START, true).unwrap());
    let reach = image::reach(&ram, &[Arc::clone(&image)]).unwrap();
    let look = || [0, bytes - 1, bytes, 2 * PAGE, ALIGNMENT - 1].map(|at| byte(&reach, START + at));
    assert_eq!(look(), [9, 9, 0, 0, 0]);
    for at in [0, bytes - 1, bytes, ALIGNMENT - 1] {
        reach.write_obj(1_u8, GuestAddress(START + at)).unwrap();
    }
    assert_eq!(look(), [1, 1, 1, 0, 1]);
    let mut content = vec![0; bytes as usize];
    image.file().read_exact_at(&mut content, 0).unwrap();
    assert!(content.iter().all(|byte| *byte == 9), "the file was written");
    image.power_on().unwrap();
    assert_eq!(look(), [9, 9, 0, 0, 0]);
}

#[test]
fn regions_lie_at_huge_pages() {
    for bytes in [1, ALIGNMENT, 3 * ALIGNMENT + 5] {
        let image = image(bytes, true);
        assert_eq!(image.range(), ram::Range { start: START, size: bytes.next_multiple_of(ALIGNMENT) });
        assert_eq!(image.region().get_host_address(MemoryRegionAddress(0)).unwrap() as u64 % ALIGNMENT, 0);
    }
}

#[test]
fn a_state_of_another_file_is_refused() {
    let mut pmem = pmem(image(ALIGNMENT, false));
    let state = pmem.save();
    pmem.restore(&state).unwrap();
    assert_eq!(pmem.config().len(), 16);
    for state in
        [json!(null), json!({"start": START, "size": 2 * ALIGNMENT}), json!({"start": 0, "size": ALIGNMENT})]
    {
        pmem.restore(&state).unwrap_err();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Requests and answers cut at any place, with bytes to spare.
    #[test]
    fn requests_may_be_cut_as_the_guest_likes(
        kind in prop_oneof![Just(queue::FLUSH), any::<u32>()], read_only: bool,
        (request, room) in (0..9_usize, 0..9_usize).prop_flat_map(|(a, b)| (pieces(a), pieces(b))),
    ) {
        let mut driver = Driver::new(32);
        let bytes: Vec<u8> = kind.to_le_bytes().into_iter().chain([0xee; 8]).collect();
        let mut at = 0;
        let mut chain: Vec<Buffer> = Vec::new();
        for piece in &request {
            chain.push(driver.give(&bytes[at..at + piece]));
            at += piece;
        }
        let answers: Vec<Buffer> = room.iter().map(|piece| driver.want(*piece as u32)).collect();
        chain.extend(&answers);
        if chain.is_empty() {
            return Ok(());
        }
        driver.add(&chain);
        let (mut queue, mut metrics) = (driver.queue(), Metrics::default());
        if read_only {
            queue::serve_read_only(&mut queue, &driver.memory, &mut metrics).unwrap();
        } else {
            let mut flushes = Flushes::default();
            flushes.take(&mut queue, &driver.memory, &mut metrics).unwrap();
            flushes.begin();
            flushes.finish(&mut queue, &driver.memory, true, &mut metrics).unwrap();
        }
        let whole = request.iter().sum::<usize>() >= 4 && room.iter().sum::<usize>() >= 4;
        prop_assert_eq!(driver.used(), vec![(0, if whole { 4 } else { 0 })]);
        let found: Vec<u8> = answers.iter().flat_map(|answer| driver.read(*answer)).collect();
        let expected: u32 = if kind == queue::FLUSH { OK } else { FAILED };
        if whole {
            prop_assert_eq!(&found[..4], &expected.to_le_bytes());
            prop_assert!(found[4..].iter().all(|byte| *byte == 0));
        } else {
            prop_assert!(found.iter().all(|byte| *byte == 0));
        }
        let counted = [metrics.flushes, metrics.unsupported, metrics.refused];
        let wanted = match (whole, kind) { (false, _) => [0, 0, 1], (true, 0) => [1, 0, 0], _ => [0, 1, 0] };
        prop_assert_eq!(counted, wanted);
    }

    #[test]
    fn hostile_queues_hurt_nobody(hostile in hostile()) {
        let driver = Driver::new(16);
        hostile.write(&driver);
        let (mut queue, mut flushes, mut metrics) = (driver.queue(), Flushes::default(), Metrics::default());
        let _ = flushes.take(&mut queue, &driver.memory, &mut metrics);
        prop_assert!(flushes.len() <= ROOM);
        flushes.begin();
        let _ = flushes.finish(&mut queue, &driver.memory, true, &mut metrics);
        prop_assert!(flushes.is_empty());
    }
}
