//! CPUs and memory of a machine that runs: they come and go as the host wishes and the guest agrees ([`crate::devices::cpus`],
//! [`crate::devices::virtio::mem`]).

use std::sync::{MutexGuard, PoisonError};

use super::{Parts, Running};
use crate::config::{MachineConfig, MachineConfigUpdate, MemoryHotplugUpdate};
use crate::devices::cpus::Count;
use crate::devices::virtio::mem::Mem;
use crate::devices::virtio::mem::config::MemoryHotplugStatus;
use crate::error::{Error, Result};
use crate::vcpu::VcpuHandle;

/// How many vCPUs there are.
pub(super) fn count(parts: &Parts) -> Count {
    let fixed = parts.config.machine_config.vcpu_count;
    let unchanging = Count { wanted: fixed, plugged: fixed.into(), taken: fixed.into() };
    parts.cpus.as_ref().map_or(unchanging, |cpus| cpus.count())
}

impl Running {
    /// CPUs and memory that are wanted now.
    #[must_use]
    pub fn machine_config(&self) -> MachineConfig {
        let machine = self.parts.config.machine_config.clone();
        let requested = self.memory_hotplug().map_or(0, |status| status.requested_size_mib);
        MachineConfig {
            vcpu_count: count(&self.parts).wanted,
            mem_size_mib: machine.mem_size_mib + requested,
            ..machine
        }
    }

    /// Says how many CPUs and how much memory the guest should have. It is told, and takes or gives them as soon as it likes:
    /// `GET /metrics` and `GET /hotplug/memory` have the numbers.
    ///
    /// # Errors
    /// [`Error::Config`] for what the machine cannot have, [`Error::Kvm`].
    pub fn resize(&mut self, update: MachineConfigUpdate) -> Result<()> {
        let MachineConfigUpdate { vcpu_count, mem_size_mib } = update;
        if let Some(count) = vcpu_count {
            self.check_vcpus(count)?;
        }
        let beyond = mem_size_mib.map(|wanted| self.beyond(wanted)).transpose()?;
        // Nothing is refused from here on.
        if let (Some(mib), Some(mut mem)) = (beyond, self.mem()) {
            mem.request(mib);
        }
        vcpu_count.map_or(Ok(()), |count| self.want_vcpus(count))
    }

    /// How much of the memory that is wanted comes and goes.
    fn beyond(&self, wanted_mib: u64) -> Result<u64> {
        let own = self.parts.config.machine_config.mem_size_mib;
        match &self.parts.config.memory_hotplug {
            Some(hotplug) => hotplug.beyond(own, wanted_mib),
            None if wanted_mib == own => Ok(0),
            None => Err(Error::Config(format!(
                "machine-config: mem_size_mib {wanted_mib}: the machine was started without memory-hotplug, so it keeps its {own}"
            ))),
        }
    }

    fn mem(&self) -> Option<MutexGuard<'_, Mem>> {
        self.parts.mem.as_ref().map(|mem| mem.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What the guest has of memory that comes and goes, and should have.
    #[must_use]
    pub fn memory_hotplug(&self) -> Option<MemoryHotplugStatus> {
        self.mem().map(|mem| mem.status())
    }

    /// Says how much of it the guest should have.
    ///
    /// # Errors
    /// [`Error::Config`] for what it cannot have, [`Error::State`] on a machine without it.
    pub fn update_memory_hotplug(&self, update: MemoryHotplugUpdate) -> Result<()> {
        let hotplug = self.parts.config.memory_hotplug.zip(self.mem());
        let (config, mut mem) = hotplug.ok_or_else(|| {
            Error::State(
                "the machine has no memory that comes and goes; it is added before the start (PUT /hotplug/memory)"
                    .into(),
            )
        })?;
        config.check_requested(update.requested_size_mib)?;
        mem.request(update.requested_size_mib);
        Ok(())
    }

    fn check_vcpus(&self, count: u8) -> Result<()> {
        let machine = &self.parts.config.machine_config;
        let max = machine.max_vcpu_count.unwrap_or(machine.vcpu_count);
        let why = if machine.max_vcpu_count.is_none() && count != machine.vcpu_count {
            format!("the machine was started without max_vcpu_count, so it keeps its {max}")
        } else if count == 0 || count > max {
            format!("outside 1–{max}, the machine's max_vcpu_count")
        } else {
            return Ok(());
        };
        Err(Error::Config(format!("machine-config: vcpu_count {count}: {why}")))
    }

    fn want_vcpus(&mut self, count: u8) -> Result<()> {
        // What the guest has let go of is put away first: it may be what comes back.
        self.park_let_go()?;
        let Some(cpus) = &self.parts.cpus else { return Ok(()) };
        let came = cpus.want(count);
        self.renew(&came)?;
        cpus.announce().map_err(Error::io("raising the event device's interrupt"))
    }

    /// Lets the vCPUs of all CPUs in the machine run.
    pub(super) fn run_plugged(&self) -> Result<()> {
        self.parts.vcpus.iter().filter(|vcpu| self.has(vcpu)).try_for_each(VcpuHandle::run)
    }

    fn has(&self, vcpu: &VcpuHandle) -> bool {
        self.parts.cpus.as_ref().is_none_or(|cpus| cpus.has(vcpu.id()))
    }

    /// Parks the vCPUs of CPUs that the guest has let go of.
    pub(super) fn park_let_go(&self) -> Result<()> {
        self.parts.cpus.as_ref().map_or(Ok(()), |cpus| self.renew(&cpus.take_let_go()))
    }

    /// Makes these vCPUs as after power-on. Those in the machine run then, or will when the machine is resumed.
    fn renew(&self, ids: &[u8]) -> Result<()> {
        for vcpu in self.parts.vcpus.iter().filter(|vcpu| ids.contains(&vcpu.id())) {
            vcpu.pause()?;
            vcpu.wait_paused()?;
            vcpu.reset(None)?;
            if self.has(vcpu) && !self.paused {
                vcpu.run()?;
            }
        }
        Ok(())
    }
}
