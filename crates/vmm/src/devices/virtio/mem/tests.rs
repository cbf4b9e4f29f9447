//! Requests through a queue, with a host that notes what it is given back.

use std::io;
use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::queue::{ACK, ANSWER, ERROR, NACK, PLUG, REQUEST, STATE, UNPLUG, UNPLUG_ALL};
use super::*;
use crate::devices::virtio::Interrupt;
use crate::devices::virtio::mmio::page::Pages;
use crate::devices::virtio::testing::{AVAILABLE, Buffer, Driver, hostile};

const CONFIG: MemoryHotplugConfig =
    MemoryHotplugConfig { total_size_mib: 128, block_size_mib: 2, slot_size_mib: 128 };
const REGION: Range = Range { start: 5 << 30, size: 128 << 20 };
const BLOCK: u64 = 2 << 20;

fn request(kind: u16, address: u64, count: u16) -> Vec<u8> {
    let mut bytes = vec![0; REQUEST];
    bytes[..2].copy_from_slice(&kind.to_le_bytes());
    bytes[8..16].copy_from_slice(&address.to_le_bytes());
    bytes[16..18].copy_from_slice(&count.to_le_bytes());
    bytes
}

struct Test {
    driver: Driver,
    blocks: Blocks,
    metrics: Metrics,
    given: Vec<Range>,
    broken: bool,
}

impl Test {
    fn new() -> Self {
        Self {
            driver: Driver::new(128),
            blocks: Blocks::new(REGION, BLOCK),
            metrics: Metrics::default(),
            given: Vec::new(),
            broken: false,
        }
    }

    fn serve(&mut self) -> Turn {
        let mut queue = self.driver.queue();
        let give_back = |range: Range| {
            self.given.push(range);
            if self.broken { Err(io::Error::other("not now")) } else { Ok(range.size) }
        };
        queue::serve(&mut queue, &self.driver.memory, &mut self.blocks, give_back, &mut self.metrics).unwrap()
    }

    /// Offers requests, each with a buffer for its answer, and returns the answers: kind and state.
    fn ask(requests: &[(u16, u64, u16)], blocks: impl FnOnce(&mut Blocks)) -> (Self, Vec<(u16, u16)>) {
        let mut test = Self::new();
        blocks(&mut test.blocks);
        let answers: Vec<Buffer> = requests
            .iter()
            .map(|(kind, address, count)| {
                let asked = test.driver.give(&request(*kind, *address, *count));
                let answer = test.driver.want(ANSWER as u32);
                test.driver.add(&[asked, answer]);
                answer
            })
            .collect();
        let turn = test.serve();
        assert!(turn.interrupt && !turn.more);
        assert!(test.driver.used().iter().all(|(_, written)| *written == ANSWER as u32));
        let half = |bytes: &[u8], at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let read = |buffer: &Buffer| {
            let bytes = test.driver.read(*buffer);
            (half(&bytes, 0), half(&bytes, 8))
        };
        let answers = answers.iter().map(read).collect();
        (test, answers)
    }
}

#[test]
fn requests_are_answered_in_order_and_what_goes_is_given_back() {
    let start = REGION.start;
    let requests = [
        (PLUG, start, 4),
        (PLUG, start + 4 * BLOCK, 1),
        (PLUG, start, 1),
        (STATE, start, 4),
        (STATE, start, 5),
        (STATE, start + 4 * BLOCK, 60),
        (STATE, start + 4 * BLOCK, 61),
        (UNPLUG, start + BLOCK, 2),
        (UNPLUG, start + BLOCK, 1),
        (UNPLUG_ALL, u64::MAX, 7),
        (STATE, start, 64),
        (4, start, 1),
        (u16::MAX, start, 1),
    ];
    let (test, answers) = Test::ask(&requests, |blocks| blocks.request(4 * BLOCK));
    let (plugged, unplugged, mixed) = ((ACK, 0), (ACK, 1), (ACK, 2));
    let expected = [
        (ACK, 0),
        (NACK, 0),
        (ERROR, 0),
        plugged,
        mixed,
        unplugged,
        (ERROR, 0),
        (ACK, 0),
        (ERROR, 0),
        (ACK, 0),
        unplugged,
        (ERROR, 0),
        (ERROR, 0),
    ];
    assert_eq!(answers, expected);
    assert_eq!(test.given, [Range { start: start + BLOCK, size: 2 * BLOCK }, REGION]);
    let expected = Metrics {
        requests: 13,
        plugged_bytes: 4 * BLOCK,
        unplugged_bytes: 4 * BLOCK,
        too_much: 1,
        errors: 5,
        ..Metrics::default()
    };
    assert_eq!(test.metrics, expected);
}

#[test]
fn a_buffer_without_a_request_or_without_room_is_refused_and_changes_nothing() {
    let mut test = Test::new();
    test.blocks.request(BLOCK);
    let whole = request(PLUG, REGION.start, 1);
    let (short, asked) = (test.driver.give(&whole[..REQUEST - 1]), test.driver.give(&whole));
    let (room, little) = (test.driver.want(ANSWER as u32), test.driver.want(ANSWER as u32 - 1));
    test.driver.add(&[short, room]);
    test.driver.add(&[asked]);
    test.driver.add(&[asked, little]);
    test.driver.add(&[room]);
    test.serve();
    assert_eq!((test.metrics.refused, test.metrics.requests, test.blocks.plugged()), (4, 0, 0));
    assert!(test.driver.used().iter().all(|(_, written)| *written == 0));
}

