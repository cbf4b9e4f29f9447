//! Processors: plain ones, and those of a machine whose CPUs may come and go (ACPI 6.5, 8.4).

use acpi_tables::Aml;
use acpi_tables::aml::{
    self, And, BufferData, Device, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, If,
    Local, Method, MethodCall, Name, Notify, OpRegion, OpRegionSpace, Path, Return, Store,
};
use acpi_tables::madt::{EnabledStatus, ProcessorLocalApic};

use super::{bytes, in_sb};
use crate::devices::cpus;
use crate::devices::cpus::registers::{EJECT, INSERTING, PLUGGED, REMOVING};
use crate::layout;

/// The CPUs that tables tell of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Processors {
    /// vCPUs that are there at the start: the first ones.
    pub count: u8,
    /// vCPUs that there may be, if that can change.
    pub max: Option<u8>,
}

/// Notification: look whether the device is there (ACPI 6.5, table 5.163).
const DEVICE_CHECK: u8 = 1;
/// Notification: the device should be let go of.
const EJECT_REQUEST: u8 = 3;
/// `_STA` of a device that is there, enabled, shown and working (ACPI 6.5, 6.3.7).
const THERE: u8 = 0xf;

impl Processors {
    /// Their local APICs, for the MADT. One that is not there yet is "online capable" (ACPI 6.5, table 5.21).
    pub(super) fn local_apics(self) -> impl Iterator<Item = ProcessorLocalApic> {
        (0..self.max.unwrap_or(self.count)).map(move |id| {
            let there = id < self.count;
            let status = if there { EnabledStatus::Enabled } else { EnabledStatus::DisabledOnlineCapable };
            ProcessorLocalApic::new(id, id, status)
        })
    }

    /// Their devices.
    pub(super) fn devices(self) -> Vec<u8> {
        match self.max {
            None => (0..self.count).flat_map(|id| in_sb(&plain(id))).collect(),
            Some(max) => container(max),
        }
    }

    /// What the event device's method does when CPUs came or should go: AML that says so, if that can be.
    pub(super) fn event(self) -> Option<MethodCall<'static>> {
        self.max.map(|_| MethodCall::new(Path::new("\\_SB_.CPUS.SCAN"), Vec::new()))
    }
}

struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        self.0.iter().for_each(|byte| sink.byte(*byte));
    }
}

fn device_name(id: u8) -> String {
    format!("C{id:03}")
}

fn register_name(id: u8) -> String {
    format!("R{id:03}")
}

fn plain(id: u8) -> Raw {
    let hid = Name::new("_HID".into(), &"ACPI0007");
    let uid = Name::new("_UID".into(), &id);
    Raw(bytes(&Device::new(device_name(id).as_str().into(), vec![&hid, &uid])))
}

/// The container of all processors that there may be, their registers, and the method that looks at these.
fn container(max: u8) -> Vec<u8> {
    let port = usize::from(layout::CPUS_PORT);
    let size = usize::from(cpus::SIZE);
    let region = OpRegion::new("REGS".into(), OpRegionSpace::SystemIO, &port, &size);
    let entries = (0..max).filter_map(|id| <[u8; 4]>::try_from(register_name(id).as_bytes()).ok());
    let field = Field::new(
        "REGS".into(),
        FieldAccessType::Byte,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        entries.map(|name| FieldEntry::Named(name, 8)).collect(),
    );
    let devices: Vec<Raw> = (0..max).map(pluggable).collect();
    let looks: Vec<Raw> = (1..max).map(look).collect();
    let scan = Method::new("SCAN".into(), 0, true, looks.iter().map(|look| look as &dyn Aml).collect());
    let hid = Name::new("_HID".into(), &"ACPI0010");
    let uid = Name::new("_UID".into(), &aml::ZERO);
    let mut children: Vec<&dyn Aml> = vec![&hid, &uid, &region, &field];
    children.extend(devices.iter().map(|device| device as &dyn Aml));
    children.push(&scan);
    in_sb(&Device::new("CPUS".into(), children))
}

/// A processor that may come and go; the first one stays.
fn pluggable(id: u8) -> Raw {
    let register = Path::new(&register_name(id));
    let hid = Name::new("_HID".into(), &"ACPI0007");
    let uid = Name::new("_UID".into(), &id);
    // Linux takes the APIC id of a CPU that comes later from here, and only from an enabled entry.
    let apic = bytes(&ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    let mat = Name::new("_MAT".into(), &BufferData::new(apic));
    let mut children: Vec<&dyn Aml> = vec![&hid, &uid, &mat];
    let plugged = And::new(&aml::ZERO, &register, &PLUGGED);
    let there = Return::new(&THERE);
    let gone = Return::new(&aml::ZERO);
    let when = If::new(&plugged, vec![&there]);
    let status = Method::new("_STA".into(), 0, false, vec![&when, &gone]);
    let let_go = Store::new(&register, &EJECT);
    let eject = Method::new("_EJ0".into(), 1, false, vec![&let_go]);
    if id != 0 {
        children.push(&status);
        children.push(&eject);
    }
    Raw(bytes(&Device::new(device_name(id).as_str().into(), children)))
}

/// Looks at one register, says that it was seen, and tells the operating system.
fn look(id: u8) -> Raw {
    let (register, device) = (Path::new(&register_name(id)), Path::new(&device_name(id)));
    let mut code = bytes(&Store::new(&Local(0), &register));
    for (bit, notification) in [(INSERTING, DEVICE_CHECK), (REMOVING, EJECT_REQUEST)] {
        let asked = And::new(&aml::ZERO, &Local(0), &bit);
        let (seen, tell) = (Store::new(&register, &bit), Notify::new(&device, &notification));
        code.extend(bytes(&If::new(&asked, vec![&seen, &tell])));
    }
    Raw(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(haystack: &[u8], needle: &[u8]) -> usize {
        haystack.windows(needle.len()).filter(|window| *window == needle).count()
    }

    #[test]
    fn every_cpu_but_the_first_can_be_let_go_of() {
        for max in [1, 2, 32] {
            let aml = Processors { count: 1, max: Some(max) }.devices();
            assert_eq!(count(&aml, b"ACPI0007"), usize::from(max));
            assert_eq!(count(&aml, b"_MAT"), usize::from(max));
            for name in [&b"_STA"[..], b"_EJ0"] {
                assert_eq!(count(&aml, name), usize::from(max) - 1);
            }
            assert_eq!(count(&aml, b"SCAN"), 1);
        }
    }

    #[test]
    fn without_a_maximum_there_is_nothing_but_the_cpus() {
        let processors = Processors { count: 2, max: None };
        assert!(processors.event().is_none());
        let aml = processors.devices();
        assert_eq!(aml.len(), 2 * in_sb(&plain(1)).len());
        assert_eq!((count(&aml, b"ACPI0007"), count(&aml, b"CPUS")), (2, 0));
    }

    #[test]
    fn spare_cpus_are_online_capable() {
        let flags = |processors: Processors| -> Vec<u8> {
            processors.local_apics().map(|apic| bytes(&apic)[4]).collect()
        };
        assert_eq!(flags(Processors { count: 2, max: Some(4) }), [1, 1, 2, 2]);
        assert_eq!(flags(Processors { count: 2, max: None }), [1, 1]);
    }
}
