//! Where things are in the guest's physical memory and port space.
//!
//! ```text
//! 0x0000_0000 ┬ RAM: boot structures below 640 KiB, the kernel from 1 MiB up, the initrd at the top
//! 0x000e_0000 │ ACPI tables (RSDP first), VMClock, VM generation id
//! 0x000f_0000 │ SMBIOS tables
//! 0xc000_0000 ┼ hole: virtio-mmio windows, IOAPIC, local APIC, KVM's TSS pages
//! 0x1_0000_0000 ┴ the rest of RAM
//! ```

/// Start of the hole below 4 GiB: RAM never lies between this and [`HIGH_RAM_START`].
pub const MMIO_HOLE_START: u64 = 0xc000_0000;
/// Where RAM goes on above the hole.
pub const HIGH_RAM_START: u64 = 0x1_0000_0000;

/// The pointer to the MP table: near the start of the first range in which kernels look for it (not at 0, which means "none" to some).
pub const MP_POINTER: u64 = 0x10;
/// The MP table.
pub const MP_TABLE_START: u64 = 0x600;
/// Room for the MP table.
pub const MP_TABLE_SIZE: u64 = 0xa00;
/// The boot GDT.
pub const GDT_START: u64 = 0x500;
/// The (empty) boot IDT.
pub const IDT_START: u64 = 0x540;
/// PVH start info, module list and memory map.
pub const PVH_INFO_START: u64 = 0x6000;
/// The Linux "zero page" (`struct boot_params`).
pub const ZERO_PAGE_START: u64 = 0x7000;
/// Initial stack pointer.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Boot page tables: one PML4, one PDPT, four page directories.
pub const PAGE_TABLES_START: u64 = 0x9000;
/// The kernel command line.
pub const CMDLINE_START: u64 = 0x2_0000;
/// Room for the kernel command line, its NUL included (what Linux on x86 takes).
pub const CMDLINE_MAX: usize = 2048;
/// End of conventional memory; above it the extended BIOS data area would be.
pub const EBDA_START: u64 = 0x9_fc00;
/// Where the RSDP and the other ACPI tables are (a place that kernels scan by themselves).
pub const ACPI_START: u64 = 0xe_0000;
/// Room for ACPI tables.
pub const ACPI_SIZE: u64 = 0xe000;
/// The page with VMClock.
pub const VMCLOCK_START: u64 = 0xe_e000;
/// The page with the VM generation id.
pub const VMGENID_START: u64 = 0xe_f000;
/// The SMBIOS entry point and tables (the DMI scan range).
pub const SMBIOS_START: u64 = 0xf_0000;
/// Room for SMBIOS.
pub const SMBIOS_SIZE: u64 = 0xfff0;
/// Where a PC's firmware begins after a reset; kernels that know no better jump here to restart the machine.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// First byte above the first MiB: kernels are loaded from here up.
pub const HIMEM_START: u64 = 0x10_0000;

/// First virtio-mmio window.
pub const VIRTIO_MMIO_START: u64 = 0xc000_0000;
/// Size of one virtio-mmio window.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;
/// The IOAPIC's registers (fixed by KVM).
pub const IOAPIC_ADDR: u32 = 0xfec0_0000;
/// The IOAPIC's version (fixed by KVM).
pub const IOAPIC_VERSION: u8 = 0x11;
/// The local APIC's registers.
pub const LAPIC_ADDR: u32 = 0xfee0_0000;
/// The local APICs' version (fixed by KVM).
pub const LAPIC_VERSION: u8 = 0x14;
/// Three pages that KVM wants on Intel CPUs.
pub const KVM_TSS_ADDR: usize = 0xfffb_d000;
/// One page that KVM wants on Intel CPUs without unrestricted guests.
pub const KVM_IDENTITY_MAP_ADDR: u64 = 0xfffb_c000;

/// COM1.
pub const SERIAL_PORT: u16 = 0x3f8;
/// COM1's interrupt.
pub const SERIAL_GSI: u32 = 4;
/// The keyboard controller's command port: only its reset command is obeyed.
pub const I8042_COMMAND_PORT: u16 = 0x64;
/// Power registers: sleep control, sleep status, reset, event status.
pub const POWER_PORT: u16 = 0x600;
/// CPU registers: one byte per vCPU, there on machines whose CPUs may come and go.
pub const CPUS_PORT: u16 = 0x620;
/// The interrupt of the generic event device (power button, CPUs).
pub const GED_GSI: u32 = 5;
/// Interrupt lines, each at the IOAPIC's pin of its number.
pub const GSIS: u8 = 24;
/// Interrupt lines for virtio-mmio devices: what COM1, the event device and fixed PC parts leave of the IOAPIC's 24.
pub const VIRTIO_GSIS: [u32; 15] = [6, 7, 10, 11, 12, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23];
/// Most virtio devices that one machine can have.
pub const MAX_VIRTIO_DEVICES: usize = VIRTIO_GSIS.len();

/// Most vCPUs per machine.
pub const MAX_VCPUS: u8 = 32;
/// Least guest memory, MiB.
pub const MIN_MEMORY_MIB: u64 = 1;
/// Most guest memory, MiB (2 TiB).
pub const MAX_MEMORY_MIB: u64 = 2 << 20;
