//! The driver's side of a queue, for tests: what a guest would write into its memory.

use proptest::prelude::*;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use crate::memory::{self, Memory};

pub const DESCRIPTORS: u64 = 0x1000;
pub const AVAILABLE: u64 = 0x2000;
pub const USED: u64 = 0x3000;
/// Where tests put their buffers.
pub const BUFFERS: u64 = 0x10_000;

/// A buffer of a chain.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    pub address: u64,
    pub length: u32,
    pub writable: bool,
}

pub struct Driver {
    pub memory: Memory,
    size: u16,
    next_descriptor: u16,
    available: u16,
    next_buffer: u64,
}

impl Driver {
    pub fn new(size: u16) -> Self {
        let memory = memory::create(4).unwrap();
        Self { memory, size, next_descriptor: 0, available: 0, next_buffer: BUFFERS }
    }

    /// The device's view.
    pub fn queue(&self) -> Queue {
        let mut queue = Queue::new(self.size).unwrap();
        queue.set_desc_table_address(Some(DESCRIPTORS as u32), None);
        queue.set_avail_ring_address(Some(AVAILABLE as u32), None);
        queue.set_used_ring_address(Some(USED as u32), None);
        queue.set_ready(true);
        assert!(queue.is_valid(&self.memory));
        queue
    }

    /// A fresh buffer with this content for the device to read.
    pub fn give(&mut self, content: &[u8]) -> Buffer {
        let buffer = Buffer { writable: false, ..self.want(content.len() as u32) };
        self.memory.write_slice(content, GuestAddress(buffer.address)).unwrap();
        buffer
    }

    /// A fresh buffer for the device to fill.
    pub fn want(&mut self, length: u32) -> Buffer {
        let address = self.next_buffer;
        self.next_buffer += u64::from(length) + 3;
        Buffer { address, length, writable: true }
    }

    /// Makes a chain available.
    pub fn add(&mut self, chain: &[Buffer]) -> u16 {
        let head = self.next_descriptor;
        for (index, buffer) in chain.iter().enumerate() {
            let last = index + 1 == chain.len();
            let flags = u16::from(!last) | u16::from(buffer.writable) << 1;
            let at = self.next_descriptor;
            self.next_descriptor += 1;
            assert!(at < self.size, "the test's table is full");
            let address = GuestAddress(DESCRIPTORS + 16 * u64::from(at));
            let words = (buffer.address, buffer.length, flags, self.next_descriptor);
            let mut bytes = words.0.to_le_bytes().to_vec();
            bytes.extend(words.1.to_le_bytes());
            bytes.extend(words.2.to_le_bytes());
            bytes.extend(words.3.to_le_bytes());
            self.memory.write_slice(&bytes, address).unwrap();
        }
        self.offer_again(head);
        head
    }

    /// Makes a chain available that is in the table already.
    pub fn offer_again(&mut self, head: u16) {
        let slot = AVAILABLE + 4 + 2 * u64::from(self.available % self.size);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.available += 1;
        self.memory.write_obj(self.available, GuestAddress(AVAILABLE + 2)).unwrap();
    }

    /// Everything that the device has returned: (head, bytes written).
    pub fn used(&self) -> Vec<(u32, u32)> {
        let count: u16 = self.memory.read_obj(GuestAddress(USED + 2)).unwrap();
        let read = |at: u64| self.memory.read_obj::<u32>(GuestAddress(USED + at)).unwrap();
        (0..u64::from(count)).map(|n| (read(4 + 8 * n), read(8 + 8 * n))).collect()
    }

    pub fn read(&self, buffer: Buffer) -> Vec<u8> {
        let mut bytes = vec![0; buffer.length as usize];
        self.memory.read_slice(&mut bytes, GuestAddress(buffer.address)).unwrap();
        bytes
    }
}

/// Cuts a length into pieces at arbitrary places.
pub fn pieces(length: usize) -> impl Strategy<Value = Vec<usize>> {
    proptest::collection::vec(0..=length, 0..4).prop_map(move |mut cuts| {
        cuts.sort_unstable();
        cuts.push(length);
        let mut at = 0;
        cuts.into_iter()
            .map(|cut| {
                let piece = cut - at;
                at = cut;
                piece
            })
            .filter(|piece| *piece > 0)
            .collect()
    })
}

/// A queue as a hostile guest may write it: descriptors that point anywhere, loop, and lie.
#[derive(Clone, Debug)]
pub struct Hostile {
    descriptors: Vec<(u64, u32, u16, u16)>,
    available: Vec<u16>,
    index: u16,
}

pub fn hostile() -> impl Strategy<Value = Hostile> {
    let address = prop_oneof![0..0x50_0000_u64, Just(u64::MAX - 8), any::<u64>()];
    let length = prop_oneof![0..5000_u32, Just(u32::MAX), any::<u32>()];
    let descriptor = (address, length, 0..8_u16, 0..20_u16);
    (
        proptest::collection::vec(descriptor, 16),
        proptest::collection::vec(0..20_u16, 16),
        prop_oneof![0..17_u16, any::<u16>()],
    )
        .prop_map(|(descriptors, available, index)| Hostile { descriptors, available, index })
}

impl Hostile {
    /// Writes it over a driver's queue of 16.
    pub fn write(&self, driver: &Driver) {
        for (n, (address, length, flags, next)) in self.descriptors.iter().enumerate() {
            let at = DESCRIPTORS + 16 * n as u64;
            driver.memory.write_obj(*address, GuestAddress(at)).unwrap();
            driver.memory.write_obj(*length, GuestAddress(at + 8)).unwrap();
            driver.memory.write_obj(*flags, GuestAddress(at + 12)).unwrap();
            driver.memory.write_obj(*next, GuestAddress(at + 14)).unwrap();
        }
        for (n, head) in self.available.iter().enumerate() {
            driver.memory.write_obj(*head, GuestAddress(AVAILABLE + 4 + 2 * n as u64)).unwrap();
        }
        driver.memory.write_obj(self.index, GuestAddress(AVAILABLE + 2)).unwrap();
    }
}
