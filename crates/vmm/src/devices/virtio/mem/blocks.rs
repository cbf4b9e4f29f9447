//! Which blocks of the region the guest has: pure state (virtio 1.2, 5.15.5).

use serde::{Deserialize, Serialize};

use crate::memory::Range;

/// What is kept of a device: all but the region, which the configuration says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemState {
    /// Bytes that the guest should have.
    pub requested: u64,
    /// A bit per block, from the lowest bit of the first word up: the guest has it.
    pub plugged: Vec<u64>,
}

/// Why a request is not granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It would be more than the host wants the guest to have.
    TooMuch,
    /// It makes no sense.
    Error,
}

/// What blocks are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The guest has them all.
    Plugged,
    /// It has none of them.
    Unplugged,
    /// It has some.
    Mixed,
}

/// The region and its blocks.
#[derive(Debug)]
pub struct Blocks {
    region: Range,
    block_size: u64,
    requested: u64,
    plugged: Vec<u64>,
    /// Blocks in `plugged`.
    count: u64,
}

/// Blocks of a word of the set.
const WORD: u64 = 64;

impl Blocks {
    /// A region of whole blocks, of which the guest has none.
    #[must_use]
    pub fn new(region: Range, block_size: u64) -> Self {
        let words = (region.size / block_size).div_ceil(WORD);
        let plugged = vec![0; usize::try_from(words).unwrap_or(0)];
        Self { region, block_size, requested: 0, plugged, count: 0 }
    }

    /// Where the region is.
    #[must_use]
    pub const fn region(&self) -> Range {
        self.region
    }

    /// Bytes of a block.
    #[must_use]
    pub const fn block_size(&self) -> u64 {
        self.block_size
    }

    /// Bytes that the guest should have.
    #[must_use]
    pub const fn requested(&self) -> u64 {
        self.requested
    }

    /// Bytes that the guest has.
    #[must_use]
    pub const fn plugged(&self) -> u64 {
        self.count * self.block_size
    }

    /// Sets what the guest should have, in whole blocks.
    pub fn request(&mut self, bytes: u64) {
        self.requested = bytes.min(self.region.size) / self.block_size * self.block_size;
    }

    /// What is to be kept.
    #[must_use]
    pub fn state(&self) -> MemState {
        MemState { requested: self.requested, plugged: self.plugged.clone() }
    }

    /// Puts in place what was kept. `false`: it does not fit this region, and nothing has changed.
    #[must_use]
    pub fn restore(&mut self, state: MemState) -> bool {
        let blocks = self.region.size / self.block_size;
        let beyond = if blocks.is_multiple_of(WORD) { 0 } else { u64::MAX << (blocks % WORD) };
        let fits = state.plugged.len() == self.plugged.len()
            && state.plugged.last().is_none_or(|last| last & beyond == 0)
            && state.requested <= self.region.size
            && state.requested.is_multiple_of(self.block_size);
        if fits {
            self.count = state.plugged.iter().map(|word| u64::from(word.count_ones())).sum();
            self.requested = state.requested;
            self.plugged = state.plugged;
        }
        fits
    }

    /// The numbers of `count` blocks from an address on; `None` if that is nothing, or not of blocks of the region.
    fn indices(&self, address: u64, count: u16) -> Option<std::ops::Range<u64>> {
        let offset = address.checked_sub(self.region.start)?;
        let first = offset / self.block_size;
        let end = first.checked_add(count.into())?;
        let inside = count > 0 && offset.is_multiple_of(self.block_size);
        (inside && end <= self.region.size / self.block_size).then_some(first..end)
    }

    fn word(&mut self, index: u64) -> Option<(&mut u64, u64)> {
        let word = usize::try_from(index / WORD).ok().and_then(|at| self.plugged.get_mut(at))?;
        Some((word, 1 << (index % WORD)))
    }

    fn kind_of(&self, indices: std::ops::Range<u64>) -> Kind {
        let total = indices.end - indices.start;
        let has = |index: &u64| {
            let word = usize::try_from(index / WORD).ok().and_then(|at| self.plugged.get(at));
            word.is_some_and(|word| word >> (index % WORD) & 1 == 1)
        };
        match indices.filter(has).count() as u64 {
            0 => Kind::Unplugged,
            all if all == total => Kind::Plugged,
            _ => Kind::Mixed,
        }
    }

    fn set(&mut self, indices: std::ops::Range<u64>, plugged: bool) -> Range {
        let range = Range {
            start: self.region.start + indices.start * self.block_size,
            size: (indices.end - indices.start) * self.block_size,
        };
        for index in indices.clone() {
            let Some((word, bit)) = self.word(index) else { continue };
            if plugged {
                *word |= bit;
            } else {
                *word &= !bit;
            }
        }
        let blocks = indices.end - indices.start;
        self.count = if plugged { self.count + blocks } else { self.count - blocks };
        range
    }

