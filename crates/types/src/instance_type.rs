//! Instance types: what a named size promises and what it takes from a host.

use serde::{Deserialize, Serialize};

/// One instance type, such as `t3.micro`. CPU shares are in thousandths of one host CPU ("milli").
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InstanceType {
    /// `family.size`.
    pub name: String,
    /// The part before the dot; also the name of the family's cgroup.
    pub family: String,
    /// general, compute, memory, storage, accelerated or burstable.
    pub category: String,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// The most CPU the instance ever gets, in milli-CPUs (`cpu.max`); 1000 × vcpus unless the type is limited.
    pub cpu_max_milli: u32,
    /// What placement takes from the host's CPU for it, in milli-CPUs: everything for a dedicated share, the
    /// baseline for a burstable type.
    pub cpu_claim_milli: u32,
    /// CPU credits earned per hour, in thousandths of a credit; `None` for types without credits.
    /// One credit is one vCPU at full speed for one minute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credits_per_hour_milli: Option<u32>,
    /// GPUs; a host without them refuses the type.
    #[serde(default)]
    pub gpus: u32,
    /// Local instance-store disk in GB; a host without it refuses the type.
    #[serde(default)]
    pub instance_store_gb: u64,
}

impl InstanceType {
    /// The size: the part after the dot.
    pub fn size(&self) -> &str {
        self.name.split_once('.').map_or("", |(_, size)| size)
    }
}
