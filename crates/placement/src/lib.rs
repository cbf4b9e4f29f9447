//! Instances × hosts → where, or why not. Pure and deterministic: the same hosts in any order give the same answer.
//!
//! ```text
//! host ── refused for good? (zone, CPUs, memory, GPU, disk: even empty it could not) ──→ Unsupported if all are
//!      ── refused now?      (not alive, full)                                        ──→ Insufficient if too few
//!      └─ fits: the one whose fuller resource stays emptiest gets it; ties go to the smaller id
//! ```

#![forbid(unsafe_code)]

use roost_types::agent::HostFacts;
use roost_types::{HostId, InstanceType};
use std::collections::BTreeMap;
use std::fmt;

/// A host as placement sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    /// What it is and can hold.
    pub facts: HostFacts,
    /// Claimed CPU in milli-CPUs.
    pub claimed_cpu_milli: u64,
    /// Claimed memory in MiB.
    pub claimed_memory_mib: u64,
    /// Claimed disk in GiB.
    pub claimed_disk_gib: u64,
    /// Whether its agent has reported recently.
    pub alive: bool,
}

/// What an instance needs of a host.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// Its type.
    pub instance_type: &'a InstanceType,
    /// Size of the volume that the instance still needs on the host in GiB; 0 if the host has it.
    pub volume_gib: u64,
    /// The zone that it must be in, if any.
    pub zone: Option<&'a str>,
}

impl Wanted<'_> {
    /// CPU that it claims, in milli-CPUs; at least 1.
    pub fn cpu_milli(&self) -> u64 {
        u64::from(self.instance_type.cpu_claim_milli).max(1)
    }

    /// Memory that it claims on this host, in MiB: its own and the monitor's overhead.
    pub fn memory_mib(&self, facts: &HostFacts) -> u64 {
        self.instance_type.memory_mib.saturating_add(facts.overhead_mib).max(1)
    }
}

/// Why a host does not take an instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// It stands in another zone.
    Zone {
        /// Its own zone.
        has: String,
    },
    /// The type has more vCPUs than an instance can have here.
    Vcpus {
        /// The type's.
        wanted: u32,
        /// The most here.
        most: u32,
    },
    /// Even empty it has too little CPU.
    Cpu {
        /// Milli-CPUs wanted.
        wanted: u64,
        /// Milli-CPUs that it has.
        has: u64,
    },
    /// Even empty it has too little memory.
    Memory {
        /// MiB wanted, overhead included.
        wanted: u64,
        /// MiB that it has.
        has: u64,
    },
    /// It has too few GPUs.
    Gpu {
        /// GPUs wanted.
        wanted: u32,
        /// GPUs that it has.
        has: u32,
    },
    /// It has no local disks to hand to instances.
    InstanceStore {
        /// GB wanted.
        wanted: u64,
    },
    /// The root volume is larger than its disk.
    Disk {
        /// GiB wanted.
        wanted: u64,
        /// GiB that it has.
        has: u64,
    },
    /// Its agent has not reported for a while.
    Silent,
    /// Its CPU is claimed by others.
    CpuFull {
        /// Milli-CPUs wanted.
        wanted: u64,
        /// Milli-CPUs that are free.
        free: u64,
    },
    /// Its memory is claimed by others.
    MemoryFull {
        /// MiB wanted, overhead included.
        wanted: u64,
        /// MiB that are free.
        free: u64,
    },
    /// The host's disk is claimed.
    DiskFull {
        /// GiB wanted.
        wanted: u64,
        /// GiB free.
        free: u64,
    },
}

impl Refusal {
    /// Whether the host would refuse even if it were empty and alive.
    pub const fn is_for_good(&self) -> bool {
        !matches!(
            self,
            Refusal::Silent | Refusal::CpuFull { .. } | Refusal::MemoryFull { .. } | Refusal::DiskFull { .. }
        )
    }
}

impl Refusal {
    /// The resource that the host lacks, without figures, for callers who may not see the host.
    pub const fn reason(&self) -> &'static str {
        match self {
            Refusal::Zone { .. } => "another zone",
            Refusal::Vcpus { .. } => "too few vCPUs for one instance",
            Refusal::Cpu { .. } => "too little CPU in all",
            Refusal::Memory { .. } => "too little memory in all",
            Refusal::Gpu { .. } => "too few GPUs",
            Refusal::InstanceStore { .. } => "no instance store",
            Refusal::Disk { .. } => "too little disk in all",
            Refusal::Silent => "no recent report",
            Refusal::CpuFull { .. } => "too little CPU free",
            Refusal::MemoryFull { .. } => "too little memory free",
            Refusal::DiskFull { .. } => "too little disk free",
        }
    }
}

