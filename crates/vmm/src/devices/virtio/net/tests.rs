//! Packets through queues, with a tap made of vectors.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};

use super::metrics::Metrics;
use super::queue::{HEADER, MAX_PACKET, Tap, Waiting, receive, transmit};
use crate::config::{RateLimiter, TokenBucket};
use crate::devices::virtio::pace::Pace;
use crate::devices::virtio::queue::copy_out;
use crate::devices::virtio::testing::{AVAILABLE, Driver, USED, hostile, pieces};
use crate::memory::Slice;

#[derive(Default)]
struct Cable {
    to_guest: VecDeque<Vec<u8>>,
    to_host: Vec<Vec<u8>>,
    broken: bool,
}

impl Tap for Cable {
    fn receive(&mut self, packet: &mut [u8]) -> io::Result<Option<usize>> {
        Ok(self.to_guest.pop_front().map(|bytes| {
            packet[..bytes.len()].copy_from_slice(&bytes);
            bytes.len()
        }))
    }

    fn send(&mut self, packet: &[Slice<'_>]) -> io::Result<()> {
        if self.broken {
            return Err(io::Error::other("no carrier"));
        }
        let mut bytes = vec![0; MAX_PACKET];
        let count = copy_out(packet, &mut bytes);
        bytes.truncate(count);
        self.to_host.push(bytes);
        Ok(())
    }
}

/// A packet of this many bytes behind its header.
fn packet(length: usize) -> Vec<u8> {
    let mut packet = vec![0; HEADER];
    packet.extend((0..length).map(|n| (n % 251) as u8));
    packet
}

#[test]
fn a_tap_that_fails_costs_packets_and_nothing_else() {
    let mut driver = Driver::new(16);
    let mut tap = Cable { broken: true, ..Cable::default() };
    let buffer = driver.give(&packet(60));
    driver.add(&[buffer]);
    let mut metrics = Metrics::default();
    transmit(&mut driver.queue(), &driver.memory, &mut tap, None, &mut metrics).unwrap();
    assert_eq!((metrics.tx_dropped, driver.used().len()), (1, 1));
}

#[test]
fn a_packet_waits_for_buffers_and_is_not_lost() {
    let mut driver = Driver::new(16);
    let mut queue = driver.queue();
    let mut tap = Cable::default();
    tap.to_guest.push_back(packet(100));
    let (mut waiting, mut metrics) = (Waiting::default(), Metrics::default());
    let memory = driver.memory.clone();
    let turn = receive(&mut queue, &memory, &mut tap, &mut waiting, None, true, &mut metrics).unwrap();
    assert!(!turn.interrupt && !turn.more && metrics.rx_packets == 0);
    let buffer = driver.want(200);
    driver.add(&[buffer]);
    let turn = receive(&mut queue, &memory, &mut tap, &mut waiting, None, true, &mut metrics).unwrap();
    assert!(turn.interrupt);
    assert_eq!(driver.used(), [(0, 112)]);
    assert_eq!(driver.read(buffer)[HEADER..112], packet(100)[HEADER..]);
}

#[test]
fn without_mergeable_buffers_a_packet_that_does_not_fit_is_dropped() {
    let mut driver = Driver::new(16);
    let mut tap = Cable::default();
    tap.to_guest.extend([packet(500), packet(50)]);
    for _ in 0..3 {
        let buffer = driver.want(100);
        driver.add(&[buffer]);
    }
    let mut metrics = Metrics::default();
    receive(
        &mut driver.queue(),
        &driver.memory,
        &mut tap,
        &mut Waiting::default(),
        None,
        false,
        &mut metrics,
    )
    .unwrap();
    assert_eq!((metrics.rx_dropped, metrics.rx_packets), (1, 1));
}

/// A guest whose buffers are too small cannot have the host read packets for it without end.
#[test]
fn packets_that_are_dropped_count_against_the_limit() {
    let mut driver = Driver::new(16);
    let mut tap = Cable::default();
    tap.to_guest.extend([packet(500), packet(500), packet(500)]);
    for _ in 0..3 {
        let buffer = driver.want(100);
        driver.add(&[buffer]);
    }
    let ops = Some(TokenBucket { size: 1, one_time_burst: None, refill_time: 60_000 });
    let mut pace = Pace::new(Some(RateLimiter { bandwidth: None, ops })).unwrap();
    let (mut waiting, mut metrics) = (Waiting::default(), Metrics::default());
    let (mut queue, memory) = (driver.queue(), driver.memory.clone());
    receive(&mut queue, &memory, &mut tap, &mut waiting, Some(&mut pace), false, &mut metrics).unwrap();
    assert_eq!((metrics.rx_dropped, metrics.rx_limited, tap.to_guest.len()), (1, 1, 2));
}

#[test]
fn with_too_few_mergeable_buffers_a_packet_waits_for_more() {
    let mut driver = Driver::new(16);
    let (mut queue, mut waiting, mut metrics) = (driver.queue(), Waiting::default(), Metrics::default());
    let mut tap = Cable::default();
    tap.to_guest.extend([packet(500), packet(50)]);
    for (added, packets) in [(1, 0), (3, 0), (2, 1)] {
        for _ in 0..added {
            let buffer = driver.want(100);
            driver.add(&[buffer]);
        }
        let memory = driver.memory.clone();
        receive(&mut queue, &memory, &mut tap, &mut waiting, None, true, &mut metrics).unwrap();
        assert_eq!((metrics.rx_dropped, metrics.rx_packets), (0, packets), "{added} more");
    }
    // 512 bytes in six buffers of 100 are five and a sixth of 12; the second packet finds none.
    assert_eq!(driver.used().len(), 6);
}

/// A guest that looks while a packet of several buffers comes must find all of them (Linux drops what is incomplete).
#[test]
fn a_guest_that_looks_meanwhile_never_finds_a_part_of_a_packet() {
    for _ in 0..200 {
        let mut driver = Driver::new(16);
        for _ in 0..12 {
            let buffer = driver.want(100);
            driver.add(&[buffer]);
        }
        let (memory, mut queue, looks) = (driver.memory.clone(), driver.queue(), AtomicBool::new(false));
        let mut tap = Cable::default();
        tap.to_guest.push_back(packet(1000));
        let mut metrics = Metrics::default();
        let seen = std::thread::scope(|scope| {
            let looking = scope.spawn(|| {
                looks.store(true, Ordering::SeqCst);
                loop {
                    match memory.read_obj::<u16>(GuestAddress(USED + 2)).unwrap() {
                        0 => std::hint::spin_loop(),
                        seen => return seen,
                    }
                }
            });
            while !looks.load(Ordering::SeqCst) {
                std::hint::spin_loop();
            }
            receive(&mut queue, &memory, &mut tap, &mut Waiting::default(), None, true, &mut metrics)
                .unwrap();
            looking.join().unwrap()
        });
        // 1012 bytes in buffers of 100.
        assert_eq!((seen, driver.used().len(), metrics.rx_packets), (11, 11, 1));
    }
}

/// virtio 1.2, 2.7.10: `used_event` may name any of the buffers that come together.
#[test]
fn a_guest_that_waits_for_one_of_the_buffers_of_a_packet_hears_of_it() {
    for (event, wanted) in [(0_u16, true), (4, true), (10, true), (11, false), (15, false)] {
        let mut driver = Driver::new(16);
        for _ in 0..12 {
            let buffer = driver.want(100);
            driver.add(&[buffer]);
        }
        let mut queue = driver.queue();
        queue.set_event_idx(true);
        driver.memory.write_obj(event, GuestAddress(AVAILABLE + 4 + 2 * 16)).unwrap();
        let mut tap = Cable::default();
        tap.to_guest.push_back(packet(1000));
        let (mut waiting, mut metrics) = (Waiting::default(), Metrics::default());
        let memory = driver.memory.clone();
        let turn = receive(&mut queue, &memory, &mut tap, &mut waiting, None, true, &mut metrics).unwrap();
        assert_eq!((turn.interrupt, driver.used().len()), (wanted, 11), "event {event}");
    }
}

#[test]
fn a_packet_for_which_a_whole_queue_of_buffers_is_too_little_is_lost_and_the_buffers_stay() {
    let mut driver = Driver::new(4);
    let mut tap = Cable::default();
    tap.to_guest.extend([packet(500), packet(50)]);
    for _ in 0..4 {
        let buffer = driver.want(100);
        driver.add(&[buffer]);
    }
    let mut metrics = Metrics::default();
    receive(&mut driver.queue(), &driver.memory, &mut tap, &mut Waiting::default(), None, true, &mut metrics)
        .unwrap();
    assert_eq!((metrics.rx_dropped, metrics.rx_packets), (1, 1));
    assert_eq!(driver.used(), [(0, 62)]);
}

proptest! {
    #[test]
    fn what_the_guest_sends_arrives_however_it_is_cut(cuts in pieces(400)) {
        let bytes = packet(400 - HEADER);
        let mut driver = Driver::new(16);
        let mut at = 0;
        let chain: Vec<_> = cuts.iter().map(|cut| { at += cut; driver.give(&bytes[at - cut..at]) }).collect();
        driver.add(&chain);
        let mut tap = Cable::default();
        transmit(&mut driver.queue(), &driver.memory, &mut tap, None, &mut Metrics::default()).unwrap();
        prop_assert_eq!(tap.to_host, vec![bytes]);
    }

    /// virtio 1.2, 5.1.6.4: a packet fills as many buffers as it needs, and its header says how many.
    #[test]
    fn mergeable_buffers_hold_the_packet(length in 1..2000_usize, sizes in proptest::collection::vec(1..300_u32, 16)) {
        let bytes = packet(length);
        let mut driver = Driver::new(16);
        let buffers: Vec<_> = sizes.iter().map(|size| driver.want(*size)).collect();
        for buffer in &buffers {
            driver.add(&[*buffer]);
        }
        let mut tap = Cable::default();
        tap.to_guest.push_back(bytes.clone());
        let mut metrics = Metrics::default();
        receive(&mut driver.queue(), &driver.memory, &mut tap, &mut Waiting::default(), None, true, &mut metrics).unwrap();
        let room: u32 = sizes.iter().sum();
        if (room as usize) < bytes.len() {
            prop_assert_eq!(metrics.rx_dropped, 1);
            prop_assert!(driver.used().is_empty());
        } else {
            let used = driver.used();
            let arrived: Vec<u8> = used.iter().zip(&buffers)
                .flat_map(|((_, count), buffer)| driver.read(*buffer)[..*count as usize].to_vec()).collect();
            let mut expected = bytes;
            expected[10..12].copy_from_slice(&u16::try_from(used.len()).unwrap().to_le_bytes());
            prop_assert_eq!(arrived, expected);
        }
    }

    #[test]
    fn hostile_queues_are_survived(rx in hostile(), tx in hostile(), mergeable in any::<bool>()) {
        let mut tap = Cable::default();
        tap.to_guest.extend([packet(60), packet(3000)]);
        let driver = Driver::new(16);
        rx.write(&driver);
        let _ = receive(&mut driver.queue(), &driver.memory, &mut tap, &mut Waiting::default(), None, mergeable, &mut Metrics::default());
        let driver = Driver::new(16);
        tx.write(&driver);
        let _ = transmit(&mut driver.queue(), &driver.memory, &mut tap, None, &mut Metrics::default());
    }
}
