//! Puts a kernel, its initrd, its command line and the tables into guest memory, and says how to enter it.
//!
//! The same function serves the first start and every reset: the kernel and initrd descriptors are kept open.

pub mod ahead;
pub mod cmdline;
pub mod code;
#[cfg(test)]
mod exhaustive;
pub mod linux;
pub mod mapped;
pub mod pvh;

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use linux_loader::bootparam::setup_header;
use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{KernelLoader, KernelLoaderResult};
use vm_memory::{Address, Bytes, GuestAddress};

use crate::acpi::{self, Processors, VirtioWindow};
use crate::config::{BootProtocol, SmbiosConfig};
use crate::cpu::cpuid::Identity;
use crate::cpu::registers::{self, Entry};
use crate::devices::power;
use crate::error::{Error, Result};
use crate::layout;
use crate::memory::{FilePages, Memory, high_ram, low_end};
use crate::mp_table;
use crate::smbios;
use crate::vmclock;
use mapped::MappedFile;

/// What is loaded.
#[derive(Debug)]
pub struct Payload {
    /// The kernel image.
    pub kernel: File,
    /// The initramfs.
    pub initrd: Option<File>,
    /// The whole command line.
    pub cmdline: String,
    /// How an ELF kernel is entered.
    pub protocol: BootProtocol,
    /// Pages of guest memory that are the kernel's or the initrd's file.
    pub pages: FilePages,
}

/// What the tables describe.
#[derive(Debug)]
pub struct Description {
    /// vCPUs.
    pub processors: Processors,
    /// What the vCPUs are.
    pub identity: Identity,
    /// virtio-mmio windows, in order.
    pub windows: Vec<VirtioWindow>,
    /// Whether there are ACPI tables.
    pub acpi: bool,
    /// DMI strings.
    pub smbios: SmbiosConfig,
    /// VM generation id.
    pub generation_id: [u8; 16],
}

/// A range of guest memory that something was loaded to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// First address.
    pub start: u64,
    /// Bytes.
    pub size: u64,
}

/// Kind of address range in the memory map (ACPI 6.5, 15: address range types).
const RAM: u32 = 1;
const RESERVED: u32 = 2;

/// A kernel and an initrd in guest memory.
pub struct Files {
    kernel: Kernel,
    initrd: Option<Loaded>,
}

/// Fills cleared guest memory and says where the first vCPU starts.
///
/// # Errors
/// Those of [`load_files`] and of [`enter`].
pub fn load(memory: &Memory, payload: &mut Payload, description: &Description) -> Result<Entry> {
    let files = load_files(memory, payload)?;
    enter(memory, &payload.cmdline, description, files)
}

/// Loads what is a file.
///
/// # Errors
/// [`Error::Kernel`] for an image that is no kernel or does not fit, [`Error::Io`].
pub fn load_files(memory: &Memory, payload: &mut Payload) -> Result<Files> {
    let kernel = load_kernel(memory, &mut payload.kernel, payload.protocol, &payload.pages)?;
    let initrd = match &mut payload.initrd {
        Some(file) => Some(load_initrd(memory, file, &kernel, &payload.pages)?),
        None => None,
    };
    Ok(Files { kernel, initrd })
}

/// Adds what the kernel is told, and says where the first vCPU starts.
///
/// # Errors
/// [`Error::Config`] for a command line that is too long, [`Error::Memory`].
pub fn enter(memory: &Memory, cmdline: &str, description: &Description, files: Files) -> Result<Entry> {
    let Files { kernel, initrd } = files;
    let rsdp = if description.acpi {
        Some(acpi::write(memory, description.processors, &description.windows)?)
    } else {
        None
    };
    mp_table::write(memory, description.processors, description.identity)?;
    memory
        .write_slice(&description.generation_id, GuestAddress(layout::VMGENID_START))
        .map_err(Error::memory("VM generation id"))?;
    vmclock::write(memory)?;
    smbios::write(memory, &description.smbios)?;
    memory
        .write_slice(&reset_stub(), GuestAddress(layout::RESET_VECTOR))
        .map_err(Error::memory("reset vector"))?;
    write_cmdline(memory, cmdline)?;
    let entry = match kernel.start {
        Start::Linux { rip, header } => {
            linux::write_zero_page(memory, header, cmdline, initrd, rsdp)?;
            Entry::Long { rip, rsi: layout::ZERO_PAGE_START }
        }
        Start::Pvh { rip } => {
            pvh::write_start_info(memory, initrd, rsdp)?;
            Entry::Protected { rip, rbx: layout::PVH_INFO_START }
        }
    };
    registers::write_tables(memory, entry)?;
    Ok(entry)
}