#[test]
fn a_host_that_fails_costs_nothing_but_a_count() {
    let mut test = Test { broken: true, ..Test::new() };
    test.blocks.request(BLOCK);
    test.blocks.plug(REGION.start, 1).unwrap();
    let asked = test.driver.give(&request(UNPLUG, REGION.start, 1));
    let answer = test.driver.want(ANSWER as u32);
    test.driver.add(&[asked, answer]);
    test.serve();
    assert_eq!((test.metrics.failed, test.blocks.plugged()), (1, 0));
}

fn word(config: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(config[at..at + 8].try_into().unwrap())
}

#[test]
fn the_guest_reads_what_it_should_have_and_a_change_interrupts() {
    let driver = Driver::new(16);
    let mut mem = Mem::new(CONFIG, REGION, FilePages::default());
    let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let interrupt = Arc::new(Interrupt::new(line.try_clone().unwrap(), Pages::new(1).unwrap().page(0)));
    mem.request(4);
    assert!(line.read().is_err(), "there is no driver yet");
    let queues = vec![driver.queue()];
    let features = mem.features();
    mem.activate(Active { memory: driver.memory.clone(), queues, features, interrupt }).unwrap();
    let config = mem.config();
    let words: Vec<u64> = (0..56).step_by(8).map(|at| word(&config, at)).collect();
    assert_eq!(words, [BLOCK, 0, REGION.start, REGION.size, REGION.size, 0, 2 * BLOCK]);
    mem.request(128);
    assert_eq!((line.read().unwrap(), word(&mem.config(), 48)), (1, REGION.size));

    // A driver that goes leaves its blocks to the next; a machine that is started anew does not.
    mem.blocks.plug(REGION.start, 3).unwrap();
    mem.reset();
    assert_eq!(mem.status().plugged_size_mib, 6);
    mem.power_on();
    assert_eq!((mem.status().plugged_size_mib, mem.status().requested_size_mib), (0, 128));
}

#[test]
fn a_broken_queue_stops_the_device_until_it_is_reset() {
    let driver = Driver::new(16);
    let mut mem = Mem::new(CONFIG, REGION, FilePages::default());
    let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let interrupt = Arc::new(Interrupt::new(line.try_clone().unwrap(), Pages::new(1).unwrap().page(0)));
    let queues = vec![driver.queue()];
    mem.activate(Active { memory: driver.memory.clone(), queues, features: 0, interrupt }).unwrap();
    driver.memory.write_obj(1000_u16, GuestAddress(AVAILABLE + 2)).unwrap();
    assert!(!mem.queue_event(0));
    assert!(mem.active.is_none() && line.read().is_ok());
    assert!(!mem.queue_event(0));
}

#[test]
fn sizes_that_do_not_fit_are_refused_by_name() {
    let config = |total_size_mib, block_size_mib, slot_size_mib| MemoryHotplugConfig {
        total_size_mib,
        block_size_mib,
        slot_size_mib,
    };
    for good in [config(128, 2, 128), config(1024, 128, 256), config(1 << 20, 128, 1024)] {
        good.check(1 << 20).unwrap();
    }
    for (bad, words) in [
        (config(128, 0, 128), "block_size_mib 0"),
        (config(128, 1, 128), "block_size_mib 1"),
        (config(128, 3, 128), "block_size_mib 3"),
        (config(128, 256, 128), "slot_size_mib 128"),
        (config(128, 2, 64), "slot_size_mib 64"),
        (config(129, 2, 129), "slot_size_mib 129"),
        (config(0, 2, 128), "total_size_mib 0"),
        (config(192, 2, 128), "total_size_mib 192"),
        (config((1 << 20) + 128, 2, 128), "total_size_mib 1048704"),
    ] {
        let why = bad.check(128).unwrap_err().to_string();
        assert!(why.contains(words), "{why}");
    }
    assert!(config(128, 2, 128).check((2 << 20) - 127).is_err(), "more than a machine can have");
    let config = config(256, 4, 128);
    config.check_requested(256).unwrap();
    for bad in [2, 257, 260] {
        assert!(config.check_requested(bad).is_err(), "{bad}");
    }
    assert_eq!([128, 132, 384].map(|wanted| config.beyond(128, wanted).unwrap()), [0, 4, 256]);
    for bad in [0, 127, 130, 388] {
        assert!(config.beyond(128, bad).unwrap_err().to_string().contains(&format!("mem_size_mib {bad}")));
    }
}

proptest! {
    #[test]
    fn hostile_queues_are_survived(hostile in hostile()) {
        let driver = Driver::new(16);
        hostile.write(&driver);
        let mut blocks = Blocks::new(REGION, BLOCK);
        blocks.request(REGION.size);
        let give_back = |range: Range| {
            assert!(range.start >= REGION.start && range.start + range.size <= REGION.start + REGION.size);
            Ok(range.size)
        };
        let _ = queue::serve(
            &mut driver.queue(), &driver.memory, &mut blocks, give_back, &mut Metrics::default(),
        );
    }
}
