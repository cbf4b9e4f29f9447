//! Lists, statistics and reports through queues, with a host that notes what it is given back.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;

use proptest::prelude::*;
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::config::StatisticsUpdate;
use super::*;
use crate::devices::virtio::Interrupt;
use crate::devices::virtio::mmio::page::Pages;
use crate::devices::virtio::testing::{AVAILABLE, Driver, hostile};
use crate::memory::{PAGE, Range};

/// Pages of a test's guest: 4 MiB.
const MEMORY_PAGES: u32 = 1024;

/// A host that notes ranges and checks that each is one of whole pages inside of memory.
#[derive(Default)]
struct Host {
    ranges: Vec<Range>,
    broken: bool,
}

impl Host {
    fn take(&mut self, range: Range) -> io::Result<u64> {
        assert!(
            range.start.is_multiple_of(PAGE) && range.size.is_multiple_of(PAGE) && range.size > 0,
            "{range:?}"
        );
        assert!(range.start + range.size <= u64::from(MEMORY_PAGES) * PAGE, "{range:?}");
        if self.broken {
            return Err(io::Error::other("not now"));
        }
        self.ranges.push(range);
        Ok(range.size)
    }

    fn pages(&self) -> Vec<u32> {
        let pages = self.ranges.iter().flat_map(|r| r.start / PAGE..(r.start + r.size) / PAGE);
        pages.map(|page| page as u32).collect()
    }
}

fn list(pages: &[u32]) -> Vec<u8> {
    pages.iter().flat_map(|page| page.to_le_bytes()).collect()
}

fn inflate(driver: &Driver, host: &mut Host, metrics: &mut Metrics) -> Turn {
    let give_back = |range| host.take(range);
    queue::inflate(&mut driver.queue(), &driver.memory, &mut Vec::new(), give_back, metrics).unwrap()
}

/// A list of entries.
fn entries(entries: &[(u16, u64)]) -> Vec<u8> {
    entries.iter().flat_map(|(tag, value)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()).collect()
}

#[test]
fn a_list_that_is_none_is_refused_and_returned() {
    let mut driver = Driver::new(16);
    let odd = driver.give(&[1, 2, 3, 4, 5]);
    let long = driver.give(&vec![0; 4 * queue::MAX_PAGES + 4]);
    let wrong_way = driver.want(8);
    for buffer in [odd, long, wrong_way] {
        driver.add(&[buffer]);
    }
    let (mut host, mut metrics) = (Host::default(), Metrics::default());
    inflate(&driver, &mut host, &mut metrics);
    queue::deflate(&mut driver.queue(), &driver.memory, &mut Vec::new(), &mut metrics).unwrap();
    assert_eq!((metrics.refused, metrics.inflated_pages, metrics.deflated_pages), (6, 0, 0));
    assert!(host.ranges.is_empty());
    assert_eq!(driver.used().len(), 3);
}

#[test]
fn a_host_that_fails_costs_nothing_but_a_count() {
    let mut driver = Driver::new(16);
    let buffer = driver.give(&list(&[5, 9]));
    driver.add(&[buffer]);
    let (mut host, mut metrics) = (Host { broken: true, ..Host::default() }, Metrics::default());
    inflate(&driver, &mut host, &mut metrics);
    assert_eq!((metrics.failed, metrics.inflated_pages, metrics.given_back_bytes), (2, 2, 0));
    assert_eq!(driver.used().len(), 1);
}

/// Each page here is a range of its own: a few lists are a turn's work, and the rest must wait.
#[test]
fn a_turn_ends_when_it_has_given_enough_back() {
    let mut driver = Driver::new(16);
    let pages: Vec<u32> = (0..MEMORY_PAGES).step_by(2).collect();
    for _ in 0..4 {
        let buffer = driver.give(&list(&pages));
        driver.add(&[buffer]);
    }
    let mut queue = driver.queue();
    let (mut host, mut metrics) = (Host::default(), Metrics::default());
    let memory = driver.memory.clone();
    for (lists, more) in [(2, true), (4, true), (4, false)] {
        let give_back = |range| host.take(range);
        let turn = queue::inflate(&mut queue, &memory, &mut Vec::new(), give_back, &mut metrics).unwrap();
        assert_eq!((driver.used().len(), turn.more), (lists, more));
    }
}

