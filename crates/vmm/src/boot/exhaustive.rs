//! Where memory and what is put into it lie, for every size that a machine can have, as far as sizes differ.
//!
//! Scope: every size from 1 MiB to 6 GiB, so on both sides of the hole and of 4 GiB, and from there up to the largest (2 TiB) one
//! size in each step of 1.7 GiB; the memory map of 1 to 64 MiB, 64 MiB on each side of the hole, and one size per 97 MiB up to
//! 6 GiB.

use super::*;
use crate::layout::*;
use crate::memory::{self, ranges};

const HOLE: std::ops::Range<u64> = MMIO_HOLE_START..HIGH_RAM_START;

/// What the monitor puts into the first MiB.
fn pieces() -> Vec<(&'static str, u64, u64)> {
    vec![
        ("pointer to the MP table", MP_POINTER, 16),
        ("GDT", GDT_START, 0x40),
        ("IDT", IDT_START, 8),
        ("MP table", MP_TABLE_START, MP_TABLE_SIZE),
        ("PVH start info, modules, memory map", PVH_INFO_START, 0x1000),
        ("zero page", ZERO_PAGE_START, 0x1000),
        // It grows down from here; what lies below is the zero page's end.
        ("boot stack", BOOT_STACK - 0xff0 + 0x10, 0xfe0),
        ("boot page tables", PAGE_TABLES_START, 6 * 4096),
        ("command line", CMDLINE_START, CMDLINE_MAX as u64),
        ("ACPI tables", ACPI_START, ACPI_SIZE),
        ("VM generation id", VMGENID_START, 4096),
        ("SMBIOS", SMBIOS_START, SMBIOS_SIZE),
        ("reset vector", RESET_VECTOR, 16),
    ]
}

fn disjoint(mut pieces: Vec<(&'static str, u64, u64)>) {
    pieces.sort_by_key(|(_, start, _)| *start);
    for pair in pieces.windows(2) {
        let ((one, start, size), (other, next, _)) = (pair[0], pair[1]);
        assert!(start + size <= next, "{one} at {start:#x} reaches into {other} at {next:#x}");
    }
}

#[test]
fn nothing_in_the_first_mib_lies_over_anything_else() {
    assert!(pieces().iter().all(|(_, start, size)| start + size <= HIMEM_START));
    disjoint(pieces());
}

#[test]
fn nothing_in_the_hole_lies_over_anything_else() {
    let windows = MAX_VIRTIO_DEVICES as u64 * VIRTIO_MMIO_SIZE;
    let hole = vec![
        ("virtio-mmio windows", VIRTIO_MMIO_START, windows),
        ("IOAPIC", IOAPIC_ADDR.into(), 4096),
        ("local APIC", LAPIC_ADDR.into(), 4096),
        ("KVM's identity map", KVM_IDENTITY_MAP_ADDR, 4096),
        ("KVM's TSS", KVM_TSS_ADDR as u64, 3 * 4096),
    ];
    assert!(hole.iter().all(|(_, start, size)| HOLE.contains(start) && start + size <= HOLE.end));
    disjoint(hole);
}

#[test]
fn memory_of_every_size_goes_around_the_hole_and_none_is_lost() {
    let small = MIN_MEMORY_MIB..=6 << 10;
    let large = (6 << 10..=MAX_MEMORY_MIB).step_by(1733).chain([MAX_MEMORY_MIB]);
    for mib in small.chain(large) {
        let ranges = ranges(mib << 20);
        assert_eq!(ranges.iter().map(|range| range.size).sum::<u64>(), mib << 20);
        assert_eq!(ranges[0].start, 0);
        let mut end = 0;
        for range in ranges {
            assert!(range.start >= end && range.size > 0, "{mib} MiB: {range:?}");
            end = range.start.checked_add(range.size).unwrap();
            assert!(end <= HOLE.start || range.start >= HOLE.end, "{mib} MiB: {range:?} lies in the hole");
        }
    }
}

#[test]
fn the_memory_map_of_every_size_tells_all_of_the_memory_and_nothing_else() {
    let hole = MMIO_HOLE_START >> 20;
    for mib in (1..=64).chain(hole - 64..=hole + 64).chain((1..6 << 10).step_by(97)) {
        let memory = memory::create(mib).unwrap();
        let map = memory_map(&memory);
        // PVH's is an array in a page.
        assert!(map.len() * 24 <= 0x1000 - 0x80);
        let mut end = 0;
        for (start, size, _) in &map {
            assert!(*start >= end && *size > 0, "{mib} MiB: {map:x?}");
            end = start.checked_add(*size).unwrap();
            assert!(end <= HOLE.start || *start >= HOLE.end, "{mib} MiB: {map:x?}");
        }
        let told =
            |address: u64| map.iter().find(|(start, size, _)| (*start..start + size).contains(&address));
        for range in ranges(mib << 20) {
            for address in [range.start, range.start + range.size / 2, range.start + range.size - 1] {
                let kind = told(address).map(|(_, _, kind)| *kind);
                // Below 1 MiB only conventional memory is the kernel's to take.
                let reserved = (EBDA_START..HIMEM_START).contains(&address);
                let expected = if reserved { RESERVED } else { RAM };
                assert_eq!(kind, Some(expected), "{mib} MiB: {address:#x} of {map:x?}");
            }
        }
        let ram: u64 = map.iter().filter(|(_, _, kind)| *kind == RAM).map(|(_, size, _)| size).sum();
        assert_eq!((mib << 20) - ram, HIMEM_START - EBDA_START, "{mib} MiB: {map:x?}");
        for (what, start, size) in pieces() {
            let (_, _, kind) = told(start).unwrap();
            let reserved = start >= EBDA_START;
            assert_eq!(*kind, if reserved { RESERVED } else { RAM }, "{what}");
            assert_eq!(told(start), told(start + size - 1), "{what}");
        }
    }
}