/// All the firmware there is: real-mode code that writes the reset register. Linux on a hardware-reduced machine
/// without EFI runtime services tries EFI, which is not there, and then jumps to the BIOS (`arch/x86/kernel/reboot.c`).
fn reset_stub() -> [u8; 9] {
    let [low, high] = (layout::POWER_PORT + power::RESET).to_le_bytes();
    // mov dx, PORT; mov al, VALUE; out dx, al; hlt; jmp back to hlt
    [0xba, low, high, 0xb0, power::RESET_VALUE, 0xee, 0xf4, 0xeb, 0xfd]
}

/// RAM as the guest is told about it: the map of both boot protocols.
fn memory_map(memory: &Memory) -> Vec<(u64, u64, u32)> {
    let end = low_end(memory);
    let mut map = vec![
        (0, layout::EBDA_START, RAM),
        (layout::EBDA_START, 0xa_0000 - layout::EBDA_START, RESERVED),
        (layout::ACPI_START, layout::HIMEM_START - layout::ACPI_START, RESERVED),
    ];
    if end > layout::HIMEM_START {
        map.push((layout::HIMEM_START, end - layout::HIMEM_START, RAM));
    }
    // Memory that comes and goes is none of it: its driver adds it.
    map.extend(high_ram(memory).map(|range| (range.start, range.size, RAM)));
    map
}

fn write_cmdline(memory: &Memory, cmdline: &str) -> Result<()> {
    if cmdline.len() >= layout::CMDLINE_MAX {
        return Err(Error::Config(format!(
            "the kernel command line has {} bytes, at most {} are allowed",
            cmdline.len(),
            layout::CMDLINE_MAX - 1
        )));
    }
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    memory.write_slice(&bytes, GuestAddress(layout::CMDLINE_START)).map_err(Error::memory("command line"))
}

enum Start {
    Linux { rip: u64, header: Option<setup_header> },
    Pvh { rip: u64 },
}

struct Kernel {
    start: Start,
    /// First address above everything that the kernel needs while it starts.
    end: u64,
    /// Highest address that the initrd may reach.
    initrd_limit: u64,
}

const ELF_MAGIC: [u8; 4] = *b"\x7fELF";
/// Where a loaded bzImage is entered (Linux boot protocol, "64-bit boot protocol").
const BZIMAGE_ENTRY: u64 = 0x200;
/// `initrd_addr_max` of kernels that do not say (boot protocol below 2.03 and ELF images).
const DEFAULT_INITRD_LIMIT: u64 = 0x7fff_ffff;

fn load_kernel(
    memory: &Memory,
    image: &mut File,
    protocol: BootProtocol,
    pages: &FilePages,
) -> Result<Kernel> {
    let mut magic = [0; 4];
    let start = image.seek(SeekFrom::Start(0)).and_then(|_| image.read_exact(&mut magic));
    start.map_err(|error| Error::Kernel(format!("cannot be read: {error}")))?;
    if magic == ELF_MAGIC {
        load_elf(memory, image, protocol, pages)
    } else {
        load_bzimage(memory, image, pages)
    }
}

fn load_elf(memory: &Memory, image: &mut File, protocol: BootProtocol, pages: &FilePages) -> Result<Kernel> {
    let mut source = MappedFile::new(image, memory, pages).map_err(Error::io("kernel: finding its size"))?;
    let loaded = Elf::load(memory, None, &mut source, None)
        .map_err(|error| Error::Kernel(format!("{error} (has the guest enough memory?)")))?;
    let end = loaded.kernel_end;
    let pvh = match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(address) => Some(address.raw_value()),
        _ => None,
    };
    let entry = loaded.kernel_load.raw_value();
    let entry_is_physical = entry < end.min(low_end(memory));
    let start = match (protocol, pvh) {
        (BootProtocol::Pvh, Some(rip)) => Start::Pvh { rip },
        (BootProtocol::Auto, Some(rip)) if !entry_is_physical => Start::Pvh { rip },
        (BootProtocol::Pvh, None) => {
            return Err(Error::Kernel("boot_protocol is pvh, but the ELF image has no PVH note".into()));
        }
        _ if entry_is_physical => Start::Linux { rip: entry, header: None },
        _ => {
            return Err(Error::Kernel(format!(
                "the ELF entry {entry:#x} is no physical address inside the image, and there is no PVH note"
            )));
        }
    };
    Ok(Kernel { start, end, initrd_limit: DEFAULT_INITRD_LIMIT })
}