#[test]
fn queues_are_found_by_either_way_of_counting() {
    use Role::{Deflate, Inflate, Reporting, Statistics};
    let roles = |features| [0, 1, 2, 3, 4, 5].map(|queue| Role::of(queue, features));
    let both = [Some(Inflate), Some(Deflate), Some(Statistics), Some(Reporting), Some(Reporting), None];
    assert_eq!(roles(F_STATISTICS | F_REPORTING), both);
    assert_eq!(roles(F_STATISTICS)[2..], [Some(Statistics), None, None, None]);
    assert_eq!(roles(F_REPORTING)[2..], [Some(Reporting), Some(Reporting), Some(Reporting), None]);
    assert_eq!(roles(0), [Some(Inflate), Some(Deflate), None, None, None, None]);
}

#[test]
fn reports_are_cut_to_whole_pages_inside_of_memory() {
    let mut driver = Driver::new(16);
    let range = |address, length| crate::devices::virtio::testing::Buffer { address, length, writable: true };
    let end = u64::from(MEMORY_PAGES) * PAGE;
    for chain in [
        &[range(2 * PAGE + 1, 3 * PAGE as u32), range(8 * PAGE, 2 * PAGE as u32)][..],
        &[range(PAGE + 1, PAGE as u32), range(end - PAGE, PAGE as u32)],
        &[range(end - PAGE, 2 * PAGE as u32)],
        &[range(u64::MAX - 10, 4096), range(end, 4096)],
        &[range(0, u32::MAX)],
    ] {
        driver.add(chain);
    }
    let mut wrong_way = range(0, PAGE as u32);
    wrong_way.writable = false;
    driver.add(&[wrong_way]);
    let (mut host, mut metrics) = (Host::default(), Metrics::default());
    let give_back = |range| host.take(range);
    queue::report(&mut driver.queue(), &driver.memory, give_back, &mut metrics).unwrap();
    assert_eq!(host.pages(), [3, 4, 8, 9, MEMORY_PAGES - 1]);
    assert_eq!((metrics.reported_bytes, metrics.given_back_bytes), (5 * PAGE, 5 * PAGE));
    assert_eq!((metrics.refused, driver.used().len()), (6, 6));
}

#[test]
fn statistics_are_kept_by_name() {
    let mut statistics = Statistics::default();
    let list = entries(&[(4, 100), (5, 200), (999, 1), (4, 101)]);
    assert_eq!(statistics.update(&[&list[..], &[5, 0, 1]].concat()), 3);
    assert_eq!(Value::from(statistics.named()), json!({ "free_memory": 101, "total_memory": 200 }));
    statistics.update(&entries(&[(15, u64::MAX)]));
    assert_eq!(statistics.named()["direct_reclaim"], json!(u64::MAX));
    assert_eq!(statistics.named()["free_memory"], json!(101));
}