    /// The guest takes blocks, of which it must have none.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn plug(&mut self, address: u64, count: u16) -> Result<Range, Refusal> {
        let indices = self.indices(address, count).ok_or(Refusal::Error)?;
        if self.kind_of(indices.clone()) != Kind::Unplugged {
            return Err(Refusal::Error);
        }
        if self.plugged() + u64::from(count) * self.block_size > self.requested {
            return Err(Refusal::TooMuch);
        }
        Ok(self.set(indices, true))
    }

    /// The guest gives blocks, all of which it must have.
    ///
    /// # Errors
    /// [`Refusal::Error`].
    pub fn unplug(&mut self, address: u64, count: u16) -> Result<Range, Refusal> {
        let indices = self.indices(address, count).ok_or(Refusal::Error)?;
        if self.kind_of(indices.clone()) != Kind::Plugged {
            return Err(Refusal::Error);
        }
        Ok(self.set(indices, false))
    }

    /// The guest has none any more. Returns how many bytes it had.
    pub fn unplug_all(&mut self) -> u64 {
        let had = self.plugged();
        self.plugged.fill(0);
        self.count = 0;
        had
    }

    /// What blocks are.
    ///
    /// # Errors
    /// [`Refusal::Error`].
    pub fn kind(&self, address: u64, count: u16) -> Result<Kind, Refusal> {
        self.indices(address, count).map(|indices| self.kind_of(indices)).ok_or(Refusal::Error)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const START: u64 = 5 << 30;
    const BLOCK: u64 = 2 << 20;

    fn blocks(count: u64) -> Blocks {
        Blocks::new(Range { start: START, size: count * BLOCK }, BLOCK)
    }

    #[test]
    fn a_guest_takes_no_more_than_it_should_have() {
        let mut blocks = blocks(100);
        assert_eq!(blocks.plug(START, 1), Err(Refusal::TooMuch));
        blocks.request(3 * BLOCK + 5);
        assert_eq!(blocks.plug(START, 4), Err(Refusal::TooMuch));
        assert_eq!(blocks.plug(START + BLOCK, 2), Ok(Range { start: START + BLOCK, size: 2 * BLOCK }));
        assert_eq!(blocks.plug(START, 2), Err(Refusal::Error), "one of them is there already");
        assert_eq!(blocks.kind(START, 2), Ok(Kind::Mixed));
        assert_eq!(blocks.kind(START + BLOCK, 2), Ok(Kind::Plugged));
        assert_eq!(blocks.kind(START + 3 * BLOCK, 97), Ok(Kind::Unplugged));
        blocks.request(0);
        assert_eq!((blocks.plugged(), blocks.requested()), (2 * BLOCK, 0));
        assert_eq!(blocks.unplug(START, 2), Err(Refusal::Error));
        assert_eq!(blocks.unplug(START + 2 * BLOCK, 1), Ok(Range { start: START + 2 * BLOCK, size: BLOCK }));
        assert_eq!(blocks.unplug_all(), BLOCK);
        assert_eq!(blocks.plugged(), 0);
    }

    #[test]
    fn what_is_not_of_blocks_of_the_region_is_an_error() {
        let mut blocks = blocks(70);
        blocks.request(70 * BLOCK);
        for (address, count) in [
            (START - BLOCK, 1),
            (START + 1, 1),
            (START, 0),
            (START, 71),
            (START + 70 * BLOCK, 1),
            (START + 69 * BLOCK, 2),
            (0, 1),
            (u64::MAX, u16::MAX),
            (u64::MAX - BLOCK + 1, 1),
        ] {
            assert_eq!(blocks.plug(address, count), Err(Refusal::Error), "{address:#x} {count}");
            assert_eq!(blocks.unplug(address, count), Err(Refusal::Error));
            assert_eq!(blocks.kind(address, count), Err(Refusal::Error));
        }
        assert!(blocks.plug(START, 70).is_ok());
    }

    #[test]
    fn only_a_state_that_fits_is_restored() {
        let mut one = blocks(70);
        one.request(70 * BLOCK);
        one.plug(START + 60 * BLOCK, 10).unwrap();
        let kept = one.state();
        let mut other = blocks(70);
        assert!(other.restore(kept.clone()));
        assert_eq!((other.state(), other.plugged()), (kept.clone(), 10 * BLOCK));
        for broken in [
            MemState { requested: 71 * BLOCK, ..kept.clone() },
            MemState { requested: 1, ..kept.clone() },
            MemState { plugged: vec![0; 3], ..kept.clone() },
            MemState { plugged: vec![0, 1 << 6], ..kept.clone() },
        ] {
            assert!(!other.restore(broken.clone()), "{broken:?}");
        }
        assert_eq!(other.state(), kept);
    }

    proptest! {
        /// Against a set of numbers, which is what a guest believes to have.
        #[test]
        fn blocks_are_a_set(
            steps in proptest::collection::vec((0..4_u8, 0..140_u64, 0..80_u16, 0..150_u64), 1..60)
        ) {
            let (mut blocks, mut model) = (blocks(130), BTreeSet::new());
            for (step, first, count, requested) in steps {
                let address = START + first * BLOCK;
                let these: BTreeSet<u64> = (first..first + u64::from(count)).collect();
                let inside = count > 0 && first + u64::from(count) <= 130;
                match step {
                    0 => blocks.request(requested * BLOCK),
                    1 => {
                        let free = inside && model.is_disjoint(&these);
                        let room = (model.len() + these.len()) as u64 * BLOCK <= blocks.requested();
                        let plugged = blocks.plug(address, count);
                        prop_assert_eq!(plugged.is_ok(), free && room);
                        if plugged.is_ok() {
                            model.extend(these);
                        }
                    }
                    2 => {
                        let all = inside && these.is_subset(&model);
                        prop_assert_eq!(blocks.unplug(address, count).is_ok(), all);
                        if all {
                            model.retain(|index| !these.contains(index));
                        }
                    }
                    _ => {
                        let kind = blocks.kind(address, count);
                        let had = these.intersection(&model).count();
                        prop_assert_eq!(kind.is_ok(), inside);
                        prop_assert_eq!(kind == Ok(Kind::Unplugged), inside && had == 0);
                        prop_assert_eq!(kind == Ok(Kind::Plugged), inside && had == these.len());
                    }
                }
                prop_assert_eq!(blocks.plugged(), model.len() as u64 * BLOCK);
            }
        }
    }
}
