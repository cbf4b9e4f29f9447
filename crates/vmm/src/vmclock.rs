//! VMClock (UAPI group, specification 13; `linux/vmclock-abi.h`): a page that tells a guest when its clocks are not to be believed any
//! more, and when it is a copy. What time it is, the page does not say: guests keep time by TSC and kvmclock.
//!
//! Linux has a driver from 6.13 on.

use vm_memory::{Bytes, GuestAddress};

use crate::devices::virtio::entropy::host_random;
use crate::error::{Error, Result};
use crate::layout::VMCLOCK_START;
use crate::memory::{Memory, PAGE};

/// Where fields are.
const SEQUENCE: u64 = 12;
const DISRUPTION_MARKER: u64 = 16;
const GENERATION_COUNTER: u64 = 104;

const MAGIC: [u8; 4] = *b"VCLK";
const VERSION: u16 = 1;
/// No counter is related to the time.
const COUNTER_INVALID: u8 = 0xff;
/// `VM_GEN_COUNTER_PRESENT` and `NOTIFICATION_PRESENT`.
const FLAGS: u64 = 1 << 8 | 1 << 9;

/// Writes the page as it is after power-on, into cleared memory.
///
/// # Errors
/// [`Error::Memory`].
pub fn write(memory: &Memory) -> Result<()> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend(u32::try_from(PAGE).unwrap_or(0).to_le_bytes());
    bytes.extend(VERSION.to_le_bytes());
    // Of the time it knows nothing, which would be in UTC.
    bytes.extend([COUNTER_INVALID, 0]);
    bytes.extend([0; 12]);
    bytes.extend(FLAGS.to_le_bytes());
    memory.write_slice(&bytes, GuestAddress(VMCLOCK_START)).map_err(Error::memory("VMClock"))?;
    disrupt(memory)
}

/// Says that the guest goes on elsewhere or later, from a snapshot.
///
/// # Errors
/// [`Error::Memory`].
pub fn disrupt(memory: &Memory) -> Result<()> {
    let at = |offset| GuestAddress(VMCLOCK_START + offset);
    let update = || {
        // Odd while the page is written. The guest may have put anything here, which is its own affair.
        let sequence: u32 = memory.read_obj::<u32>(at(SEQUENCE))? | 1;
        memory.write_obj(sequence, at(SEQUENCE))?;
        for field in [DISRUPTION_MARKER, GENERATION_COUNTER] {
            let mut value = [0; 8];
            host_random(&mut value);
            memory.write_slice(&value, at(field))?;
        }
        memory.write_obj(sequence.wrapping_add(1), at(SEQUENCE))
    };
    update().map_err(Error::memory("VMClock"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    #[test]
    fn each_disruption_is_another_one() {
        let memory = memory::create(2).unwrap();
        write(&memory).unwrap();
        let word = |offset| memory.read_obj::<u64>(GuestAddress(VMCLOCK_START + offset)).unwrap();
        assert_eq!(word(0), u64::from_le_bytes(*b"VCLK\0\x10\0\0"));
        assert_eq!(word(24), 0x300);
        let mut seen = Vec::new();
        for _ in 0..3 {
            let sequence: u32 = memory.read_obj(GuestAddress(VMCLOCK_START + SEQUENCE)).unwrap();
            assert_eq!(sequence % 2, 0);
            seen.push((word(DISRUPTION_MARKER), word(GENERATION_COUNTER), sequence));
            disrupt(&memory).unwrap();
        }
        seen.dedup_by(|one, other| one.0 == other.0 || one.1 == other.1 || one.2 == other.2);
        assert_eq!(seen.len(), 3, "{seen:?}");
    }
}