#[test]
fn the_buffer_for_statistics_comes_back_when_they_are_asked_for() {
    let mut driver = Driver::new(16);
    let mut queue = driver.queue();
    let memory = driver.memory.clone();
    let (mut held, mut latest, mut metrics) = (None, Statistics::default(), Metrics::default());
    assert!(!queue::ask(&mut queue, &memory, &mut held).unwrap(), "nothing to return yet");
    let first = driver.give(&entries(&[(4, 1)]));
    let head = driver.add(&[first]);
    queue::take_statistics(&mut queue, &memory, &mut held, &mut latest, &mut metrics).unwrap();
    assert_eq!((held, driver.used().len()), (Some(head), 0));
    assert!(queue::ask(&mut queue, &memory, &mut held).unwrap());
    assert_eq!((held, driver.used()), (None, vec![(u32::from(head), 0)]));
    // Two at once, the second one empty and the third beyond all bounds: all but the last come back at once.
    let (one, long) = (driver.give(&entries(&[(4, 2)])), driver.give(&vec![0xff; 60_000]));
    let empty = driver.want(10);
    let last = [one, empty, long].map(|buffer| driver.add(&[buffer]))[2];
    let turn = queue::take_statistics(&mut queue, &memory, &mut held, &mut latest, &mut metrics).unwrap();
    assert_eq!((held, driver.used().len(), turn.interrupt), (Some(last), 3, true));
    assert_eq!(latest.named()["free_memory"], json!(2));
    assert_eq!((metrics.statistics, metrics.refused), (3, 1));
}

fn device(config: BalloonConfig, driver: &Driver) -> (Balloon, EventFd) {
    let mut balloon = Balloon::new(&config, FilePages::default()).unwrap();
    let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let interrupt = Arc::new(Interrupt::new(line.try_clone().unwrap(), Pages::new(1).unwrap().page(0)));
    let queues = balloon.queue_sizes().iter().map(|_| driver.queue()).collect();
    let features = balloon.features();
    balloon.activate(Active { memory: driver.memory.clone(), queues, features, interrupt }).unwrap();
    (balloon, line)
}

#[test]
fn the_target_is_in_the_configuration_space_and_a_change_interrupts() {
    let driver = Driver::new(16);
    let config = BalloonConfig { amount_mib: 1, ..BalloonConfig::default() };
    let (mut balloon, line) = device(config, &driver);
    assert_eq!(balloon.config(), [0, 1, 0, 0, 0, 0, 0, 0]);
    balloon.write_config(ACTUAL, &77_u32.to_le_bytes());
    // The target is the host's to write, and nothing else is there.
    balloon.write_config(0, &[9; 4]);
    balloon.write_config(ACTUAL, &[9; 2]);
    balloon.write_config(usize::MAX, &[9; 4]);
    assert_eq!(balloon.config(), [0, 1, 0, 0, 77, 0, 0, 0]);
    assert!(line.read().is_err(), "nothing has changed yet");
    balloon.set_target(2);
    assert_eq!(line.read().unwrap(), 1);
    let generation = balloon.active.as_ref().unwrap().interrupt.page().get(0xfc);
    assert_eq!((generation, balloon.config()[..4].to_vec()), (1, vec![0, 2, 0, 0]));
    assert_eq!(balloon.statistics()["actual_pages"], json!(77));
    assert_eq!(balloon.statistics()["target_mib"], json!(2));
    balloon.reset();
    assert_eq!(balloon.config(), [0, 2, 0, 0, 0, 0, 0, 0], "what is wanted stays, what was given is gone");
}

#[test]
fn features_and_queues_are_what_was_configured() {
    let count = |config: BalloonConfig| {
        let balloon = Balloon::new(&config, FilePages::default()).unwrap();
        (balloon.features() & !(F_EVENT_IDX | F_INDIRECT_DESC), balloon.queue_sizes().len())
    };
    let none = BalloonConfig::default();
    assert_eq!(count(none), (0, 2));
    assert_eq!(count(BalloonConfig { deflate_on_oom: true, ..none }), (F_DEFLATE_ON_OOM, 2));
    assert_eq!(count(BalloonConfig { stats_polling_interval_s: 1, ..none }), (F_STATISTICS, 3));
    assert_eq!(count(BalloonConfig { free_page_reporting: true, ..none }), (F_REPORTING, 5));
}

