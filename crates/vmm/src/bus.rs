//! The guest's port and register space: which device answers at which address.

use std::collections::BTreeMap;
use std::sync::Arc;

/// What a write asks of the machine beyond the device itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing.
    Done,
    /// The guest powered off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
}

/// A device that answers at addresses. Called by vCPU threads at any time, so it locks what it must.
pub trait BusDevice: Send + Sync {
    /// Fills `data` with what is at `offset` from the device's first address.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Takes what the guest wrote at `offset`.
    fn write(&self, offset: u64, data: &[u8]) -> Outcome;
}

/// A space of addresses. Where no device answers, reads give ones and writes go nowhere, as on a PC.
#[derive(Clone, Default)]
pub struct Bus {
    devices: BTreeMap<u64, (u64, Arc<dyn BusDevice>)>,
}

impl Bus {
    /// Puts a device at `[base, base + size)`.
    ///
    /// # Panics
    /// If the range is empty or overlaps another: the machine's layout is fixed, so that is a fault of this program.
    pub fn insert(&mut self, base: u64, size: u64, device: Arc<dyn BusDevice>) {
        assert!(
            size > 0 && self.find(base).is_none() && self.find(base + size - 1).is_none(),
            "overlap at {base:#x}"
        );
        self.devices.insert(base, (size, device));
    }

    fn find(&self, address: u64) -> Option<(u64, &Arc<dyn BusDevice>)> {
        let (base, (size, device)) = self.devices.range(..=address).next_back()?;
        let offset = address - base;
        (offset < *size).then_some((offset, device))
    }

    /// Whether a device answers there.
    #[must_use]
    pub fn has(&self, address: u64) -> bool {
        self.find(address).is_some()
    }

    /// A guest's read.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address) {
            Some((offset, device)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// A guest's write.
    pub fn write(&self, address: u64, data: &[u8]) -> Outcome {
        self.find(address).map_or(Outcome::Done, |(offset, device)| device.write(offset, data))
    }
}

impl std::fmt::Debug for Bus {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ranges = self.devices.iter().map(|(base, (size, _))| format!("{base:#x}+{size:#x}"));
        formatter.debug_list().entries(ranges).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo;

    impl BusDevice for Echo {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(u8::try_from(offset).unwrap());
        }
        fn write(&self, offset: u64, _data: &[u8]) -> Outcome {
            if offset == 1 { Outcome::Reset } else { Outcome::Done }
        }
    }

    #[test]
    fn a_device_answers_in_its_range_and_nothing_outside() {
        let mut bus = Bus::default();
        bus.insert(0x10, 4, Arc::new(Echo));
        let mut byte = [0];
        for (address, value) in [(0xf, 0xff), (0x10, 0), (0x13, 3), (0x14, 0xff), (u64::MAX, 0xff)] {
            bus.read(address, &mut byte);
            assert_eq!(byte[0], value, "{address:#x}");
            assert_eq!(bus.has(address), value != 0xff, "{address:#x}");
        }
        assert_eq!(bus.write(0x11, &[0]), Outcome::Reset);
        assert_eq!(bus.write(0x15, &[0]), Outcome::Done);
    }

    #[test]
    #[should_panic(expected = "overlap")]
    fn overlapping_devices_are_a_programming_error() {
        let mut bus = Bus::default();
        bus.insert(0x10, 4, Arc::new(Echo));
        bus.insert(0x13, 4, Arc::new(Echo));
    }
}
