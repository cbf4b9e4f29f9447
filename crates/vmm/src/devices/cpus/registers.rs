//! Which CPUs are in the machine, and what the guest's registers say and do about it: pure state.

use serde::{Deserialize, Serialize};

use crate::layout::MAX_VCPUS;

/// Bit of a register: the CPU is in the machine (read).
pub const PLUGGED: u8 = 1;
/// Bit of a register: it came since the guest last said that it has seen so (read); seen (write).
pub const INSERTING: u8 = 1 << 1;
/// Bit of a register: the host asks for it, and the guest has not said yet that it has seen so (read); seen (write).
pub const REMOVING: u8 = 1 << 2;
/// Bit of a register: the guest lets go of the CPU (write).
pub const EJECT: u8 = 1 << 3;

/// All there is to know. A set of CPUs is a bit per vCPU; vCPU 0 is always in the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpusState {
    /// CPUs that the machine can have, 1–32.
    pub max: u8,
    /// CPUs that the host wants the guest to have, 1–`max`.
    pub wanted: u8,
    /// CPUs in the machine.
    pub plugged: u32,
    /// Of these: came, and the guest has not looked yet.
    pub inserting: u32,
    /// Of these: the host asks for them, and the guest has not looked yet.
    pub removing: u32,
    /// Of these: the host asks for them, seen or not.
    pub leaving: u32,
}

/// The first `count` CPUs.
fn first(count: u8) -> u32 {
    u32::MAX >> (32 - u32::from(count.clamp(1, MAX_VCPUS)))
}

/// The numbers of the CPUs in a set, from below.
pub fn members(set: u32) -> impl DoubleEndedIterator<Item = u8> {
    (0..MAX_VCPUS).filter(move |id| set >> id & 1 == 1)
}

impl CpusState {
    /// A machine that has the first `count` of `max` CPUs.
    #[must_use]
    pub fn new(count: u8, max: u8) -> Self {
        let max = max.clamp(1, MAX_VCPUS);
        let count = count.clamp(1, max);
        Self { max, wanted: count, plugged: first(count), inserting: 0, removing: 0, leaving: 0 }
    }