/// The refusals of all hosts. The display names hosts and their room, for administrators only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusals(Vec<(String, Refusal)>);

impl Refusals {
    /// Most hosts in a message.
    const NAMED: usize = 10;

    fn new<'a>(refusals: impl Iterator<Item = (&'a Host, Refusal)>) -> Self {
        let mut refusals: Vec<_> =
            refusals.map(|(host, refusal)| (host.facts.hostname.clone(), refusal)).collect();
        // The order of the hosts must not change the message.
        refusals.sort_by_cached_key(|(name, refusal)| (name.clone(), refusal.to_string()));
        Self(refusals)
    }

    /// How many hosts refuse for which reason, without details of any host, for tenants.
    pub fn counted(&self) -> String {
        let mut counts = BTreeMap::new();
        for (_, refusal) in &self.0 {
            *counts.entry(refusal.reason()).or_insert(0_usize) += 1;
        }
        let all = self.0.len();
        let parts: Vec<_> =
            counts.into_iter().map(|(reason, count)| format!("{reason} on {count} of {all} hosts")).collect();
        if parts.is_empty() { NO_HOST.to_owned() } else { parts.join("; ") }
    }
}

const NO_HOST: &str = "no host has joined";

impl fmt::Display for Refusals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts: Vec<_> =
            self.0.iter().map(|(name, refusal)| format!("host {name} {refusal}")).collect();
        parts.sort();
        parts.dedup();
        let more = parts.len().saturating_sub(Self::NAMED);
        if more > 0 {
            parts.truncate(Self::NAMED);
            parts.push(format!("and {more} more hosts: {}", self.counted()));
        }
        f.write_str(&if parts.is_empty() { NO_HOST.to_owned() } else { parts.join("; ") })
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refusal::Zone { has } => write!(f, "stands in zone {has}"),
            Refusal::Vcpus { wanted, most } => {
                write!(f, "gives one instance at most {most} vCPUs, {wanted} are needed")
            }
            Refusal::Cpu { wanted, has } => {
                write!(f, "has {has} milli-CPUs in all, {wanted} are needed")
            }
            Refusal::Memory { wanted, has } => write!(f, "has {has} MiB in all, {wanted} MiB are needed"),
            Refusal::Gpu { wanted, has } => write!(f, "has {has} GPUs, {wanted} are needed"),
            Refusal::InstanceStore { wanted } => {
                write!(f, "has no instance store, {wanted} GB are needed")
            }
            Refusal::Disk { wanted, has } => {
                write!(f, "has {has} GiB of disk for volumes, {wanted} GiB are needed")
            }
            Refusal::Silent => write!(f, "has not reported lately"),
            Refusal::CpuFull { wanted, free } => {
                write!(f, "has {free} milli-CPUs free, {wanted} are needed")
            }
            Refusal::MemoryFull { wanted, free } => {
                write!(f, "has {free} MiB free, {wanted} MiB are needed")
            }
            Refusal::DiskFull { wanted, free } => {
                write!(f, "has {free} GiB of disk free for volumes, {wanted} GiB are needed")
            }
        }
    }
}

/// Why instances could not be placed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlacementError {
    /// No host could hold one, even empty.
    #[error("{instance_type} cannot run here: {why}")]
    Unsupported {
        /// The type.
        instance_type: String,
        /// Each host's reason.
        why: Refusals,
    },
    /// There is no room for as many as are needed at least.
    #[error("there is room for {room} of at least {wanted} {instance_type}: {why}")]
    Insufficient {
        /// The type.
        instance_type: String,
        /// How many would fit now.
        room: usize,
        /// How many were needed at least.
        wanted: usize,
        /// Each host's reason.
        why: Refusals,
    },
}

impl PlacementError {
    /// The message for tenants, without names and room of hosts.
    pub fn for_tenants(&self) -> String {
        match self {
            Self::Unsupported { instance_type, why } => {
                format!("{instance_type} cannot run here: {}", why.counted())
            }
            Self::Insufficient { instance_type, room, wanted, why } => {
                let why = why.counted();
                format!("there is room for {room} of at least {wanted} {instance_type}: {why}")
            }
        }
    }
}

