//! ACPI tables of a hardware-reduced machine: what is there, and (saving seconds of probing) what is not.
//!
//! CPUs that come and go are told of in [`processors`]. Power: `_S5` and the sleep registers end the guest, the reset register
//! restarts it, the power button arrives through the generic event device (ACPI 6.5, 5.6.9).

mod processors;

use acpi_tables::Aml;
use acpi_tables::aml::{
    self, Device, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO, Interrupt,
    Memory32Fixed, Method, Name, OpRegion, OpRegionSpace, Package, ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{IoApic, LocalInterruptController, MADT};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes, GuestAddress};

use crate::devices::power;
use crate::error::{Error, Result};
use crate::layout;
use crate::memory::Memory;

pub use processors::Processors;

const OEM_ID: [u8; 6] = *b"ROOST ";
const OEM_TABLE_ID: [u8; 8] = *b"ROOSTVMM";
const OEM_REVISION: u32 = 1;

/// FADT IA-PC boot flags (ACPI 6.5, table 5.10): no VGA, no MSI, no CMOS clock; bit 1 (8042) stays clear.
const BOOT_FLAGS: u16 = 1 << 2 | 1 << 3 | 1 << 5;

/// A virtio-mmio window, as the guest is told about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioWindow {
    /// Guest physical address.
    pub address: u64,
    /// Interrupt line.
    pub gsi: u32,
}

/// Writes all tables and returns the RSDP's address.
///
/// # Errors
/// [`Error::Memory`] if they do not fit.
pub fn write(memory: &Memory, processors: Processors, windows: &[VirtioWindow]) -> Result<u64> {
    let mut next = layout::ACPI_START + 64; // the RSDP goes first
    let mut put = |table: &[u8]| -> Result<u64> {
        let address = next;
        next += (table.len() as u64).next_multiple_of(16);
        if next > layout::ACPI_START + layout::ACPI_SIZE {
            return Err(Error::Memory("ACPI tables do not fit".into()));
        }
        memory.write_slice(table, GuestAddress(address)).map_err(Error::memory("ACPI table"))?;
        Ok(address)
    };
    let dsdt = put(&dsdt(processors, windows))?;
    let fadt = put(&fadt(dsdt))?;
    let madt = put(&madt(processors))?;
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = put(&bytes(&xsdt))?;
    let rsdp = Rsdp::new(OEM_ID, xsdt);
    memory
        .write_slice(&bytes(&rsdp), GuestAddress(layout::ACPI_START))
        .map_err(Error::memory("ACPI RSDP"))?;
    Ok(layout::ACPI_START)
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn fadt(dsdt: u64) -> Vec<u8> {
    let register = |offset: u16| {
        GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(layout::POWER_PORT + offset))
    };
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless)
        .flag(Flags::HwReducedAcpi);
    fadt.iapc_boot_arch = BOOT_FLAGS.into();
    fadt.sleep_control_reg = register(power::SLEEP_CONTROL);
    fadt.sleep_status_reg = register(power::SLEEP_STATUS);
    fadt.reset_reg = register(power::RESET);
    fadt.reset_value = power::RESET_VALUE;
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"ROOSTVMM").into();
    bytes(&fadt.finalize())
}

fn madt(processors: Processors) -> Vec<u8> {
    let mut madt =
        MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, LocalInterruptController::Address(layout::LAPIC_ADDR));
    for apic in processors.local_apics() {
        madt.add_structure(apic);
    }
    madt.add_structure(IoApic::new(0, layout::IOAPIC_ADDR, 0));
    bytes(&madt)
}

