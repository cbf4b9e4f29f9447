//! Plausibility of an agent's statements about its host. The certificate proves only the host's id.
//! The rest is checked against the controller's data and the limits of machines.

use super::{Answer, Engine};
use roost_types::agent::HostFacts;
use roost_types::{ApiError, ErrorCode};

/// Most logical CPUs of a host.
const CPUS: u64 = 4096;
/// Most milli-CPUs that may be claimed per CPU: 100-fold overcommit.
const MILLI_PER_CPU: u64 = 100_000;
/// Most memory of a host in MiB: 64 TiB.
const MEMORY_MIB: u64 = 64 << 20;
/// Most disk of a host in GiB, overcommit included: 1 EiB.
const DISK_GIB: u64 = 1 << 30;
/// Most GPUs of a host.
const GPUS: u64 = 64;
/// Longest name in characters.
const NAME: usize = 64;

impl Engine {
    /// Checks an agent's statement about its host.
    ///
    /// # Errors
    /// `InvalidParameterValue` with the value and what is allowed.
    pub(super) fn plausible(&self, facts: &HostFacts) -> Answer<()> {
        let refuse = |what: String| {
            let host = &facts.host_id;
            Err(ApiError::new(ErrorCode::InvalidParameterValue, format!("host {host} says that {what}")))
        };
        let zone = &self.settings.zone;
        if facts.zone != *zone {
            let shown: String = facts.zone.chars().take(NAME).collect();
            return refuse(format!(
                "it stands in zone {shown:?}, and this controller knows zone {zone:?} only: make its identity again with \
                 `roost-controller agent-identity`"
            ));
        }
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        if !(1..=NAME).contains(&facts.hostname.len()) || !facts.hostname.bytes().all(plain) {
            let shown: String = facts.hostname.chars().take(NAME).collect();
            return refuse(format!(
                "its name is {shown:?}: allowed are 1 to {NAME} characters of a-z A-Z 0-9 . _ -"
            ));
        }
        let bounds = [
            ("cpus", facts.cpus.into(), CPUS),
            ("cpu_milli", facts.cpu_milli, u64::from(facts.cpus).saturating_mul(MILLI_PER_CPU)),
            ("memory_mib", facts.memory_mib, MEMORY_MIB),
            ("disk_gib", facts.disk_gib, DISK_GIB),
            ("max_vcpus", facts.max_vcpus.into(), CPUS),
            ("overhead_mib", facts.overhead_mib, MEMORY_MIB),
            ("gpus", facts.gpus.into(), GPUS),
        ];
        match bounds.into_iter().find(|(_, value, most)| value > most) {
            Some((what, value, most)) => refuse(format!("{what} is {value}: allowed are 0 to {most}")),
            None => Ok(()),
        }
    }
}
