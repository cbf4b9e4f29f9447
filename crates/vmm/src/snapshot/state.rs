//! What the state file holds.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::format;
use crate::config::VmConfig;
use crate::cpu::cpuid::SavedCpuid;
use crate::cpu::state::SavedVcpu;
use crate::devices::cpus::registers::CpusState;
use crate::devices::serial::SavedSerial;
use crate::devices::virtio::mmio::SavedTransport;
use crate::error::{Error, Result};
use crate::vm::SavedVm;

/// A machine's state, memory aside.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedMachine {
    /// Which snapshot this is: the memory file says the same.
    pub id: [u8; 16],
    /// The monitor that wrote it, for people.
    pub vmm_version: String,
    /// When, by the host's wall clock: nanoseconds since 1970.
    pub taken_at_ns: u64,
    /// The configuration; names in it are looked up anew.
    pub config: VmConfig,
    /// What each vCPU can do.
    pub cpuid: Vec<SavedCpuid>,
    /// vCPUs in order.
    pub vcpus: Vec<SavedVcpu>,
    /// Interrupt controllers, timers, clock.
    pub vm: SavedVm,
    /// COM1.
    pub serial: SavedSerial,
    /// Events that the guest has not read.
    pub power_events: u8,
    /// CPUs that come and go, if they do.
    pub cpus: Option<CpusState>,
    /// virtio devices in the order of their windows.
    pub devices: Vec<SavedTransport>,
}

impl SavedMachine {
    /// The host's wall clock, nanoseconds since 1970.
    #[must_use]
    pub fn now_ns() -> u64 {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
    }

    /// The time since it was taken; none if the clock was set back.
    #[must_use]
    pub fn age(&self) -> Duration {
        Duration::from_nanos(Self::now_ns().saturating_sub(self.taken_at_ns))
    }
}

/// Writes a state file, in place of what the file holds, to stable storage.
///
/// # Errors
/// [`Error::Io`].
pub fn write(file: &mut File, machine: &SavedMachine) -> Result<()> {
    let state = serde_json::to_vec(machine).map_err(|error| Error::Snapshot(error.to_string()))?;
    let bytes = format::frame(&state);
    let write = |file: &mut File| {
        file.set_len(0)?;
        file.seek(SeekFrom::Start(0))?;
        file.write_all(&bytes)?;
        file.sync_all()
    };
    write(file).map_err(Error::io("writing the state file"))
}

/// Reads a state file.
///
/// # Errors
/// [`Error::Snapshot`] for what is none, [`Error::Io`].
pub fn read(file: &mut File) -> Result<SavedMachine> {
    let mut bytes = Vec::new();
    let read =
        file.seek(SeekFrom::Start(0)).and_then(|_| file.take(format::MAX_STATE).read_to_end(&mut bytes));
    read.map_err(Error::io("reading the state file"))?;
    let state = format::unframe(&bytes)?;
    let machine: SavedMachine = serde_json::from_slice(state)
        .map_err(|error| Error::Snapshot(format!("the state is not as this version has it: {error}")))?;
    machine.config.check()?;
    let vcpus = usize::from(machine.config.machine_config.vcpus());
    if machine.vcpus.len() != vcpus || machine.cpuid.len() != vcpus {
        return Err(Error::Snapshot(format!("it holds {} of {vcpus} vCPUs", machine.vcpus.len())));
    }
    Ok(machine)
}
