//! Requests that are under way: what is needed to answer them once the host is done.

use vm_memory::GuestAddress;

use super::engine::ROOM;

/// What a request was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// A read.
    Read,
    /// A write.
    Write,
    /// A discard.
    Discard,
    /// Zeroes.
    Zero,
    /// A flush.
    Flush,
}

/// A request that the host works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket {
    /// The chain's head.
    pub head: u16,
    /// Where the answer goes.
    pub status: GuestAddress,
    /// What it was.
    pub what: What,
    /// Where on the disk, bytes.
    pub offset: u64,
    /// Bytes that are moved or cleared.
    pub bytes: u64,
}

/// All requests of a disk that are under way, each with its queue and under its token.
#[derive(Debug, Default)]
pub struct InFlight {
    slots: Vec<Option<(usize, Ticket)>>,
    free: Vec<u16>,
    /// Queues that were left because there was no room, one bit each.
    stalled: u64,
}

impl InFlight {
    /// Whether nothing is under way.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    /// Whether one more request has room; if not, the queue is noted as one to look at again.
    pub fn has_room(&mut self, queue: usize) -> bool {
        let room = !self.free.is_empty() || self.slots.len() < ROOM;
        if !room {
            self.stall(1 << queue);
        }
        room
    }

    /// Notes queues that must be looked at again.
    pub const fn stall(&mut self, queues: u64) {
        self.stalled |= queues;
    }

    /// The queues to look at again, one bit each; they are forgotten.
    pub const fn take_stalled(&mut self) -> u64 {
        std::mem::replace(&mut self.stalled, 0)
    }

    /// Notes a request; returns its token, `None` without room.
    pub fn add(&mut self, queue: usize, ticket: Ticket) -> Option<u16> {
        let token = match self.free.pop() {
            Some(token) => token,
            None if self.slots.len() < ROOM => {
                self.slots.push(None);
                u16::try_from(self.slots.len() - 1).ok()?
            }
            None => return None,
        };
        *self.slots.get_mut(usize::from(token))? = Some((queue, ticket));
        Some(token)
    }

    /// Takes a request that is finished, with its queue.
    pub fn take(&mut self, token: u16) -> Option<(usize, Ticket)> {
        let taken = self.slots.get_mut(usize::from(token))?.take()?;
        self.free.push(token);
        Some(taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ticket(head: u16) -> Ticket {
        Ticket { head, status: GuestAddress(u64::from(head)), what: What::Read, offset: 0, bytes: 1 }
    }

    proptest! {
        /// Whatever is finished when: a token names one request, room is what it is, and nothing is lost.
        #[test]
        fn every_request_comes_back_once(steps in proptest::collection::vec((any::<bool>(), any::<prop::sample::Index>()), 1..600)) {
            let mut flying = InFlight::default();
            let mut there: Vec<(u16, u16)> = Vec::new();
            for (n, (adds, which)) in steps.iter().enumerate() {
                let head = n as u16;
                if *adds {
                    prop_assert_eq!(flying.has_room(3), there.len() < ROOM);
                    prop_assert_eq!(flying.take_stalled(), if there.len() < ROOM { 0 } else { 8 });
                    let token = flying.add(usize::from(head % 4), ticket(head));
                    prop_assert_eq!(token.is_some(), there.len() < ROOM);
                    there.extend(token.map(|token| (token, head)));
                } else if !there.is_empty() {
                    let (token, head) = there.swap_remove(which.index(there.len()));
                    prop_assert_eq!(flying.take(token), Some((usize::from(head % 4), ticket(head))));
                    prop_assert_eq!(flying.take(token), None);
                }
                prop_assert_eq!(flying.is_empty(), there.is_empty());
                let mut tokens: Vec<u16> = there.iter().map(|(token, _)| *token).collect();
                tokens.sort_unstable();
                tokens.dedup();
                prop_assert_eq!(tokens.len(), there.len());
            }
        }
    }

    #[test]
    fn tokens_that_nobody_gave_are_nothing() {
        let mut flying = InFlight::default();
        assert_eq!((flying.take(0), flying.take(u16::MAX)), (None, None));
    }
}
