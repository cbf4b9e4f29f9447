//! The table of processors and interrupts that PCs had before ACPI (Intel MultiProcessor Specification 1.4, chapter 4).
//!
//! A guest without ACPI finds its CPUs and interrupt lines here. One with ACPI believes ACPI, but Linux looks for this table before,
//! 16 bytes at a time through three ranges, and maps what is left of a range for each look: the pointer lies where it looks first.

use vm_memory::{Bytes, GuestAddress};

use crate::acpi::Processors;
use crate::cpu::cpuid::Identity;
use crate::error::{Error, Result};
use crate::layout::{
    GSIS, IOAPIC_ADDR, IOAPIC_VERSION, LAPIC_ADDR, LAPIC_VERSION, MP_POINTER, MP_TABLE_SIZE, MP_TABLE_START,
};
use crate::memory::Memory;

/// Version 1.4 of the specification.
const REVISION: u8 = 4;
const HEADER: usize = 44;
/// Entry types (table 4-3).
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IOAPIC: u8 = 2;
const INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;
/// Flags of processors and of the IOAPIC: may be used; the one that the machine starts with.
const ENABLED: u8 = 1;
const BOOT_PROCESSOR: u8 = 2;
/// Kinds of interrupts (table 4-11).
const VECTORED: u8 = 0;
const NMI: u8 = 1;
const FROM_PIC: u8 = 3;
/// Active high, edge triggered; what the bus has (table 4-10).
const HIGH_EDGE: u8 = 0b0101;
const AS_THE_BUS: u8 = 0;
/// The only bus.
const ISA: u8 = 0;
/// The IOAPIC's id: KVM's after a reset, and the one in the MADT.
const IOAPIC_ID: u8 = 0;
/// All local APICs.
const ALL: u8 = 0xff;

/// Writes pointer and table.
///
/// # Errors
/// [`Error::Memory`].
pub fn write(memory: &Memory, processors: Processors, identity: Identity) -> Result<()> {
    let table = table(processors.count, identity);
    if table.len() as u64 > MP_TABLE_SIZE {
        return Err(Error::Memory(format!("an MP table of {} bytes does not fit", table.len())));
    }
    memory.write_slice(&table, GuestAddress(MP_TABLE_START)).map_err(Error::memory("MP table"))?;
    memory.write_slice(&pointer(), GuestAddress(MP_POINTER)).map_err(Error::memory("pointer to the MP table"))
}

/// The floating pointer structure (4.1): a table is there, and interrupts go through the local APICs from the start.
fn pointer() -> [u8; 16] {
    let mut pointer = [0; 16];
    pointer[..4].copy_from_slice(b"_MP_");
    pointer[4..8].copy_from_slice(&low(MP_TABLE_START).to_le_bytes());
    (pointer[8], pointer[9]) = (1, REVISION); // its length, in 16 bytes
    pointer[10] = checksum(&pointer);
    pointer
}

fn low(address: u64) -> u32 {
    u32::try_from(address).unwrap_or(u32::MAX) // it lies in the first page
}

/// What makes the sum of all bytes zero, where it is zero itself still.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)).wrapping_neg()
}

