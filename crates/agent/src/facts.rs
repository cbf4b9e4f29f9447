//! What a host can hold: its CPUs, memory and disk, less what it keeps for itself.

use crate::disk;
use crate::error::{Error, Result};
use crate::names::Folders;
use roost_types::agent::HostFacts;
use roost_types::ids::HostId;
use serde::Deserialize;
use std::net::Ipv4Addr;
use std::path::Path;

/// Most vCPUs that a monitor can have.
const MONITOR_VCPUS: u32 = 32;

/// The agent's identity, as the controller wrote it.
#[derive(Debug, Clone, Deserialize)]
pub struct Identity {
    /// The host.
    pub host_id: HostId,
    /// Its name.
    pub hostname: String,
    /// Its zone.
    pub zone: String,
    /// Where the controller listens for agents.
    pub controller_url: String,
}

impl Identity {
    /// Reads `identity.json` of an identity folder.
    ///
    /// # Errors
    /// It is missing or damaged.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("identity.json");
        crate::durable::read_json(&path)?.ok_or_else(|| {
            Error::Impossible(format!(
                "there is no {}; `roost-controller agent-identity --out {}` makes it",
                path.display(),
                folder.display()
            ))
        })
    }
}

/// What the owner of a host decides.
#[derive(Debug, Clone)]
pub struct Shares {
    /// CPU that may be claimed, per CPU that there is.
    pub cpu_overcommit: f64,
    /// Disk that volumes may claim, per GiB that there is.
    pub disk_overcommit: f64,
    /// Memory that the host keeps, MiB.
    pub reserve_memory_mib: u64,
    /// Memory that a monitor takes beside the guest's, MiB.
    pub overhead_mib: u64,
}

/// Measures the host.
///
/// # Errors
/// `/proc` or the state folder cannot be read.
pub fn measure(identity: &Identity, shares: &Shares, folders: &Folders) -> Result<HostFacts> {
    let cpus = std::thread::available_parallelism().map_err(Error::io("counting CPUs"))?;
    let cpus = u32::try_from(cpus.get()).unwrap_or(u32::MAX);
    let meminfo = std::fs::read_to_string("/proc/meminfo").map_err(Error::file("read", "/proc/meminfo"))?;
    let volume = rustix::fs::statvfs(&folders.state)
        .map_err(|error| Error::file("measure", &folders.state)(error.into()))?;
    Ok(HostFacts {
        host_id: identity.host_id.clone(),
        hostname: identity.hostname.clone(),
        zone: identity.zone.clone(),
        cpus,
        cpu_milli: milli(cpus, shares.cpu_overcommit),
        memory_mib: total_mib(&meminfo).saturating_sub(shares.reserve_memory_mib),
        // Volumes are claimed by their full size: the blocks that they occupy count as free here.
        disk_gib: claimable_gib(
            volume.f_bavail.saturating_mul(volume.f_frsize).saturating_add(disk::taken(&folders.volumes())),
            shares.disk_overcommit,
        ),
        max_vcpus: max_vcpus(),
        overhead_mib: shares.overhead_mib,
        gpus: 0,
    })
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // clamped to what fits
fn milli(cpus: u32, overcommit: f64) -> u64 {
    (f64::from(cpus) * 1000.0 * overcommit).clamp(0.0, 1e12) as u64
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
// whole GiB, clamped to what fits
fn claimable_gib(bytes: u64, overcommit: f64) -> u64 {
    ((bytes >> 30) as f64 * overcommit).clamp(0.0, 1e12) as u64
}

fn total_mib(meminfo: &str) -> u64 {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()).unwrap_or(0) / 1024
}

/// What KVM allows, at most what the monitor can; 0 where there is no KVM.
fn max_vcpus() -> u32 {
    let Ok(kvm) = kvm_ioctls::Kvm::new() else { return 0 };
    u32::try_from(kvm.get_max_vcpus()).unwrap_or(0).min(MONITOR_VCPUS)
}

/// The host's name servers that a guest can reach too: those of `resolv.conf` that are no loopback addresses, else
/// those that systemd-resolved asks itself, else `fallback`.
pub fn name_servers(fallback: &[Ipv4Addr]) -> Vec<Ipv4Addr> {
    for path in ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"] {
        let servers = parse_resolv(&std::fs::read_to_string(path).unwrap_or_default());
        if !servers.is_empty() {
            return servers;
        }
    }
    fallback.to_vec()
}

fn parse_resolv(text: &str) -> Vec<Ipv4Addr> {
    let servers = text.lines().filter_map(|line| line.trim().strip_prefix("nameserver")?.trim().parse().ok());
    servers.filter(|address: &Ipv4Addr| !address.is_loopback() && !address.is_unspecified()).take(3).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overcommit_is_counted_in_milli_cpus() {
        assert_eq!(milli(2, 1.0), 2000);
        assert_eq!(milli(2, 1.5), 3000);
        assert_eq!(milli(2, -1.0), 0);
    }

    #[test]
    fn a_disk_can_be_claimed_as_often_as_its_owner_says() {
        assert_eq!(claimable_gib((50 << 30) + 1, 1.0), 50);
        assert_eq!(claimable_gib(50 << 30, 3.5), 175);
        assert_eq!(claimable_gib(u64::MAX, 1e300), 1_000_000_000_000);
    }

    #[test]
    fn memory_and_name_servers_are_read() {
        assert_eq!(total_mib("MemTotal:       24576000 kB\nMemFree: 1 kB\n"), 24000);
        let servers =
            parse_resolv("nameserver 127.0.0.53\nnameserver 10.0.2.3\nnameserver fe80::1\nsearch x\n");
        assert_eq!(servers, vec![Ipv4Addr::new(10, 0, 2, 3)]);
    }
}