    /// Whether these numbers can be: what comes from outside is checked with this.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        let sets = self.inserting | self.removing | self.leaving;
        (1..=MAX_VCPUS).contains(&self.max)
            && (1..=self.max).contains(&self.wanted)
            && self.plugged & 1 == 1
            && self.plugged & !first(self.max) == 0
            && sets & !self.plugged == 0
            && self.removing & !self.leaving == 0
            && self.leaving & 1 == 0
    }

    /// Whether a CPU is in the machine.
    #[must_use]
    pub const fn has(&self, id: u8) -> bool {
        id < MAX_VCPUS && self.plugged >> id & 1 == 1
    }

    /// CPUs in the machine that the guest knows of.
    #[must_use]
    pub const fn taken(&self) -> u32 {
        (self.plugged & !self.inserting).count_ones()
    }

    /// The host wants `count` CPUs from now on, at most `max`. The lowest come first and the highest go first; what it asked for
    /// before and the guest has not given is asked for again. Returns the set that has just come.
    pub fn want(&mut self, count: u8) -> u32 {
        self.wanted = count.clamp(1, self.max);
        let wanted = u32::from(self.wanted);
        let staying = |state: &Self| (state.plugged & !state.leaving).count_ones();
        // Those that were asked for but are still here stay, before others come.
        while staying(self) < wanted && self.leaving != 0 {
            self.leaving &= self.leaving - 1;
        }
        let mut came = 0;
        while staying(self) < wanted {
            let free = !self.plugged & first(self.max);
            let lowest = free & free.wrapping_neg();
            self.plugged |= lowest;
            came |= lowest;
        }
        while staying(self) > wanted {
            let Some(highest) = members(self.plugged & !self.leaving).next_back() else { break };
            self.leaving |= 1 << highest;
        }
        self.inserting = (self.inserting | came) & !self.leaving;
        self.removing = self.leaving;
        came
    }

    /// The power-on state: the CPUs that the host wants are in the machine.
    pub fn reset(&mut self) {
        *self = Self::new(self.wanted, self.max);
    }

    /// A guest's read of register number `id`.
    #[must_use]
    pub fn read(&self, id: u8) -> u8 {
        if id >= MAX_VCPUS {
            return 0;
        }
        let bit = |set: u32, bit: u8| if set >> id & 1 == 1 { bit } else { 0 };
        bit(self.plugged, PLUGGED) | bit(self.inserting, INSERTING) | bit(self.removing, REMOVING)
    }

    /// A guest's write to register number `id`. True: it has let go of the CPU, which is not in the machine any more.
    #[must_use]
    pub fn write(&mut self, id: u8, value: u8) -> bool {
        if !self.has(id) {
            return false;
        }
        let cpu = 1_u32 << id;
        if value & INSERTING != 0 {
            self.inserting &= !cpu;
        }
        if value & REMOVING != 0 {
            self.removing &= !cpu;
        }
        let ejected = value & EJECT != 0 && id != 0;
        if ejected {
            for set in [&mut self.plugged, &mut self.inserting, &mut self.removing, &mut self.leaving] {
                *set &= !cpu;
            }
        }
        ejected
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(state: &CpusState) -> Vec<u8> {
        (0..state.max).map(|id| state.read(id)).collect()
    }

    #[test]
    fn cpus_come_are_seen_and_go() {
        let mut state = CpusState::new(1, 4);
        assert_eq!(read(&state), [PLUGGED, 0, 0, 0]);
        assert_eq!(state.want(3), 0b110);
        assert_eq!(read(&state), [1, 3, 3, 0]);
        assert_eq!(state.taken(), 1);
        assert!(!state.write(1, INSERTING));
        assert_eq!((read(&state), state.taken()), (vec![1, 1, 3, 0], 2));
        // The guest has not seen number 2 yet, and never will.
        assert_eq!(state.want(1), 0);
        assert_eq!(read(&state), [1, 5, 5, 0]);
        assert!(!state.write(1, REMOVING));
        assert_eq!(read(&state), [1, 1, 5, 0]);
        assert!(state.write(1, EJECT) && state.write(2, EJECT));
        assert_eq!(read(&state), [1, 0, 0, 0]);
        assert!(!state.write(1, EJECT), "it is gone already");
    }

    #[test]
    fn a_cpu_that_was_asked_for_stays_when_it_is_wanted_again() {
        let mut state = CpusState::new(4, 4);
        assert_eq!((state.want(1), state.leaving), (0, 0b1110));
        assert_eq!((state.want(3), state.leaving, state.removing), (0, 0b1000, 0b1000));
        assert!(state.write(3, REMOVING | EJECT));
        // What the guest gave of itself comes back when the host says once more what it wants.
        assert!(state.write(1, EJECT));
        assert_eq!((state.want(3), state.plugged), (0b10, 0b111));
    }

    #[test]
    fn a_wish_that_is_repeated_is_said_again() {
        let mut state = CpusState::new(2, 2);
        state.want(1);
        assert!(!state.write(1, REMOVING));
        assert_eq!(state.read(1), PLUGGED);
        state.want(1);
        assert_eq!(state.read(1), PLUGGED | REMOVING);
        state.reset();
        assert_eq!(state, CpusState::new(1, 2), "a reset settles what is wanted");
    }

    #[test]
    fn the_first_cpu_stays() {
        let mut state = CpusState::new(2, 4);
        assert!(!state.write(0, 0xff));
        state.want(0);
        assert_eq!((state.wanted, state.leaving), (1, 0b10));
        assert_eq!(state.read(0), PLUGGED);
    }

    proptest! {
        #[test]
        fn whatever_host_and_guest_do_the_state_is_sound(
            count in 0..40_u8,
            max in 0..40_u8,
            steps in proptest::collection::vec((any::<bool>(), any::<u8>(), any::<u8>()), 0..60),
        ) {
            let mut state = CpusState::new(count, max);
            for (host, id, value) in steps {
                if host {
                    let before = state.plugged;
                    let came = state.want(id);
                    prop_assert_eq!(came & before, 0);
                    prop_assert_eq!((state.plugged & !state.leaving).count_ones(), u32::from(state.wanted));
                } else {
                    let had = state.has(id);
                    prop_assert_eq!(state.write(id, value), had && id != 0 && value & EJECT != 0);
                }
                prop_assert!(state.is_sound(), "{:?}", state);
                prop_assert_eq!(state.read(id) & PLUGGED != 0, state.has(id));
            }
            state.reset();
            prop_assert_eq!(state.plugged.count_ones(), u32::from(state.wanted));
        }
    }
}
