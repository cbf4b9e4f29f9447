//! CPUs of a machine that runs: they come and go as the host wishes and the guest agrees ([`crate::devices::cpus`]).

use super::{Parts, Running};
use crate::config::{MachineConfig, MachineConfigUpdate};
use crate::devices::cpus::Count;
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
        MachineConfig { vcpu_count: count(&self.parts).wanted, ..self.parts.config.machine_config.clone() }
    }

    /// Says how many CPUs the guest should have. It is told, and takes or gives them as soon as it likes: `GET /metrics` has the
    /// numbers.
    ///
    /// # Errors
    /// [`Error::Config`] for what the machine cannot have, [`Error::Kvm`].
    pub fn resize(&mut self, update: MachineConfigUpdate) -> Result<()> {
        let MachineConfigUpdate { vcpu_count } = update;
        if let Some(count) = vcpu_count {
            self.check_vcpus(count)?;
        }
        vcpu_count.map_or(Ok(()), |count| self.want_vcpus(count))
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
