//! SMBIOS (DMI) tables: who made this machine. Cloud-init asks here whether it is on EC2.
//!
//! SMBIOS 3.0 entry point (DSP0134, 5.2.2) at the start of the scan range, the structure table right behind it.

use vm_memory::{Bytes, GuestAddress};

use crate::config::{SmbiosConfig, parse_uuid};
use crate::error::{Error, Result};
use crate::layout::{SMBIOS_SIZE, SMBIOS_START};
use crate::memory::Memory;

const ENTRY_SIZE: u8 = 24;
const TABLE_START: u64 = SMBIOS_START + 32;

/// Writes the tables.
///
/// # Errors
/// [`Error::Config`] for a bad UUID, [`Error::Memory`].
pub fn write(memory: &Memory, config: &SmbiosConfig) -> Result<()> {
    let table = structures(config)?;
    if table.len() as u64 > SMBIOS_SIZE - (TABLE_START - SMBIOS_START) {
        return Err(Error::Memory(format!("SMBIOS tables of {} bytes do not fit", table.len())));
    }
    let length = u32::try_from(table.len()).unwrap_or(u32::MAX);
    memory.write_slice(&table, GuestAddress(TABLE_START)).map_err(Error::memory("SMBIOS table"))?;
    memory
        .write_slice(&entry_point(length), GuestAddress(SMBIOS_START))
        .map_err(Error::memory("SMBIOS entry point"))
}

fn entry_point(table_length: u32) -> Vec<u8> {
    let mut entry = b"_SM3_".to_vec();
    entry.push(0); // checksum, below
    entry.push(ENTRY_SIZE);
    entry.extend([3, 2, 0]); // version 3.2, document revision 0
    entry.extend([1, 0]); // entry point revision, reserved
    entry.extend(table_length.to_le_bytes());
    entry.extend(TABLE_START.to_le_bytes());
    let sum = entry.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    entry[5] = sum.wrapping_neg();
    entry
}

struct Table {
    bytes: Vec<u8>,
    next_handle: u16,
}

impl Table {
    /// One structure: header, formatted area, the strings that the formatted area numbers from 1, a double NUL.
    fn add(&mut self, kind: u8, formatted: &[u8], strings: &[&str]) {
        self.bytes.push(kind);
        self.bytes.push(u8::try_from(formatted.len() + 4).unwrap_or(u8::MAX));
        self.bytes.extend(self.next_handle.to_le_bytes());
        self.bytes.extend(formatted);
        for string in strings {
            self.bytes.extend(string.as_bytes());
            self.bytes.push(0);
        }
        if strings.is_empty() {
            self.bytes.push(0);
        }
        self.bytes.push(0);
        self.next_handle += 1;
    }
}

fn structures(config: &SmbiosConfig) -> Result<Vec<u8>> {
    fn or<'a>(value: Option<&'a String>, default: &'a str) -> &'a str {
        value.map_or(default, String::as_str)
    }
    let mut table = Table { bytes: Vec::new(), next_handle: 0 };

    // Type 0, BIOS information (7.1): vendor, version, no segment, date, characteristics "not supported" + virtual machine.
    let mut bios = vec![1, 2, 0, 0, 3, 0];
    bios.extend((1_u64 << 3).to_le_bytes());
    bios.extend([0, 0x10, 0, 0, 0xff, 0xff]); // extension bytes (bit 4: virtual machine), releases
    table.add(0, &bios, &["Roost", env!("CARGO_PKG_VERSION"), "01/01/2026"]);

    // Type 1, system information (7.2): the first three UUID fields are little endian.
    let mut uuid = config.uuid.as_deref().map_or(Ok([0; 16]), parse_uuid)?;
    uuid[..4].reverse();
    uuid[4..6].reverse();
    uuid[6..8].reverse();
    let mut system = vec![1, 2, 3, 4];
    system.extend(uuid);
    system.extend([6, 5, 6]); // wake-up: power switch; SKU number: as the family; family
    let strings = [
        or(config.manufacturer.as_ref(), "Roost"),
        or(config.product.as_ref(), "Roost instance"),
        or(config.version.as_ref(), env!("CARGO_PKG_VERSION")),
        or(config.serial.as_ref(), "none"),
        or(config.product.as_ref(), "none"),
        or(config.family.as_ref(), "none"),
    ];
    table.add(1, &system, &strings);

    // Type 3, chassis (7.4): manufacturer, type "other", version, serial, asset tag, states "safe", no details.
    let mut chassis = vec![1, 1, 0, 0, 2, 3, 3, 3, 2];
    chassis.extend(0_u32.to_le_bytes());
    chassis.extend([0, 0, 0, 0]);
    table.add(3, &chassis, &[strings[0], or(config.asset_tag.as_ref(), "none")]);

    table.add(127, &[], &[]);
    Ok(table.bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads the structures as a guest does: (type, formatted area with header, strings).
    fn parse(mut bytes: &[u8]) -> Vec<(u8, Vec<u8>, Vec<String>)> {
        let mut found = Vec::new();
        while !bytes.is_empty() {
            let length = usize::from(bytes[1]);
            let end = length + bytes[length..].windows(2).position(|w| w == [0, 0]).unwrap();
            let strings = bytes[length..end].split(|b| *b == 0).filter(|s| !s.is_empty());
            let strings = strings.map(|s| String::from_utf8(s.to_vec()).unwrap()).collect();
            found.push((bytes[0], bytes[..length].to_vec(), strings));
            bytes = &bytes[end + 2..];
        }
        found
    }

    #[test]
    fn a_guest_finds_what_the_configuration_says() {
        let uuid = "ec2a0001-0203-0405-0607-08090a0b0c0d";
        let config = SmbiosConfig {
            manufacturer: Some("Amazon EC2".into()),
            product: Some("t3.nano".into()),
            serial: Some(uuid.into()),
            uuid: Some(uuid.into()),
            ..SmbiosConfig::default()
        };
        let memory = crate::memory::create(2).unwrap();
        write(&memory, &config).unwrap();
        let mut entry = [0_u8; 24];
        memory.read_slice(&mut entry, GuestAddress(SMBIOS_START)).unwrap();
        assert_eq!(&entry[..5], b"_SM3_");
        assert_eq!(entry.iter().fold(0_u8, |s, b| s.wrapping_add(*b)), 0);
        let length = u32::from_le_bytes(entry[12..16].try_into().unwrap()) as usize;
        let address = u64::from_le_bytes(entry[16..24].try_into().unwrap());
        let mut table = vec![0; length];
        memory.read_slice(&mut table, GuestAddress(address)).unwrap();
        let found = parse(&table);
        assert_eq!(found.iter().map(|f| f.0).collect::<Vec<_>>(), [0, 1, 3, 127]);
        let (_, system, strings) = &found[1];
        assert_eq!(system.len(), 27);
        assert_eq!(strings[usize::from(system[4]) - 1], "Amazon EC2");
        assert_eq!(strings[usize::from(system[5]) - 1], "t3.nano");
        assert_eq!(strings[usize::from(system[7]) - 1], uuid);
        assert_eq!(system[8..12], [0x01, 0x00, 0x2a, 0xec]); // little endian time_low
        assert_eq!(system[16..24], [0x06, 0x07, 0x08, 0x09, 0x0a, 0x0b, 0x0c, 0x0d]);
    }
}