fn load_bzimage(memory: &Memory, image: &mut File, pages: &FilePages) -> Result<Kernel> {
    let header = linux::read_setup_header(image)?;
    let address = if header.relocatable_kernel != 0 && header.pref_address >= layout::HIMEM_START {
        header.pref_address
    } else {
        u64::from(header.code32_start)
    };
    // The image may say anything.
    let end = address.saturating_add(header.init_size.into());
    if end > low_end(memory) {
        return Err(Error::Kernel(format!(
            "needs memory up to {} MiB to start, the guest's ends at {} MiB",
            end.div_ceil(1 << 20),
            low_end(memory) >> 20
        )));
    }
    let mut source = MappedFile::new(image, memory, pages).map_err(Error::io("kernel: finding its size"))?;
    let himem = Some(GuestAddress(layout::HIMEM_START));
    let KernelLoaderResult { kernel_load, kernel_end, setup_header, .. } =
        BzImage::load(memory, Some(GuestAddress(address)), &mut source, himem)
            .map_err(|error| Error::Kernel(error.to_string()))?;
    let rip = kernel_load.raw_value() + BZIMAGE_ENTRY;
    if rip >= kernel_end {
        return Err(Error::Kernel(format!(
            "the bzImage ends before its entry, which is at {BZIMAGE_ENTRY:#x} of what is behind its setup sectors"
        )));
    }
    Ok(Kernel {
        start: Start::Linux { rip, header: setup_header },
        end: end.max(kernel_end),
        initrd_limit: u64::from(header.initrd_addr_max),
    })
}

