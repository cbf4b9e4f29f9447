//! Power: the ACPI sleep and reset registers, the event register behind the power button, and the one command of
//! the keyboard controller that kernels without ACPI use to reset.

use std::sync::atomic::{AtomicU8, Ordering};

use vmm_sys_util::eventfd::EventFd;

use crate::bus::{BusDevice, Outcome};

/// Offset of the sleep control register (ACPI 6.5, 4.8.3.7).
pub const SLEEP_CONTROL: u16 = 0;
/// Offset of the sleep status register.
pub const SLEEP_STATUS: u16 = 1;
/// Offset of the reset register.
pub const RESET: u16 = 2;
/// Offset of the event register: bits of what happened; reading clears them.
pub const EVENT: u16 = 3;
/// Size of the whole block.
pub const SIZE: u16 = 4;

/// What to write to the reset register.
pub const RESET_VALUE: u8 = 1;
/// The sleep type of S5, as `_S5` says.
pub const SLEEP_TYPE_S5: u8 = 5;
/// Event bit: the power button was pressed.
pub const EVENT_POWER_BUTTON: u8 = 1;
/// Event bit: the machine has another generation, as it was restored from a snapshot.
pub const EVENT_GENERATION: u8 = 1 << 7;

/// Event bit: CPUs came, or should go (see [`super::cpus`]).
pub const EVENT_CPUS: u8 = 2;

/// SLP_EN, bit 5 of the sleep control register; the sleep type is in bits 2–4.
const SLEEP_ENABLE: u8 = 1 << 5;
/// WAK_STS of the sleep status register.
const WAKE_STATUS: u8 = 1 << 7;

/// The power registers and the button.
#[derive(Debug)]
pub struct Power {
    events: AtomicU8,
    interrupt: EventFd,
}

impl Power {
    /// `interrupt` raises the generic event device's line.
    #[must_use]
    pub const fn new(interrupt: EventFd) -> Self {
        Self { events: AtomicU8::new(0), interrupt }
    }

    /// Presses the power button.
    ///
    /// # Errors
    /// The interrupt could not be raised.
    pub fn press_button(&self) -> std::io::Result<()> {
        self.raise(EVENT_POWER_BUTTON)
    }

    /// Says that something of these bits happened.
    ///
    /// # Errors
    /// The interrupt could not be raised.
    pub fn raise(&self, events: u8) -> std::io::Result<()> {
        self.events.fetch_or(events, Ordering::SeqCst);
        self.interrupt.write(1)
    }

    /// As after power-on.
    pub fn reset(&self) {
        self.events.store(0, Ordering::SeqCst);
    }

    /// What has happened and the guest has not read yet: what a snapshot holds.
    #[must_use]
    pub fn save(&self) -> u8 {
        self.events.load(Ordering::SeqCst)
    }

    /// Goes on with these events, and tells the guest that it is a copy.
    ///
    /// # Errors
    /// The interrupt could not be raised.
    pub fn restore(&self, events: u8) -> std::io::Result<()> {
        self.events.store(events | EVENT_GENERATION, Ordering::SeqCst);
        self.interrupt.write(1)
    }
}

impl BusDevice for Power {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let Some(byte) = data.first_mut() else { return };
        *byte = match u16::try_from(offset) {
            Ok(SLEEP_STATUS) => WAKE_STATUS,
            Ok(EVENT) => self.events.swap(0, Ordering::SeqCst),
            _ => 0,
        };
    }

    fn write(&self, offset: u64, data: &[u8]) -> Outcome {
        let Some(value) = data.first().copied() else { return Outcome::Done };
        match u16::try_from(offset) {
            Ok(SLEEP_CONTROL) if value & SLEEP_ENABLE != 0 && value >> 2 & 7 == SLEEP_TYPE_S5 => {
                Outcome::PowerOff
            }
            Ok(RESET) if value == RESET_VALUE => Outcome::Reset,
            _ => Outcome::Done,
        }
    }
}

/// The keyboard controller's command port. There is no keyboard controller (reads give ones); only "pulse the reset
/// line" is obeyed.
#[derive(Clone, Copy, Debug)]
pub struct KeyboardReset;

impl BusDevice for KeyboardReset {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&self, _offset: u64, data: &[u8]) -> Outcome {
        if data == [0xfe] { Outcome::Reset } else { Outcome::Done }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_right_values_end_a_guest() {
        let power = Power::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        for value in 0..=255_u8 {
            let off = value & 0x20 != 0 && value >> 2 & 7 == 5;
            assert_eq!(power.write(0, &[value]) == Outcome::PowerOff, off, "{value:#x}");
            assert_eq!(power.write(2, &[value]) == Outcome::Reset, value == 1, "{value:#x}");
            assert_eq!(power.write(1, &[value]), Outcome::Done);
            assert_eq!(KeyboardReset.write(0, &[value]) == Outcome::Reset, value == 0xfe);
        }
        assert_eq!(power.write(0, &[]), Outcome::Done);
    }

    #[test]
    fn a_press_is_seen_once() {
        let interrupt = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let power = Power::new(interrupt.try_clone().unwrap());
        power.press_button().unwrap();
        assert_eq!(interrupt.read().unwrap(), 1);
        let mut byte = [0];
        power.read(u64::from(EVENT), &mut byte);
        assert_eq!(byte, [EVENT_POWER_BUTTON]);
        power.read(u64::from(EVENT), &mut byte);
        assert_eq!(byte, [0]);
    }
}