fn dsdt(processors: Processors, windows: &[VirtioWindow]) -> Vec<u8> {
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    dsdt.append_slice(&serial());
    for (index, window) in windows.iter().enumerate() {
        dsdt.append_slice(&virtio(index, *window));
    }
    dsdt.append_slice(&processors.devices());
    dsdt.append_slice(&events(processors));
    dsdt.append_slice(&generation_id());
    dsdt.append_slice(&vmclock());
    // Sleep type 5 in both fields of the sleep control register.
    let sleep = power::SLEEP_TYPE_S5;
    dsdt.append_slice(&bytes(&Name::new("_S5_".into(), &Package::new(vec![&sleep, &sleep, &0_u8, &0_u8]))));
    dsdt.as_slice().to_vec()
}

fn in_sb(device: &dyn Aml) -> Vec<u8> {
    bytes(&Scope::new("_SB_".into(), vec![device]))
}

fn serial() -> Vec<u8> {
    in_sb(&Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &aml::EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &0_u8),
            &Name::new("_DDN".into(), &"COM1"),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &Interrupt::new(true, true, false, false, layout::SERIAL_GSI),
                    &IO::new(layout::SERIAL_PORT, layout::SERIAL_PORT, 0, 8),
                ]),
            ),
        ],
    ))
}

fn virtio(index: usize, window: VirtioWindow) -> Vec<u8> {
    let name = format!("VR{index:02}");
    let address = u32::try_from(window.address).unwrap_or(u32::MAX); // windows lie below 4 GiB
    let size = u32::try_from(layout::VIRTIO_MMIO_SIZE).unwrap_or(u32::MAX);
    in_sb(&Device::new(
        name.as_str().into(),
        vec![
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &index),
            &Name::new("_CCA".into(), &aml::ONE),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &Memory32Fixed::new(true, address, size),
                    &Interrupt::new(true, true, false, false, window.gsi),
                ]),
            ),
        ],
    ))
}

/// The generic event device: the button that it rings, the CPUs that it looks for.
fn events(processors: Processors) -> Vec<u8> {
    let event_port = usize::from(layout::POWER_PORT + power::EVENT);
    let button = in_sb(&Device::new(
        "PWRB".into(),
        vec![
            &Name::new("_HID".into(), &aml::EISAName::new("PNP0C0C")),
            &Name::new("_UID".into(), &aml::ZERO),
        ],
    ));
    let region = OpRegion::new("EVTR".into(), OpRegionSpace::SystemIO, &event_port, &aml::ONE);
    let field = Field::new(
        "EVTR".into(),
        FieldAccessType::Byte,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![FieldEntry::Named(*b"EVST", 8)],
    );
    let path = aml::Path::new("\\_SB_.PWRB");
    let (mask, press) = (power::EVENT_POWER_BUTTON, aml::Notify::new(&path, &0x80_u8));
    // Reading the register acknowledges what it reports.
    let register = aml::Path::new("EVST");
    let events = aml::Store::new(&aml::Local(0), &register);
    let pressed = aml::And::new(&aml::Local(1), &aml::Local(0), &mask);
    let equal = aml::Equal::new(&aml::Local(1), &mask);
    let button_event = aml::If::new(&equal, vec![&press]);
    let generation = aml::Path::new("\\_SB_.VGEN");
    let (mask, fork) = (power::EVENT_GENERATION, aml::Notify::new(&generation, &0x80_u8));
    let forked = aml::And::new(&aml::Local(1), &aml::Local(0), &mask);
    let equal = aml::Equal::new(&aml::Local(1), &mask);
    let clock = aml::Path::new("\\_SB_.VCLK");
    let disruption = aml::Notify::new(&clock, &0x80_u8);
    let fork_event = aml::If::new(&equal, vec![&fork, &disruption]);
    let mut body: Vec<&dyn Aml> = vec![&events, &pressed, &button_event, &forked, &fork_event];
    let scan = processors.event();
    let changed = aml::And::new(&aml::ZERO, &aml::Local(0), &power::EVENT_CPUS);
    let cpu_event = scan.as_ref().map(|scan| aml::If::new(&changed, vec![scan]));
    body.extend(cpu_event.as_ref().map(|event| event as &dyn Aml));
    let ged = in_sb(&Device::new(
        "GED_".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &aml::ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&Interrupt::new(true, true, false, false, layout::GED_GSI)]),
            ),
            &region,
            &field,
            &Method::new("_EVT".into(), 1, true, body),
        ],
    ));
    [button, ged].concat()
}