fn table(processors: u8, identity: Identity) -> Vec<u8> {
    let mut entries = Vec::new();
    for id in 0..processors {
        let flags = if id == 0 { ENABLED | BOOT_PROCESSOR } else { ENABLED };
        entries.extend([PROCESSOR, id, LAPIC_VERSION, flags]);
        entries.extend(identity.signature.to_le_bytes());
        entries.extend(identity.features.to_le_bytes());
        entries.extend([0; 8]);
    }
    entries.extend([BUS, ISA]);
    entries.extend(*b"ISA   ");
    entries.extend([IOAPIC, IOAPIC_ID, IOAPIC_VERSION, ENABLED]);
    entries.extend(IOAPIC_ADDR.to_le_bytes());
    // Each line at the pin of its number. ISA has 16, virtio devices have more; no other bus has numbers to call them by.
    for line in 0..GSIS {
        entries.extend([INTERRUPT, VECTORED, HIGH_EDGE, 0, ISA, line, IOAPIC_ID, line]);
    }
    entries.extend([LOCAL_INTERRUPT, FROM_PIC, AS_THE_BUS, 0, ISA, 0, ALL, 0]);
    entries.extend([LOCAL_INTERRUPT, NMI, AS_THE_BUS, 0, ISA, 0, ALL, 1]);

    let count = u16::from(processors) + 2 + u16::from(GSIS) + 2;
    let length = u16::try_from(HEADER + entries.len()).unwrap_or(u16::MAX);
    let mut table = b"PCMP".to_vec();
    table.extend(length.to_le_bytes());
    table.extend([REVISION, 0]); // checksum, below
    table.extend(b"ROOST   microVM     "); // OEM (8), product (12)
    table.extend([0; 6]); // no table of the OEM's: its address and its size
    table.extend(count.to_le_bytes());
    table.extend(LAPIC_ADDR.to_le_bytes());
    table.extend([0; 4]); // no extended entries
    table.extend(entries);
    table[7] = checksum(&table);
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(memory: &Memory, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// Looks as Linux does, and reads every entry.
    fn entries(memory: &Memory) -> Vec<Vec<u8>> {
        let looks = (0..0x400).step_by(16);
        let found: Vec<u64> = looks.filter(|address| read(memory, *address, 4) == b"_MP_").collect();
        assert_eq!(found.len(), 1);
        let pointer = read(memory, found[0], 16);
        assert_eq!((pointer[8], pointer[9], sum(&pointer), &pointer[11..]), (1, 4, 0, &[0; 5][..]));
        let start = u64::from(u32::from_le_bytes(pointer[4..8].try_into().unwrap()));
        let header = read(memory, start, HEADER);
        let length = usize::from(u16::from_le_bytes([header[4], header[5]]));
        let table = read(memory, start, length);
        assert_eq!((&table[..4], table[6], sum(&table)), (&b"PCMP"[..], 4, 0));
        assert_eq!(u32::from_le_bytes(table[36..40].try_into().unwrap()), LAPIC_ADDR);
        let (mut rest, mut entries) = (&table[HEADER..], Vec::new());
        while !rest.is_empty() {
            let (entry, next) = rest.split_at(if rest[0] == PROCESSOR { 20 } else { 8 });
            entries.push(entry.to_vec());
            rest = next;
        }
        assert_eq!(entries.len(), usize::from(u16::from_le_bytes([header[34], header[35]])));
        entries
    }

    #[test]
    fn a_guest_finds_its_processors_and_every_interrupt_line() {
        let identity = Identity { signature: 0x000a_0f11, features: 0x1789_abcd };
        for count in [1, 2, crate::layout::MAX_VCPUS] {
            let memory = crate::memory::create(1).unwrap();
            write(&memory, Processors { count, max: None }, identity).unwrap();
            let entries = entries(&memory);
            let of = |kind: u8| entries.iter().filter(move |entry| entry[0] == kind);
            let ids: Vec<(u8, u8)> = of(PROCESSOR).map(|entry| (entry[1], entry[3])).collect();
            let expected: Vec<(u8, u8)> = (0..count).map(|id| (id, if id == 0 { 3 } else { 1 })).collect();
            assert_eq!(ids, expected);
            assert!(of(PROCESSOR).all(|entry| entry[4..12] == [0x11, 0x0f, 0x0a, 0, 0xcd, 0xab, 0x89, 0x17]));
            let ioapics: Vec<&Vec<u8>> = of(IOAPIC).collect();
            assert_eq!((ioapics.len(), &ioapics[0][4..]), (1, &IOAPIC_ADDR.to_le_bytes()[..]));
            let pins: Vec<(u8, u8)> = of(INTERRUPT).map(|entry| (entry[5], entry[7])).collect();
            assert_eq!(pins, (0..24).map(|line| (line, line)).collect::<Vec<_>>());
            assert_eq!(
                of(LOCAL_INTERRUPT).map(|entry| (entry[1], entry[7])).collect::<Vec<_>>(),
                [(3, 0), (1, 1)]
            );
        }
    }
}