/// Loads the initrd as high as the kernel can take it, below the hole.
fn load_initrd(memory: &Memory, file: &mut File, kernel: &Kernel, pages: &FilePages) -> Result<Loaded> {
    let size = file.seek(SeekFrom::End(0)).map_err(Error::io("initrd: finding its size"))?;
    file.seek(SeekFrom::Start(0)).map_err(Error::io("initrd: going to its start"))?;
    if size == 0 {
        return Err(Error::Kernel("the initrd is empty".into()));
    }
    let limit = low_end(memory).min(kernel.initrd_limit.saturating_add(1));
    let start = limit.checked_sub(size).map(|start| start & !0xfff).filter(|start| *start >= kernel.end);
    let Some(start) = start else {
        return Err(Error::Kernel(format!(
            "the initrd of {} KiB does not fit between the kernel's end at {} MiB and {} MiB; give the guest more memory",
            size.div_ceil(1024),
            kernel.end.div_ceil(1 << 20),
            limit >> 20
        )));
    };
    let count = usize::try_from(size).map_err(|_| Error::Kernel("the initrd is too large".into()))?;
    let mut source = MappedFile::new(file, memory, pages).map_err(Error::io("initrd: finding its size"))?;
    memory
        .read_exact_volatile_from(GuestAddress(start), &mut source, count)
        .map_err(|error| Error::Kernel(format!("the initrd cannot be read: {error}")))?;
    Ok(Loaded { start, size })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn payload(image: &[u8]) -> Payload {
        let mut kernel = tempfile::tempfile().unwrap();
        kernel.write_all(image).unwrap();
        Payload {
            kernel,
            initrd: None,
            cmdline: "quiet".into(),
            protocol: BootProtocol::Auto,
            pages: FilePages::default(),
        }
    }

    fn description() -> Description {
        Description {
            processors: Processors { count: 1, max: None },
            identity: Identity::default(),
            windows: Vec::new(),
            acpi: true,
            smbios: SmbiosConfig::default(),
            generation_id: [7; 16],
        }
    }

    #[test]
    fn what_is_no_kernel_is_refused_with_a_reason() {
        let memory = crate::memory::create(16).unwrap();
        for image in [
            &b""[..],
            b"abc",
            b"\x7fELF",
            &[0; 4096],
            b"\x7fELF\x02\x01\x01 and then rubbish to fill a header of sixty-four bytes",
        ] {
            let error = load(&memory, &mut payload(image), &description()).unwrap_err();
            assert!(matches!(error, Error::Kernel(_)), "{image:?} gave {error}");
        }
    }

    /// A bzImage of one setup sector and so many bytes more, which would like to be at this address.
    fn bzimage(behind: usize, address: u64, room: u32) -> Vec<u8> {
        let mut image = vec![0; 1024 + behind];
        image[0x1f1] = 1; // setup sectors
        image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        image[0x202..0x208].copy_from_slice(b"HdrS\x0f\x02");
        image[0x211] = 1; // loaded high
        image[0x216] = 0x10; // code32_start: 1 MiB
        image[0x234] = 1; // relocatable
        image[0x236] = 1; // 64-bit entry
        image[0x258..0x260].copy_from_slice(&address.to_le_bytes());
        image[0x260..0x264].copy_from_slice(&room.to_le_bytes());
        image
    }

    /// The preferred address is the image's to say: with the room that it needs, it may reach beyond any address.
    #[test]
    fn a_bzimage_beyond_all_addresses_is_refused() {
        let image = bzimage(1024, u64::MAX - 4096, 0x10_0000);
        let memory = crate::memory::create(16).unwrap();
        let error = load(&memory, &mut payload(&image), &description()).unwrap_err();
        assert!(error.to_string().contains("needs memory up to"), "{error}");
    }

    /// The entry is inside what was loaded, wherever the image says that it ends.
    #[test]
    fn a_bzimage_that_ends_before_its_entry_is_refused() {
        let memory = crate::memory::create(16).unwrap();
        let enter = |behind, address| {
            load(&memory, &mut payload(&bzimage(behind, address, 0)), &description())
                .map_err(|e| e.to_string())
        };
        for (behind, address) in [(0, 16 << 20), (0x200, 0x20_0000), (0, 0x20_0000)] {
            let refused = enter(behind, address).unwrap_err();
            assert!(refused.contains("ends before its entry"), "{behind:#x} {address:#x}: {refused}");
        }
        assert!(matches!(enter(0x201, 0x20_0000), Ok(Entry::Long { rip: 0x20_0200, .. })));
    }

    #[test]
    fn an_elf_beyond_the_memory_is_refused() {
        let image = tests_support::elf(0x20_0000, 64 << 20, &[0xf4]);
        let memory = crate::memory::create(16).unwrap();
        let error = load(&memory, &mut payload(&image), &description()).unwrap_err();
        assert!(error.to_string().contains("memory"), "{error}");
    }

    /// A kernel of whole pages and some bytes more, at a page's begin in its file.
    fn large_kernel(extra: u64) -> Vec<u8> {
        let content: Vec<u8> = (0..40 * 4096 + 100_u32).map(|n| (n % 241) as u8).collect();
        let mut image = tests_support::elf(0x10_0000, 0x10_0000, &content);
        let offset = 4096_u64;
        image.splice(120..120, vec![0; 4096 - 120]);
        image[72..80].copy_from_slice(&offset.to_le_bytes());
        image[104..112].copy_from_slice(&(content.len() as u64 + extra).to_le_bytes());
        image
    }

    #[test]
    fn a_kernels_pages_are_mapped_and_the_guest_keeps_its_changes_for_itself() {
        let image = large_kernel(8192);
        let mut payload = payload(&image);
        let memory = crate::memory::create(16).unwrap();
        let at = |address: u64| memory.read_obj::<u8>(GuestAddress(address)).unwrap();
        let end = 0x10_0000 + 40 * 4096 + 100;
        for round in 0..2 {
            load(&memory, &mut payload, &description()).unwrap();
            for n in [0, 1, 4095, 4096, 40 * 4096 - 1, 40 * 4096, 40 * 4096 + 99] {
                assert_eq!(at(0x10_0000 + n), (n % 241) as u8, "{n:#x} in round {round}");
            }
            assert_eq!((at(end), at(end + 4096)), (0, 0), "behind the kernel there is nothing of the file");
            memory.write_obj(7_u8, GuestAddress(0x10_1000)).unwrap();
            memory.write_obj(7_u8, GuestAddress(end)).unwrap();
            crate::memory::clear(&memory, &payload.pages).unwrap();
        }
        let mut after = Vec::new();
        payload.kernel.seek(SeekFrom::Start(0)).unwrap();
        payload.kernel.read_to_end(&mut after).unwrap();
        assert!(after == image, "the file was changed");
    }

    /// Pages behind a file's end can be mapped, but touching them is a bus error.
    #[test]
    fn a_kernel_that_is_cut_off_is_refused() {
        let image = large_kernel(0);
        for cut in [1, 4096, 4097, 20 * 4096] {
            let memory = crate::memory::create(16).unwrap();
            let error = load(&memory, &mut payload(&image[..image.len() - cut]), &description()).unwrap_err();
            assert!(matches!(error, Error::Kernel(_)), "{cut}: {error}");
        }
    }

    #[test]
    fn an_initrd_is_found_where_the_kernel_is_told() {
        let content: Vec<u8> = (0..20 * 4096 + 5_u32).map(|n| (n % 239) as u8).collect();
        let mut initrd = tempfile::tempfile().unwrap();
        initrd.write_all(&content).unwrap();
        let mut payload = Payload { initrd: Some(initrd), ..payload(&large_kernel(0)) };
        let memory = crate::memory::create(16).unwrap();
        load(&memory, &mut payload, &description()).unwrap();
        let start: u32 = memory.read_obj(GuestAddress(layout::ZERO_PAGE_START + 0x218)).unwrap();
        let mut found = vec![0; content.len()];
        memory.read_slice(&mut found, GuestAddress(start.into())).unwrap();
        assert!(found == content);
    }

    #[test]
    fn an_elf_is_entered_in_long_mode_with_its_zero_page() {
        let image = tests_support::elf(0x10_0000, 0x10_0000, &[0xf4]);
        let memory = crate::memory::create(16).unwrap();
        let entry = load(&memory, &mut payload(&image), &description()).unwrap();
        assert_eq!(entry, Entry::Long { rip: 0x10_0000, rsi: layout::ZERO_PAGE_START });
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x10_0000)).unwrap(), 0xf4);
        let pointer: u32 = memory.read_obj(GuestAddress(layout::ZERO_PAGE_START + 0x228)).unwrap();
        assert_eq!(u64::from(pointer), layout::CMDLINE_START);
        let rsdp: u64 = memory.read_obj(GuestAddress(layout::ZERO_PAGE_START + 0x70)).unwrap();
        assert_eq!(rsdp, layout::ACPI_START);
    }

    #[test]
    fn the_memory_map_leaves_out_the_hole() {
        let memory = crate::memory::create(3 * 1024 + 512).unwrap();
        let map = memory_map(&memory);
        assert!(map.contains(&(1 << 32, 512 << 20, RAM)));
        assert!(map.contains(&(1 << 20, (3 << 30) - (1 << 20), RAM)));
        let ram: u64 = map.iter().filter(|m| m.2 == RAM).map(|m| m.1).sum();
        assert!((3584 << 20) - ram < 1 << 20);
    }
}

