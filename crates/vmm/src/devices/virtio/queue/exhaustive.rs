//! Index arithmetic of a queue, beside a model that counts without end.
//!
//! Scope: every one of the 2^16 places where both indices may stand, for a queue of 4 with 0 to 6 chains made available; and for
//! queues of 1, 2, 4 and 8 around the wrap: every number of chains that a turn takes before it is told to stop, every place of the
//! event index nearby, and every sequence of four turns.

use super::*;
use crate::devices::virtio::testing::{AVAILABLE, DESCRIPTORS, USED};
use crate::memory;
use vm_memory::{Bytes, GuestAddress};

/// Both sides of a queue. Entry n of the available ring, counted without end, has head `3 n mod size`.
struct Model {
    memory: Memory,
    queue: Queue,
    size: u16,
    start: u16,
    given: u64,
    taken: u64,
}

impl Model {
    fn new(memory: &Memory, size: u16, start: u16) -> Self {
        let mut queue = Queue::new(size).unwrap();
        queue.set_desc_table_address(Some(DESCRIPTORS as u32), None);
        queue.set_avail_ring_address(Some(AVAILABLE as u32), None);
        queue.set_used_ring_address(Some(USED as u32), None);
        queue.set_next_avail(start);
        queue.set_next_used(start);
        queue.set_ready(true);
        let model = Self { memory: memory.clone(), queue, size, start, given: 0, taken: 0 };
        model.put(AVAILABLE + 2, start);
        model.put(USED + 2, start);
        model
    }

    fn put(&self, at: u64, value: u16) {
        self.memory.write_obj(value, GuestAddress(at)).unwrap();
    }

    fn get<T: vm_memory::ByteValued>(&self, at: u64) -> T {
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }

    fn index(&self, count: u64) -> u16 {
        self.start.wrapping_add(count as u16)
    }

    fn head(&self, n: u64) -> u16 {
        (3 * n % u64::from(self.size)) as u16
    }

    fn give(&mut self, chains: u64) {
        for n in self.given..self.given + chains {
            let slot = self.index(n) % self.size;
            self.put(AVAILABLE + 4 + 2 * u64::from(slot), self.head(n));
        }
        self.given += chains;
        self.put(AVAILABLE + 2, self.index(self.given));
    }

    /// A turn that is told to stop after so many chains; everything about it is compared. `event`: where the guest wants its
    /// interrupt, if it uses the event index.
    fn turn(&mut self, most: u64, event: Option<u16>) {
        self.queue.set_event_idx(event.is_some());
        self.put(AVAILABLE + 4 + 2 * u64::from(self.size), event.unwrap_or(0));
        let before = self.taken;
        let mut heads = Vec::new();
        let turn = drain_while(&mut self.queue, &self.memory, |chain| match chain {
            None => ((heads.len() as u64) < most).then_some(0),
            Some(chain) => {
                heads.push(chain.head_index());
                Some(7)
            }
        });
        let waiting = self.given - before;
        let here = format!("size {} at {:#x}: {waiting} waiting, at most {most}", self.size, self.start);
        if waiting > u64::from(self.size) && most > 0 {
            assert!(turn.is_err() && heads.is_empty(), "{here}: {turn:?}");
            return;
        }
        self.taken += waiting.min(most);
        let expected: Vec<u16> = (before..self.taken).map(|n| self.head(n)).collect();
        assert_eq!(heads, expected, "{here}");
        assert_eq!(self.get::<u16>(USED + 2), self.index(self.taken), "{here}");
        for n in before.max(self.taken.saturating_sub(self.size.into()))..self.taken {
            let entry = USED + 4 + 8 * u64::from(self.index(n) % self.size);
            assert_eq!(
                (self.get::<u32>(entry), self.get::<u32>(entry + 4)),
                (self.head(n).into(), 7),
                "{here}"
            );
        }
        // virtio 1.2, 2.7.10: an interrupt when the used index passes the event index, modulo 2^16.
        let passes = |event: u16| (before..self.taken).any(|n| self.index(n) == event);
        let interrupt = self.taken > before && event.is_none_or(passes);
        assert_eq!(turn, Ok(Turn { interrupt, more: false }), "{here}, event {event:?}");
        if event.is_some() && waiting < most {
            let asked: u16 = self.get(USED + 4 + 8 * u64::from(self.size));
            assert_eq!(asked, self.index(self.taken), "{here}: the bell is wanted for the next chain");
        }
    }
}

#[test]
fn every_place_of_the_indices() {
    let memory = memory::create(1).unwrap();
    for start in 0..=u16::MAX {
        for given in 0..=6 {
            let mut model = Model::new(&memory, 4, start);
            model.give(given);
            model.turn(u64::MAX, None);
        }
    }
}

/// Where indices wrap, and where they do not.
const STARTS: [u16; 8] = [0, 1, 0x7ffe, 0x7fff, 0x8000, 0xfffc, 0xfffe, 0xffff];

#[test]
fn every_stop_and_every_event_around_the_wrap() {
    let memory = memory::create(1).unwrap();
    for (size, start) in [1, 2, 4, 8].into_iter().flat_map(|size| STARTS.map(|start| (size, start))) {
        for given in 0..=u64::from(size) + 1 {
            for most in 0..=given + 1 {
                let events = (0..=12).map(|event| Some(start.wrapping_add(event).wrapping_sub(2)));
                for event in events.chain([None, Some(start.wrapping_add(0x8000))]) {
                    let mut model = Model::new(&memory, size, start);
                    model.give(given);
                    model.turn(most, event);
                }
            }
        }
    }
}

#[test]
fn every_sequence_of_four_turns_around_the_wrap() {
    let memory = memory::create(1).unwrap();
    for (size, start) in [1, 2, 4].into_iter().flat_map(|size| STARTS.map(|start| (size, start))) {
        let choices = u64::from(size) + 1;
        for sequence in 0..(choices * choices).pow(4) {
            // All of the smaller queues; of the largest one every seventh, which shares no factor with the choices.
            if size == 4 && sequence % 7 != 0 {
                continue;
            }
            let mut model = Model::new(&memory, size, start);
            let mut rest = sequence;
            for _ in 0..4 {
                let (give, most) = (rest % choices, rest / choices % choices);
                rest /= choices * choices;
                let room = u64::from(size) - (model.given - model.taken);
                model.give(give.min(room));
                model.turn(most, Some(start));
            }
        }
    }
}
