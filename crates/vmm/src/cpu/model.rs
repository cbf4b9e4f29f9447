//! What the vCPUs of one machine can do.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

use super::cpuid::{self, SavedCpuid, Topology};
use super::template::{MsrModifier, Template, msrs};
use crate::config::VmConfig;
use crate::error::{Error, Result};

/// What KVM says that guests may have, and what this machine's guest has of it.
#[derive(Debug)]
pub struct CpuModel {
    topology: Topology,
    /// What the guest has, without a topology.
    has: Vec<kvm_cpuid_entry2>,
    /// The vCPUs' own tables, if they come from a snapshot.
    tables: Vec<CpuId>,
    /// What the machine's template changes of MSRs.
    msrs: Vec<MsrModifier>,
    /// IA32_ARCH_CAPABILITIES of this host, where KVM tells.
    arch_capabilities: Option<u64>,
}

/// What KVM offers to a guest.
///
/// # Errors
/// [`Error::Kvm`].
pub fn offered(kvm: &Kvm) -> Result<Vec<kvm_cpuid_entry2>> {
    let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES);
    let supported = supported.map_err(Error::kvm("KVM_GET_SUPPORTED_CPUID"))?;
    Ok(cpuid::offer(&supported, kvm.check_extension(Cap::TscDeadlineTimer)))
}

impl CpuModel {
    /// Asks KVM, and applies the machine's template.
    ///
    /// # Errors
    /// [`Error::Kvm`], [`Error::Config`] for what the template asks for and this host does not have.
    pub fn new(kvm: &Kvm, config: &VmConfig) -> Result<Self> {
        let template = Template::of(config)?;
        capabilities(kvm, template)?;
        let has = template.apply(&offered(kvm)?)?;
        Ok(Self {
            topology: Topology { vcpus: config.machine_config.vcpus() },
            msrs: template.msrs(&has),
            has,
            tables: Vec::new(),
            arch_capabilities: msrs::host_arch_capabilities(kvm),
        })
    }

    /// The vCPUs of a snapshot, whose template was applied where they were born. `told` is what each of them was told in
    /// IA32_ARCH_CAPABILITIES.
    ///
    /// # Errors
    /// [`Error::Kvm`], [`Error::Snapshot`]: what this host lacks.
    pub fn of_snapshot(
        kvm: &Kvm,
        config: &VmConfig,
        vcpus: &[SavedCpuid],
        told: impl IntoIterator<Item = u64>,
    ) -> Result<Self> {
        let template = Template::of(config)?;
        capabilities(kvm, template)?;
        let has = offered(kvm)?;
        let tables = vcpus.iter().map(|cpuid| cpuid.on(&has));
        let tables: Vec<CpuId> = tables.collect::<std::result::Result<_, _>>().map_err(Error::Snapshot)?;
        let arch_capabilities = msrs::host_arch_capabilities(kvm);
        for told in told {
            let lacking = arch_capabilities.map(|host| msrs::lacking(told, host)).unwrap_or_default();
            if !lacking.is_empty() {
                return Err(Error::Snapshot(format!(
                    "the guest was told what does not hold for this host's CPU, and protects itself no more than that: {}",
                    lacking.join(", ")
                )));
            }
        }
        let msrs = template.msrs(tables.first().map_or(&[], CpuId::as_slice));
        let topology = Topology { vcpus: config.machine_config.vcpus() };
        Ok(Self { topology, has, tables, msrs, arch_capabilities })
    }

    /// vCPUs of the machine.
    #[must_use]
    pub const fn vcpus(&self) -> u8 {
        self.topology.vcpus
    }

    /// Refuses memory at addresses that the CPU says it does not have (leaf 0x80000008): the guest could not use it.
    ///
    /// # Errors
    /// [`Error::Config`] with both numbers.
    pub fn check_addresses(&self, last: u64) -> Result<()> {
        let leaf = self.table(0)?;
        let bits = leaf.as_slice().iter().find(|entry| entry.function == 0x8000_0008);
        // Without the leaf a CPU has 36 (Intel SDM 3, 4.1.4).
        let bits = bits.map_or(36, |entry| entry.eax & 0xff).min(63);
        if last >> bits == 0 {
            return Ok(());
        }
        Err(Error::Config(format!(
            "memory, memory-hotplug and pmem reach up to {} GiB, and addresses of this CPU (or of its template) have {bits} bits: {} GiB",
            (last >> 30) + 1,
            1_u64 << bits >> 30
        )))
    }

    /// What vCPU number `id` can do.
    ///
    /// # Errors
    /// [`Error::KvmLacks`]: the table would be longer than KVM takes.
    pub fn table(&self, id: u8) -> Result<CpuId> {
        if let Some(table) = self.tables.get(usize::from(id)) {
            return Ok(table.clone());
        }
        cpuid::for_vcpu(&self.has, self.topology, id)
            .map_err(|error| Error::KvmLacks(format!("room for the CPUID table: {error:?}")))
    }

    /// The vCPUs' tables of a machine that is not from a snapshot, once more. Behind the lock-down: KVM is asked for no more than its
    /// tables.
    ///
    /// # Errors
    /// As [`CpuModel::new`] and [`CpuModel::table`].
    pub fn tables(kvm: &Kvm, config: &VmConfig) -> Result<Vec<SavedCpuid>> {
        let model = Self {
            topology: Topology { vcpus: config.machine_config.vcpus() },
            has: Template::of(config)?.apply(&offered(kvm)?)?,
            tables: Vec::new(),
            msrs: Vec::new(),
            arch_capabilities: None,
        };
        (0..model.vcpus()).map(|id| Ok(SavedCpuid::new(&model.table(id)?))).collect()
    }

    /// All tables of a machine from a snapshot; empty for another.
    #[must_use]
    pub fn into_tables(self) -> Vec<CpuId> {
        self.tables
    }

    /// MSRs that the template changes.
    #[must_use]
    pub fn template_msrs(&self) -> Vec<u32> {
        self.msrs.iter().map(|modifier| modifier.addr).collect()
    }

    /// Changes them in a vCPU that has its table.
    ///
    /// # Errors
    /// [`Error::Config`], naming the MSR.
    pub fn change_msrs(&self, vcpu: &impl msrs::Bank) -> Result<()> {
        msrs::apply(vcpu, &self.msrs, self.arch_capabilities)
    }
}

fn capabilities(kvm: &Kvm, template: Template<'_>) -> Result<()> {
    for number in template.capabilities() {
        if kvm.check_extension_raw(number.into()) <= 0 {
            return Err(Error::Config(format!(
                "cpu-config: kvm_capabilities: this host's KVM does not have capability {number}"
            )));
        }
    }
    Ok(())
}