/// VM generation id: 16 random bytes that change when a machine's state forks. Linux also seeds its entropy pool from it.
fn generation_id() -> Vec<u8> {
    let address = u32::try_from(layout::VMGENID_START).unwrap_or(u32::MAX);
    in_sb(&Device::new(
        "VGEN".into(),
        vec![
            &Name::new("_HID".into(), &"ROOS0001"),
            &Name::new("_CID".into(), &"VM_Gen_Counter"),
            &Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &Name::new("ADDR".into(), &Package::new(vec![&address, &0_u32])),
        ],
    ))
}

/// VMClock: tells when clocks are not to be believed any more.
fn vmclock() -> Vec<u8> {
    let address = u32::try_from(layout::VMCLOCK_START).unwrap_or(u32::MAX);
    in_sb(&Device::new(
        "VCLK".into(),
        vec![
            &Name::new("_HID".into(), &"ROOS0002"),
            &Name::new("_CID".into(), &"VMCLOCK"),
            &Name::new("_DDN".into(), &"VMCLOCK"),
            &Name::new("_STA".into(), &0xf_u8),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&Memory32Fixed::new(false, address, 0x1000)]),
            ),
        ],
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(memory: &Memory, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    fn table(memory: &Memory, address: u64) -> Vec<u8> {
        let header = read(memory, address, 8);
        let length = u32::from_le_bytes(header[4..8].try_into().unwrap()) as usize;
        let table = read(memory, address, length);
        assert_eq!(table.iter().fold(0_u8, |s, b| s.wrapping_add(*b)), 0, "checksum of {:?}", &table[..4]);
        table
    }

    #[test]
    fn a_guest_finds_its_way_from_the_rsdp_to_every_table() {
        let memory = crate::memory::create(2).unwrap();
        let windows: Vec<_> = layout::VIRTIO_GSIS
            .iter()
            .enumerate()
            .map(|(i, gsi)| VirtioWindow { address: layout::VIRTIO_MMIO_START + 4096 * i as u64, gsi: *gsi })
            .collect();
        let processors = Processors { count: 1, max: Some(32) };
        let rsdp = write(&memory, processors, &windows).unwrap();
        let rsdp = read(&memory, rsdp, 36);
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        let xsdt = table(&memory, u64::from_le_bytes(rsdp[24..32].try_into().unwrap()));
        let entries: Vec<u64> =
            xsdt[36..].chunks(8).map(|c| u64::from_le_bytes(c.try_into().unwrap())).collect();
        let fadt = table(&memory, entries[0]);
        assert_eq!(&fadt[..4], b"FACP");
        assert_eq!(u16::from_le_bytes([fadt[109], fadt[110]]) & (1 << 5), 1 << 5, "no CMOS clock");
        assert_eq!(u16::from_le_bytes([fadt[109], fadt[110]]) & (1 << 1), 0, "no 8042");
        assert_eq!(
            u32::from_le_bytes(fadt[112..116].try_into().unwrap()) & (1 << 20),
            1 << 20,
            "hardware reduced"
        );
        let dsdt = table(&memory, u64::from_le_bytes(fadt[140..148].try_into().unwrap()));
        assert_eq!(&dsdt[..4], b"DSDT");
        for name in [&b"VR00"[..], b"VR14", b"COM1", b"GED_", b"PWRB", b"C031", b"_S5_", b"VGEN"] {
            assert!(dsdt.windows(4).any(|w| w == name), "{name:?}");
        }
        let madt = table(&memory, entries[1]);
        assert_eq!(madt.len(), 44 + 32 * 8 + 12);
    }
}
