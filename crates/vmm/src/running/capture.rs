//! Takes a snapshot of a paused machine.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::MutexGuard;

use super::Parts;
use super::written::Written;
use crate::cpu::cpuid::SavedCpuid;
use crate::cpu::model::CpuModel;
use crate::descriptors::Access;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::entropy::host_random;
use crate::devices::virtio::mmio::lock;
use crate::error::{Error, Result};
use crate::snapshot::requests::{CreateSnapshot, SnapshotType};
use crate::snapshot::{self, MemoryFile, Pages, SavedMachine};

/// A device that does nothing meanwhile.
type Locked<'a> = MutexGuard<'a, dyn VirtioDevice + 'static>;

/// Takes the snapshot; returns its id.
pub fn create(parts: &Parts, request: &CreateSnapshot) -> Result<[u8; 16]> {
    let tracked = parts.config.machine_config.track_dirty_pages;
    if request.snapshot_type == SnapshotType::Diff && !tracked {
        return Err(Error::State(
            "a diff snapshot needs track_dirty_pages in machine-config or snapshot/load, and it was false there".into(),
        ));
    }
    let file = |name: &str, what| parts.descriptors.file(name, what, Access::CreateReadWrite);
    let mut state_file = file(&request.snapshot_path, "state file")?;
    let memory_file = file(&request.mem_file_path, "memory file")?;
    if same(&state_file, &memory_file)? {
        return Err(Error::Config("snapshot_path and mem_file_path are one file".into()));
    }
    if let Some(source) = &parts.memory_file {
        for (name, file) in [(&request.mem_file_path, &memory_file), (&request.snapshot_path, &state_file)] {
            if same(source, file)? {
                return Err(Error::Config(format!(
                    "{name:?} is the file that this machine's memory comes from, which must not change: name another"
                )));
            }
        }
    }
    // A state file that was there before must not go with a memory file that is no longer its own.
    state_file.set_len(0).map_err(Error::io("emptying the state file"))?;

    // No device works while these locks are held, so memory and state are of one moment.
    let mut devices: Vec<Locked<'_>> =
        parts.transports.iter().map(|transport| lock(transport.device())).collect();
    let taken = take(parts, request, &mut devices, &mut state_file, memory_file);
    for device in &mut devices {
        device.go_on();
    }
    taken
}

/// With every device locked.
fn take(
    parts: &Parts,
    request: &CreateSnapshot,
    devices: &mut [Locked<'_>],
    state_file: &mut File,
    memory_file: File,
) -> Result<[u8; 16]> {
    let tracked = parts.config.machine_config.track_dirty_pages;
    for device in devices.iter_mut() {
        let id = device.name().to_owned();
        device.hold().map_err(Error::io(format!("holding {id:?}")))?;
        device.flush().map_err(|source| Error::Disk { id, what: "flushing it".into(), source })?;
    }
    let mut id = [0; 16];
    host_random(&mut id);
    let saved = SavedMachine {
        id,
        vmm_version: env!("CARGO_PKG_VERSION").to_owned(),
        taken_at_ns: SavedMachine::now_ns(),
        config: parts.config.clone(),
        cpuid: cpuid(parts)?,
        vcpus: parts.vcpus.iter().map(crate::vcpu::VcpuHandle::save).collect::<Result<_>>()?,
        vm: parts.vm.save()?,
        serial: parts.serial.save(),
        power_events: parts.power.save(),
        cpus: parts.cpus.as_ref().map(|cpus| cpus.state()),
        devices: parts
            .transports
            .iter()
            .zip(devices.iter())
            .map(|(transport, device)| transport.save(&**device))
            .collect(),
    };
    let written = if tracked {
        Some(Written::take(&parts.memory, |slot, bytes| parts.vm.dirty_pages(slot, bytes))?)
    } else {
        None
    };
    let result = write(parts, request, &saved, written.as_ref(), state_file, memory_file);
    if let (Err(_), Some(written)) = (&result, &written) {
        written.put_back(&parts.memory);
    }
    result.map(|()| id)
}

/// The vCPUs' tables, as they were made: what KVM tells of a vCPU itself is not the same with every KVM.
fn cpuid(parts: &Parts) -> Result<Vec<SavedCpuid>> {
    if !parts.tables.is_empty() {
        return Ok(parts.tables.iter().map(SavedCpuid::new).collect());
    }
    CpuModel::tables(&parts.kvm, &parts.config)
}

/// Memory first: a state file is whole only beside its memory.
fn write(
    parts: &Parts,
    request: &CreateSnapshot,
    saved: &SavedMachine,
    written: Option<&Written>,
    state_file: &mut File,
    memory_file: File,
) -> Result<()> {
    let memory_file = MemoryFile::new(memory_file);
    match (request.snapshot_type, parts.base, written) {
        (SnapshotType::Diff, Some(base), Some(written)) => {
            let wanted = |region, page| written.has(region, page);
            memory_file.write(&parts.memory, saved.id, Pages::Since(base), wanted)?;
        }
        // The first diff has nothing to differ from.
        _ => drop(memory_file.write(&parts.memory, saved.id, Pages::All, |_, _| true)?),
    }
    snapshot::write(state_file, saved)
}

fn same(one: &File, other: &File) -> Result<bool> {
    let of = |file: &File| file.metadata().map(|found| (found.dev(), found.ino()));
    let (one, other) =
        of(one).and_then(|one| Ok((one, of(other)?))).map_err(Error::io("looking at the files"))?;
    Ok(one == other)
}