/// What can never be, host by host, whatever is claimed.
fn for_good(facts: &HostFacts, wanted: &Wanted<'_>) -> Option<Refusal> {
    let kind = wanted.instance_type;
    let (cpu, memory) = (wanted.cpu_milli(), wanted.memory_mib(facts));
    if wanted.zone.is_some_and(|zone| zone != facts.zone) {
        Some(Refusal::Zone { has: facts.zone.clone() })
    } else if kind.vcpus > facts.max_vcpus {
        Some(Refusal::Vcpus { wanted: kind.vcpus, most: facts.max_vcpus })
    } else if cpu > facts.cpu_milli {
        Some(Refusal::Cpu { wanted: cpu, has: facts.cpu_milli })
    } else if memory > facts.memory_mib {
        Some(Refusal::Memory { wanted: memory, has: facts.memory_mib })
    } else if kind.gpus > facts.gpus {
        Some(Refusal::Gpu { wanted: kind.gpus, has: facts.gpus })
    } else if kind.instance_store_gb > 0 {
        Some(Refusal::InstanceStore { wanted: kind.instance_store_gb })
    } else if wanted.volume_gib > facts.disk_gib && facts.disk_gib > 0 {
        // A host whose disk is below its reserve reports 0 for as long as that lasts.
        Some(Refusal::Disk { wanted: wanted.volume_gib, has: facts.disk_gib })
    } else {
        None
    }
}

/// Why this host does not take one such instance now; `None` if it does.
pub fn refusal(host: &Host, wanted: &Wanted<'_>) -> Option<Refusal> {
    let (cpu, memory) = (wanted.cpu_milli(), wanted.memory_mib(&host.facts));
    let free_cpu = host.facts.cpu_milli.saturating_sub(host.claimed_cpu_milli);
    let free_memory = host.facts.memory_mib.saturating_sub(host.claimed_memory_mib);
    let free_disk = host.facts.disk_gib.saturating_sub(host.claimed_disk_gib);
    for_good(&host.facts, wanted).or(if !host.alive {
        Some(Refusal::Silent)
    } else if cpu > free_cpu {
        Some(Refusal::CpuFull { wanted: cpu, free: free_cpu })
    } else if memory > free_memory {
        Some(Refusal::MemoryFull { wanted: memory, free: free_memory })
    } else if wanted.volume_gib > free_disk {
        Some(Refusal::DiskFull { wanted: wanted.volume_gib, free: free_disk })
    } else {
        None
    })
}

/// Why no host could hold one such instance, even empty; `None` if one could, or if there is no host yet.
pub fn unsupported(hosts: &[Host], wanted: &Wanted<'_>) -> Option<Refusals> {
    let refusals: Option<Vec<_>> =
        hosts.iter().map(|host| Some((host, for_good(&host.facts, wanted)?))).collect();
    refusals.filter(|refusals| !refusals.is_empty()).map(|refusals| Refusals::new(refusals.into_iter()))
}

/// How full the fuller resource of a host would be with one more: claimed and total.
fn load_with_one_more(host: &Host, wanted: &Wanted<'_>) -> (u64, u64) {
    let cpu = (host.claimed_cpu_milli.saturating_add(wanted.cpu_milli()), host.facts.cpu_milli.max(1));
    let memory = (
        host.claimed_memory_mib.saturating_add(wanted.memory_mib(&host.facts)),
        host.facts.memory_mib.max(1),
    );
    if less_loaded(cpu, memory).is_lt() { memory } else { cpu }
}

/// Compares two fractions exactly.
fn less_loaded(a: (u64, u64), b: (u64, u64)) -> std::cmp::Ordering {
    (u128::from(a.0) * u128::from(b.1)).cmp(&(u128::from(b.0) * u128::from(a.1)))
}

/// Finds hosts for at least `min` and at most `max` instances of one kind: a host for each.
///
/// # Errors
/// `Unsupported` if no host could hold one even empty, `Insufficient` if fewer than `min` fit now.
pub fn place(
    hosts: &[Host],
    wanted: &Wanted<'_>,
    min: usize,
    max: usize,
) -> Result<Vec<HostId>, PlacementError> {
    let instance_type = || wanted.instance_type.name.clone();
    if let Some(why) = unsupported(hosts, wanted) {
        return Err(PlacementError::Unsupported { instance_type: instance_type(), why });
    }
    let mut hosts = hosts.to_vec();
    hosts.sort_by(|a, b| a.facts.host_id.cmp(&b.facts.host_id));
    let mut chosen = Vec::new();
    while chosen.len() < max {
        let best = hosts
            .iter_mut()
            .filter(|host| refusal(host, wanted).is_none())
            .min_by(|a, b| less_loaded(load_with_one_more(a, wanted), load_with_one_more(b, wanted)));
        let Some(host) = best else { break };
        host.claimed_cpu_milli += wanted.cpu_milli();
        host.claimed_memory_mib += wanted.memory_mib(&host.facts);
        host.claimed_disk_gib += wanted.volume_gib;
        chosen.push(host.facts.host_id.clone());
    }
    if chosen.len() >= min {
        return Ok(chosen);
    }
    let refusals = hosts.iter().filter_map(|host| Some((host, refusal(host, wanted)?)));
    Err(PlacementError::Insufficient {
        instance_type: instance_type(),
        room: chosen.len(),
        wanted: min,
        why: Refusals::new(refusals),
    })
}
