//! The registers that a guest's first CPU starts with.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress};

use crate::error::{Error, Result};
use crate::layout::{BOOT_STACK, GDT_START, IDT_START, PAGE_TABLES_START};
use crate::memory::Memory;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// How the guest is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Long mode, the first 4 GiB mapped to themselves, RSI = the zero page (Linux boot protocol, 64-bit).
    Long {
        /// First instruction.
        rip: u64,
        /// Address of the zero page.
        rsi: u64,
    },
    /// 32-bit protected mode without paging, EBX = the start info (PVH).
    Protected {
        /// First instruction.
        rip: u64,
        /// Address of the start info.
        rbx: u64,
    },
}

/// Flat 4 GiB segments; selectors 0x10 and 0x18 as the Linux boot protocol asks.
const CODE64: Descriptor = Descriptor { flags: 0xa09b };
const CODE32: Descriptor = Descriptor { flags: 0xc09b };
const DATA: Descriptor = Descriptor { flags: 0xc093 };
const TSS: Descriptor = Descriptor { flags: 0x008b };

/// A segment descriptor with base 0 and the largest limit: flags are bits 40–55, limit bits between them left out.
#[derive(Clone, Copy)]
struct Descriptor {
    flags: u16,
}

impl Descriptor {
    fn bits(self) -> u64 {
        u64::from(self.flags) << 40 | 0xf << 48 | 0xffff
    }

    fn segment(self, selector: u16) -> kvm_segment {
        let bit = |n: u16| u8::from(self.flags >> n & 1 == 1);
        let page_granular = bit(15) == 1;
        kvm_segment {
            base: 0,
            limit: if page_granular { u32::MAX } else { 0xf_ffff },
            selector,
            type_: (self.flags & 0xf) as u8,
            present: bit(7),
            dpl: 0,
            db: bit(14),
            s: bit(4),
            l: bit(13),
            g: bit(15),
            ..kvm_segment::default()
        }
    }
}

/// Writes what these registers point to: descriptor table and page tables.
///
/// # Errors
/// [`Error::Memory`].
pub fn write_tables(memory: &Memory, entry: Entry) -> Result<()> {
    let code = if matches!(entry, Entry::Long { .. }) { CODE64 } else { CODE32 };
    let gdt = [0, 0, code.bits(), DATA.bits(), TSS.bits()];
    for (index, descriptor) in gdt.iter().enumerate() {
        let address = GuestAddress(GDT_START + 8 * index as u64);
        memory.write_obj(*descriptor, address).map_err(Error::memory("boot GDT"))?;
    }
    if !matches!(entry, Entry::Long { .. }) {
        return Ok(());
    }
    // One PML4 entry, four PDPT entries, 4 × 512 pages of 2 MiB: present, writable (and large).
    let table = |index: u64| PAGE_TABLES_START + 0x1000 * index;
    let put = |table: u64, entries: &[u64]| {
        let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        memory.write_slice(&bytes, GuestAddress(table)).map_err(Error::memory("boot page tables"))
    };
    put(table(0), &[table(1) | 3])?;
    put(table(1), &[table(2) | 3, table(3) | 3, table(4) | 3, table(5) | 3])?;
    let pages: Vec<u64> = (0..2048).map(|n| n << 21 | 0x83).collect();
    put(table(2), &pages)
}

/// General registers at entry.
#[must_use]
pub fn general(entry: Entry) -> kvm_regs {
    let mut regs = kvm_regs { rflags: 2, rsp: BOOT_STACK, rbp: BOOT_STACK, ..kvm_regs::default() };
    match entry {
        Entry::Long { rip, rsi } => (regs.rip, regs.rsi) = (rip, rsi),
        Entry::Protected { rip, rbx } => (regs.rip, regs.rbx) = (rip, rbx),
    }
    regs
}

/// Changes KVM's own start values of the special registers to those of the entry.
pub fn special(sregs: &mut kvm_sregs, entry: Entry) {
    let code = if matches!(entry, Entry::Long { .. }) { CODE64 } else { CODE32 };
    sregs.cs = code.segment(0x10);
    let data = DATA.segment(0x18);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = TSS.segment(0x20);
    sregs.gdt = kvm_dtable { base: GDT_START, limit: 5 * 8 - 1, ..kvm_dtable::default() };
    sregs.idt = kvm_dtable { base: IDT_START, limit: 0, ..kvm_dtable::default() };
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr4 = 0;
    sregs.efer = 0;
    if matches!(entry, Entry::Long { .. }) {
        sregs.cr3 = PAGE_TABLES_START;
        sregs.cr4 = CR4_PAE;
        sregs.cr0 |= CR0_PG;
        sregs.efer = EFER_LME | EFER_LMA;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_four_gibibytes_map_to_themselves() {
        let memory = crate::memory::create(2).unwrap();
        write_tables(&memory, Entry::Long { rip: 0, rsi: 0 }).unwrap();
        let entry = |table: u64, index: u64| memory.read_obj::<u64>(GuestAddress(table + 8 * index)).unwrap();
        for address in [0_u64, 0x20_0000, 0x3fff_ffff, 0x4000_0000, 0xffff_ffff] {
            let pdpt = entry(PAGE_TABLES_START, 0) & !0xfff;
            let directory = entry(pdpt, address >> 30) & !0xfff;
            let page = entry(directory, address >> 21 & 511);
            assert_eq!(page & 0x83, 0x83);
            assert_eq!(page & !0xfff | address & 0x1f_ffff, address);
        }
    }

    #[test]
    fn segments_match_their_descriptors() {
        assert_eq!(CODE64.bits(), 0x00af_9b00_0000_ffff);
        assert_eq!(DATA.bits(), 0x00cf_9300_0000_ffff);
        let code = CODE64.segment(0x10);
        assert_eq!((code.l, code.db, code.g, code.present, code.type_), (1, 0, 1, 1, 0xb));
    }
}
