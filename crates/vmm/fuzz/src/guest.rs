//! What a guest writes into its memory: queues whose rings mostly hold, with buffers mostly inside memory.
//!
//! ```text
//! 0x0_0000 ┬ queue 0: descriptors, available ring at +0x1000, used ring at +0x2000
//! 0x0_4000 ┼ queue 1, and so on
//! 0x2_0000 ┼ slots of 4 KiB: buffers and indirect tables
//! 0x10_0000 ┴ end of memory
//! ```

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use roost_vmm::memory::{self, Memory};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

/// Memory of the guest, MiB.
pub const MEMORY_MIB: u64 = 1;
const END: u64 = MEMORY_MIB << 20;
const QUEUE_BYTES: u64 = 0x4000;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const SLOTS: u64 = 0x2_0000;
const SLOT_BYTES: u64 = 0x1000;

/// Fresh memory.
pub fn memory() -> Memory {
    memory::create(MEMORY_MIB).unwrap()
}

/// Where something lies.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Place {
    /// In one of 16 slots.
    Slot(u8, u8),
    /// The same: most places are.
    OtherSlot(u8, u8),
    /// Over the queues.
    Queues(u16),
    /// Around the end of memory.
    End(u8),
    Anywhere(u64),
}

impl Place {
    pub fn address(self) -> u64 {
        match self {
            Self::Slot(slot, offset) | Self::OtherSlot(slot, offset) => {
                SLOTS + u64::from(slot % 16) * SLOT_BYTES + u64::from(offset)
            }
            Self::Queues(offset) => offset.into(),
            Self::End(before) => END + 16 - u64::from(before),
            Self::Anywhere(address) => address,
        }
    }
}

#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Size {
    Few(u8),
    Sectors(u8),
    Some(u16),
    Any(u32),
}

impl Size {
    pub fn bytes(self) -> u32 {
        match self {
            Self::Few(bytes) => bytes.into(),
            Self::Sectors(count) => 512 * u32::from(count % 16),
            Self::Some(bytes) => bytes.into(),
            Self::Any(bytes) => bytes,
        }
    }
}

/// A descriptor. Flags are those of virtio 1.2, 2.7.5: 1 next, 2 writable, 4 indirect.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub struct Descriptor {
    place: Place,
    size: Size,
    flags: u8,
    next: u8,
}

impl Descriptor {
    fn bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.place.address().to_le_bytes());
        bytes[8..12].copy_from_slice(&self.size.bytes().to_le_bytes());
        bytes[12..14].copy_from_slice(&u16::from(self.flags & 7).to_le_bytes());
        bytes[14..].copy_from_slice(&u16::from(self.next).to_le_bytes());
        bytes
    }

    fn end(self) -> u64 {
        self.place.address().saturating_add(self.size.bytes().into())
    }
}

/// What a slot holds.
#[derive(Arbitrary, Clone, Debug)]
pub enum Content {
    Bytes(Vec<u8>),
    /// An indirect table.
    Table(Vec<Descriptor>),
}

/// What the guest does between two turns of the device.
#[derive(Arbitrary, Clone, Debug)]
pub struct Batch {
    slots: Vec<(u8, Content)>,
    descriptors: Vec<Descriptor>,
    heads: Vec<u8>,
    /// The available index says more or less than there is.
    lie: Option<u16>,
    used_event: u16,
}

/// How a queue is set up.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub struct Setup {
    size: u8,
    event_idx: bool,
    /// Where both indices begin, so that they wrap.
    start: u16,
}

/// A queue of the guest: what is in memory, and the device's view.
pub struct Ring {
    base: u64,
    pub size: u16,
    start: u16,
    available: u16,
    /// Whether rings and tables are the guest's alone: no lie about the index, no buffer that lies over them.
    honest: bool,
    highest: u64,
    pub queue: Queue,
}

