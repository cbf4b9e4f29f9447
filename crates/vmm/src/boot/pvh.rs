//! The PVH boot protocol (Xen's "x86/HVM direct boot ABI").

use linux_loader::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::{Loaded, memory_map};
use crate::error::{Error, Result};
use crate::layout;
use crate::memory::Memory;

const MAGIC: u32 = 0x336e_c578;
const MODULES: u64 = layout::PVH_INFO_START + 0x40;
const MEMORY_MAP: u64 = layout::PVH_INFO_START + 0x80;

/// Writes the start info, the module list (the initrd) and the memory map.
///
/// # Errors
/// [`Error::Memory`].
pub fn write_start_info(memory: &Memory, initrd: Option<Loaded>, rsdp: Option<u64>) -> Result<()> {
    let map = memory_map(memory);
    let info = hvm_start_info {
        magic: MAGIC,
        version: 1,
        nr_modules: u32::from(initrd.is_some()),
        modlist_paddr: MODULES,
        cmdline_paddr: layout::CMDLINE_START,
        rsdp_paddr: rsdp.unwrap_or(0),
        memmap_paddr: MEMORY_MAP,
        memmap_entries: u32::try_from(map.len()).unwrap_or(0),
        ..hvm_start_info::default()
    };
    put(memory, layout::PVH_INFO_START, Info(info))?;
    if let Some(initrd) = initrd {
        let module =
            hvm_modlist_entry { paddr: initrd.start, size: initrd.size, ..hvm_modlist_entry::default() };
        put(memory, MODULES, Module(module))?;
    }
    let size = size_of::<hvm_memmap_table_entry>() as u64;
    for (index, (addr, length, kind)) in map.into_iter().enumerate() {
        let entry = hvm_memmap_table_entry { addr, size: length, type_: kind, reserved: 0 };
        put(memory, MEMORY_MAP + size * index as u64, MapEntry(entry))?;
    }
    Ok(())
}

fn put<T: ByteValued>(memory: &Memory, address: u64, value: T) -> Result<()> {
    memory.write_obj(value, GuestAddress(address)).map_err(Error::memory("PVH start info"))
}

#[derive(Clone, Copy)]
#[repr(transparent)]
struct Info(hvm_start_info);
// SAFETY: plain integers without padding (its size is asserted to be the sum of its fields where it is defined).
unsafe impl ByteValued for Info {}

#[derive(Clone, Copy)]
#[repr(transparent)]
struct Module(hvm_modlist_entry);
// SAFETY: four u64.
unsafe impl ByteValued for Module {}

#[derive(Clone, Copy)]
#[repr(transparent)]
struct MapEntry(hvm_memmap_table_entry);
// SAFETY: two u64 and two u32, no padding.
unsafe impl ByteValued for MapEntry {}
