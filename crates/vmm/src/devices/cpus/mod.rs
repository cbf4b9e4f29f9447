//! CPUs that come and go while the machine runs (ACPI 6.5, 8.4 and 6.3).
//!
//! ```text
//!            want more                      the guest writes EJECT
//!   spare ─────────────▶ plugged ─────────────────────────────────▶ let go ──▶ spare
//!   (parked, as after    (runs; waits for INIT and SIPI,    (its vCPU may still run)  (parked and reset by
//!    power-on)            as KVM keeps it)                                             the main thread)
//! ```
//! All vCPUs are made before the lock-down. The guest learns of a change by the generic event device
//! ([`super::power::EVENT_CPUS`]), looks at one byte per vCPU ([`registers`]), which its DSDT does for it, and lets go of a CPU that
//! the host asks for when it wants to: like the balloon, this limits nobody that does not want to be limited. A vCPU that is not
//! plugged does not run, whatever its guest sends it. vCPU 0 stays.
//!
//! After a guest's reset the machine has the CPUs that the host last asked for: a board's firmware, too, finds the
//! processors that are in their sockets, and tells of them as enabled.

pub mod registers;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;
use vmm_sys_util::eventfd::EventFd;

use super::power::{EVENT_CPUS, Power};
use crate::bus::{BusDevice, Outcome};
use crate::layout::MAX_VCPUS;
use registers::{CpusState, members};

/// Size of the registers in port space.
pub const SIZE: u16 = MAX_VCPUS as u16;

/// The registers, and what follows from them.
#[derive(Debug)]
pub struct Cpus {
    inner: Mutex<Inner>,
    power: Arc<Power>,
    bell: EventFd,
}

#[derive(Debug)]
struct Inner {
    state: CpusState,
    /// CPUs that the guest has let go of, and that may still run.
    let_go: u32,
}

/// How many CPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Count {
    /// The host wants the guest to have.
    pub wanted: u8,
    /// Are in the machine: those that the guest should give back, and has not, too.
    pub plugged: u32,
    /// Of these the guest knows of.
    pub taken: u32,
}

impl Cpus {
    /// Registers of that state. `power` raises the event device's interrupt, `bell` calls the main thread when the guest lets
    /// go of a CPU.
    #[must_use]
    pub const fn new(state: CpusState, power: Arc<Power>, bell: EventFd) -> Self {
        Self { inner: Mutex::new(Inner { state, let_go: 0 }), power, bell }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state, to be kept.
    #[must_use]
    pub fn state(&self) -> CpusState {
        self.inner().state
    }

    /// Puts a state in place that was kept. `false`: it cannot be one of a machine with as many CPUs, and nothing has changed.
    #[must_use]
    pub fn restore(&self, state: CpusState) -> bool {
        let mut inner = self.inner();
        let fits = state.is_sound() && state.max == inner.state.max;
        if fits {
            *inner = Inner { state, let_go: 0 };
        }
        fits
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> Count {
        let state = self.state();
        Count { wanted: state.wanted, plugged: state.plugged.count_ones(), taken: state.taken() }
    }

    /// Whether a CPU is in the machine.
    #[must_use]
    pub fn has(&self, id: u8) -> bool {
        self.state().has(id)
    }

    /// The host wants so many, at most as many as the machine can have. Returns those that have just come, which must run
    /// before [`Cpus::announce`] tells the guest.
    pub fn want(&self, count: u8) -> Vec<u8> {
        members(self.inner().state.want(count)).collect()
    }

    /// Tells the guest to look at the registers.
    ///
    /// # Errors
    /// The interrupt could not be raised.
    pub fn announce(&self) -> std::io::Result<()> {
        self.power.raise(EVENT_CPUS)
    }

    /// Takes the CPUs that the guest has let go of: they must be parked, reset, and run again where [`Cpus::has`] says so.
    pub fn take_let_go(&self) -> Vec<u8> {
        members(std::mem::take(&mut self.inner().let_go)).collect()
    }

    /// As after power-on, with the CPUs that the host wants. All vCPUs must be parked, and reset after this.
    pub fn reset(&self) {
        let mut inner = self.inner();
        inner.state.reset();
        inner.let_go = 0;
    }
}

/// The CPUs whose registers are at an offset and behind it.
fn ids(offset: u64) -> impl Iterator<Item = u8> {
    u8::try_from(offset).unwrap_or(MAX_VCPUS)..MAX_VCPUS
}

impl BusDevice for Cpus {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let state = self.state();
        for (byte, id) in data.iter_mut().zip(ids(offset)) {
            *byte = state.read(id);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Outcome {
        let mut inner = self.inner();
        let before = inner.let_go;
        for (value, id) in data.iter().zip(ids(offset)) {
            if inner.state.write(id, *value) {
                inner.let_go |= 1 << id;
            }
        }
        if inner.let_go != before {
            // An eventfd write fails only when its counter is full, and then the main thread is called anyway.
            let _ = self.bell.write(1);
        }
        Outcome::Done
    }
}

#[cfg(test)]
mod tests {
    use super::registers::{EJECT, INSERTING, PLUGGED};
    use super::*;

    fn eventfd() -> EventFd {
        EventFd::new(libc::EFD_NONBLOCK).unwrap()
    }

    #[test]
    fn the_guest_is_told_and_the_main_thread_is_called() {
        let (line, bell) = (eventfd(), eventfd());
        let power = Arc::new(Power::new(line.try_clone().unwrap()));
        let cpus = Cpus::new(CpusState::new(1, 4), Arc::clone(&power), bell.try_clone().unwrap());
        assert_eq!(cpus.want(3), [1, 2]);
        assert!(line.read().is_err(), "only when they run");
        cpus.announce().unwrap();
        assert_eq!(line.read().unwrap(), 1);
        let mut event = [0];
        power.read(u64::from(super::super::power::EVENT), &mut event);
        assert_eq!(event, [EVENT_CPUS]);

        let mut bytes = [9; 4];
        cpus.read(0, &mut bytes);
        assert_eq!(bytes, [PLUGGED, PLUGGED | INSERTING, PLUGGED | INSERTING, 0]);
        // Four registers in one access, and some that are not there.
        cpus.write(1, &[INSERTING, EJECT, EJECT, EJECT]);
        assert_eq!((cpus.take_let_go(), cpus.take_let_go()), (vec![2], vec![]));
        assert_eq!(bell.read().unwrap(), 1);
        assert_eq!(cpus.count(), Count { wanted: 3, plugged: 2, taken: 2 });
        cpus.write(30, &[0xff; 8]);
        cpus.write(u64::MAX - 1, &[0xff; 4]);
        assert!(bell.read().is_err(), "nothing was let go of");
        cpus.read(u64::MAX - 1, &mut bytes);
        assert_eq!(bytes, [0; 4]);
    }

    #[test]
    fn only_a_state_that_fits_is_restored() {
        let power = Arc::new(Power::new(eventfd()));
        let cpus = Cpus::new(CpusState::new(1, 4), power, eventfd());
        let kept = CpusState { plugged: 0b101, wanted: 2, ..cpus.state() };
        assert!(cpus.restore(kept));
        assert_eq!(cpus.state(), kept);
        for broken in [
            CpusState { max: 5, ..kept },
            CpusState { wanted: 0, ..kept },
            CpusState { plugged: 0b100, ..kept },
            CpusState { plugged: 0x8000_0001, ..kept },
            CpusState { removing: 0b100, ..kept },
        ] {
            assert!(!cpus.restore(broken), "{broken:?}");
        }
        assert_eq!(cpus.state(), kept);
    }
}
