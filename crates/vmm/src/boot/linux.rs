//! The Linux boot protocol: the setup header of a bzImage and the "zero page" that the kernel is given.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::{Loaded, memory_map};
use crate::error::{Error, Result};
use crate::layout;
use crate::memory::Memory;

/// Where the setup header is in a bzImage.
const SETUP_HEADER_OFFSET: u64 = 0x1f1;
const HEADER_MAGIC: u32 = 0x5372_6448; // "HdrS"
const BOOT_FLAG: u16 = 0xaa55;
/// First protocol version with `init_size`, `pref_address` and the 64-bit entry flag.
const MIN_VERSION: u16 = 0x020c;
/// `xloadflags`: the kernel has the 64-bit entry.
const XLF_KERNEL_64: u16 = 1;
/// `type_of_loader`: undefined.
const LOADER_UNDEFINED: u8 = 0xff;
/// `loadflags`: loaded high.
const LOADED_HIGH: u8 = 1;
const KERNEL_ALIGNMENT: u32 = 0x20_0000;

/// Reads the header of a bzImage.
///
/// # Errors
/// [`Error::Kernel`] saying what is missing.
pub fn read_setup_header(image: &mut File) -> Result<setup_header> {
    let mut header = setup_header::default();
    let read = image
        .seek(SeekFrom::Start(SETUP_HEADER_OFFSET))
        .and_then(|_| image.read_exact(header.as_mut_slice()));
    if read.is_err() || header.header != HEADER_MAGIC {
        return Err(Error::Kernel("is neither an ELF image nor a bzImage".into()));
    }
    let (version, flags) = (header.version, header.xloadflags);
    if version < MIN_VERSION || flags & XLF_KERNEL_64 == 0 {
        return Err(Error::Kernel(format!(
            "is a bzImage without 64-bit entry (protocol {}.{:02}; an x86_64 kernel since Linux 3.8 is needed)",
            version >> 8,
            version & 0xff
        )));
    }
    Ok(header)
}

/// Writes the zero page.
///
/// # Errors
/// [`Error::Memory`].
pub fn write_zero_page(
    memory: &Memory,
    header: Option<setup_header>,
    cmdline: &str,
    initrd: Option<Loaded>,
    rsdp: Option<u64>,
) -> Result<()> {
    let hdr = header.unwrap_or_else(|| setup_header {
        header: HEADER_MAGIC,
        boot_flag: BOOT_FLAG,
        version: MIN_VERSION,
        kernel_alignment: KERNEL_ALIGNMENT,
        loadflags: LOADED_HIGH,
        ..setup_header::default()
    });
    let mut params = boot_params { hdr, ..boot_params::default() };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = low32(layout::CMDLINE_START);
    params.hdr.cmdline_size = u32::try_from(cmdline.len()).unwrap_or(u32::MAX);
    if let Some(initrd) = initrd {
        params.hdr.ramdisk_image = low32(initrd.start);
        params.hdr.ramdisk_size = low32(initrd.size);
    }
    params.acpi_rsdp_addr = rsdp.unwrap_or(0);
    let map = memory_map(memory);
    for (entry, (addr, size, kind)) in params.e820_table.iter_mut().zip(&map) {
        *entry = boot_e820_entry { addr: *addr, size: *size, r#type: *kind };
    }
    params.e820_entries = u8::try_from(map.len()).unwrap_or(0);
    memory.write_obj(params, GuestAddress(layout::ZERO_PAGE_START)).map_err(Error::memory("zero page"))
}

/// Everything that the protocol points to lies below 4 GiB.
fn low32(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}