/// Test images.
#[cfg(test)]
pub(crate) mod tests_support {
    /// An ELF image with one segment of code at physical address `address`.
    pub fn elf(entry: u64, address: u64, code: &[u8]) -> Vec<u8> {
        let mut image = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
        image.extend(2_u16.to_le_bytes()); // executable
        image.extend(62_u16.to_le_bytes()); // x86_64
        image.extend(1_u32.to_le_bytes());
        image.extend(entry.to_le_bytes());
        image.extend(64_u64.to_le_bytes()); // program headers
        image.extend(0_u64.to_le_bytes());
        image.extend(0_u32.to_le_bytes());
        for half in [64_u16, 56, 1, 0, 0, 0] {
            image.extend(half.to_le_bytes());
        }
        image.extend(1_u32.to_le_bytes()); // PT_LOAD
        image.extend(7_u32.to_le_bytes());
        for word in [120, address, address, code.len() as u64, code.len() as u64, 1] {
            image.extend(word.to_le_bytes());
        }
        image.extend(code);
        image
    }

    /// The same with that code at a page's begin in the file, and named as code by a section.
    pub fn kernel(address: u64, code: &[u8]) -> Vec<u8> {
        const OFFSET: u64 = 4096;
        let mut image = elf(address, address, &[]);
        image.resize(OFFSET as usize, 0);
        image.extend(code);
        let (size, table) = (code.len() as u64, image.len() as u64);
        for (at, word) in [(40, table), (72, OFFSET), (96, size), (104, size)] {
            image[at..at + 8].copy_from_slice(&word.to_le_bytes());
        }
        image[58..62].copy_from_slice(&[64, 0, 1, 0]);
        image.extend([0, 0, 0, 0, 1, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0]);
        for word in [address, OFFSET, size, 0, 0, 0] {
            image.extend(word.to_le_bytes());
        }
        image
    }
}