impl Ring {
    /// The queue of this number, with nothing in it.
    pub fn new(memory: &Memory, setup: Setup, number: u64) -> Self {
        let base = number * QUEUE_BYTES;
        let size = 1 << (setup.size % 9);
        let mut queue = Queue::new(256).unwrap();
        queue.set_size(size);
        let low = |address: u64| Some(u32::try_from(address).unwrap());
        queue.set_desc_table_address(low(base), None);
        queue.set_avail_ring_address(low(base + AVAILABLE), None);
        queue.set_used_ring_address(low(base + USED), None);
        queue.set_event_idx(setup.event_idx);
        queue.set_next_avail(setup.start);
        queue.set_next_used(setup.start);
        queue.set_ready(true);
        assert!(queue.is_valid(memory));
        for ring in [AVAILABLE, USED] {
            memory.write_obj(setup.start, GuestAddress(base + ring + 2)).unwrap();
        }
        let (start, available) = (setup.start, setup.start);
        Self { base, size, start, available, honest: true, highest: SLOTS, queue }
    }

    /// Addresses of the three parts.
    pub fn addresses(&self) -> [u64; 3] {
        [self.base, self.base + AVAILABLE, self.base + USED]
    }

    /// Writes a batch.
    pub fn write(&mut self, memory: &Memory, batch: &Batch) {
        for (slot, content) in &batch.slots {
            let bytes = match content {
                Content::Bytes(bytes) => bytes.clone(),
                Content::Table(table) => {
                    table.iter().for_each(|descriptor| self.look(*descriptor));
                    table.iter().flat_map(|descriptor| descriptor.bytes()).collect()
                }
            };
            let bytes = &bytes[..bytes.len().min(2 * SLOT_BYTES as usize)];
            memory.write_slice(bytes, GuestAddress(Place::Slot(*slot, 0).address())).unwrap();
        }
        for (number, descriptor) in batch.descriptors.iter().take(self.size.into()).enumerate() {
            self.look(*descriptor);
            memory.write_slice(&descriptor.bytes(), GuestAddress(self.base + 16 * number as u64)).unwrap();
        }
        for head in batch.heads.iter().take(self.size.into()) {
            let at = self.base + AVAILABLE + 4 + 2 * u64::from(self.available % self.size);
            memory.write_obj(u16::from(*head), GuestAddress(at)).unwrap();
            self.available = self.available.wrapping_add(1);
        }
        if let Some(lie) = batch.lie {
            self.available = self.available.wrapping_add(lie);
            self.honest = false;
        }
        let event = self.base + AVAILABLE + 4 + 2 * u64::from(self.size);
        memory.write_obj(batch.used_event, GuestAddress(event)).unwrap();
        memory.write_obj(self.available, GuestAddress(self.base + AVAILABLE + 2)).unwrap();
    }

    fn look(&mut self, descriptor: Descriptor) {
        if descriptor.flags & 2 != 0 {
            self.honest &= matches!(descriptor.place, Place::Slot(..) | Place::OtherSlot(..));
            self.highest = self.highest.max(descriptor.end());
        }
        // An indirect table may lie where a device has written.
        self.honest &= descriptor.flags & 4 == 0;
    }

    /// What is no device's to write: descriptors and available ring, and what lies behind every buffer of this queue.
    fn own(&self, memory: &Memory) -> Vec<u8> {
        let beyond = self.highest.min(END);
        let behind = SLOT_BYTES.min(END - beyond);
        let mut bytes = vec![0; (USED + behind) as usize];
        let (rings, rest) = bytes.split_at_mut(USED as usize);
        memory.read_slice(rings, GuestAddress(self.base)).unwrap();
        if behind > 0 {
            memory.read_slice(rest, GuestAddress(beyond)).unwrap();
        }
        bytes
    }

    /// Lets the device take its turn, and checks what it left behind.
    pub fn turn<T>(&mut self, memory: &Memory, turn: impl FnOnce(&mut Queue) -> T) -> T {
        let before = self.honest.then(|| self.own(memory));
        let result = turn(&mut self.queue);
        let Some(before) = before else { return result };
        assert!(before == self.own(memory), "the device wrote over its rings or behind its buffers");
        let used: u16 = memory.read_obj(GuestAddress(self.base + USED + 2)).unwrap();
        let (given, taken) = (self.available.wrapping_sub(self.start), used.wrapping_sub(self.start));
        assert!(taken <= given, "{taken} chains are used of {given} that were given");
        result
    }
}