#[test]
fn a_broken_queue_stops_the_device_until_it_is_reset() {
    let driver = Driver::new(16);
    let (mut balloon, line) = device(BalloonConfig::default(), &driver);
    driver.memory.write_obj(1000_u16, GuestAddress(AVAILABLE + 2)).unwrap();
    assert!(!balloon.queue_event(0));
    assert!(balloon.active.is_none() && line.read().is_ok());
    assert!(!balloon.queue_event(0));
}

#[test]
fn statistics_neither_come_nor_go_later() {
    let at = |seconds| BalloonConfig { stats_polling_interval_s: seconds, ..BalloonConfig::default() };
    let to = |seconds| StatisticsUpdate { stats_polling_interval_s: seconds };
    assert_eq!(at(1).with_interval(to(7)).unwrap(), at(7));
    assert_eq!(at(0).with_interval(to(0)).unwrap(), at(0));
    for (from, wanted) in [(0, 3), (3, 0)] {
        let why = at(from).with_interval(to(wanted)).unwrap_err().to_string();
        assert!(why.contains(&format!("stats_polling_interval_s {wanted}")), "{why}");
    }
}

proptest! {
    /// Whatever pages are listed, and however the list is cut into buffers: those inside of memory go back, each once.
    #[test]
    fn what_is_listed_and_inside_goes_back_once(
        pages in proptest::collection::vec(prop_oneof![0..2 * MEMORY_PAGES, any::<u32>()], 1..300),
        buffers in 1..5_usize,
    ) {
        let mut driver = Driver::new(16);
        let bytes = list(&pages);
        let chain: Vec<_> = bytes.chunks(bytes.len().div_ceil(buffers)).map(|part| driver.give(part)).collect();
        driver.add(&chain);
        let (mut host, mut metrics) = (Host::default(), Metrics::default());
        inflate(&driver, &mut host, &mut metrics);
        let expected: BTreeSet<u32> = pages.iter().copied().filter(|page| *page < MEMORY_PAGES).collect();
        prop_assert_eq!(host.pages(), expected.iter().copied().collect::<Vec<_>>());
        let outside = pages.iter().filter(|page| **page >= MEMORY_PAGES).count() as u64;
        prop_assert_eq!((metrics.refused, metrics.inflated_pages), (outside, pages.len() as u64 - outside));
        // As few ranges as possible: no two of them touch.
        prop_assert!(host.ranges.windows(2).all(|pair| pair[0].start + pair[0].size < pair[1].start));
    }

    #[test]
    fn any_list_of_statistics_is_survived(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let mut statistics = Statistics::default();
        let count = statistics.update(&bytes);
        prop_assert!(count <= bytes.len() / statistics::ENTRY);
        prop_assert!(statistics.named().len() <= count);
    }

    #[test]
    fn hostile_queues_are_survived(inflated in hostile(), deflated in hostile(), said in hostile(), reported in hostile()) {
        let (mut host, mut metrics) = (Host::default(), Metrics::default());
        let driver = Driver::new(16);
        inflated.write(&driver);
        let give_back = |range| host.take(range);
        let _ = queue::inflate(&mut driver.queue(), &driver.memory, &mut Vec::new(), give_back, &mut metrics);
        let driver = Driver::new(16);
        deflated.write(&driver);
        let _ = queue::deflate(&mut driver.queue(), &driver.memory, &mut Vec::new(), &mut metrics);
        let driver = Driver::new(16);
        reported.write(&driver);
        let give_back = |range| host.take(range);
        let _ = queue::report(&mut driver.queue(), &driver.memory, give_back, &mut metrics);
        let driver = Driver::new(16);
        said.write(&driver);
        let (mut held, mut latest, mut queue) = (None, Statistics::default(), driver.queue());
        let taken = queue::take_statistics(&mut queue, &driver.memory, &mut held, &mut latest, &mut metrics);
        if taken.is_ok() && queue.ready() {
            let _ = queue::ask(&mut queue, &driver.memory, &mut held);
        }
    }
}
