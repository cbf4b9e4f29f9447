//! What the engine remembers beside the store, all of which it can lose: fresher proofs of life than the durable
//! ones, when hosts last reported, and timings on their way to a row.

use roost_types::agent::{self, Orphan, TimedPart};
use roost_types::metering::Proofs;
use roost_types::{HostId, InstanceId, Micros};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// An instance whose row cannot be written. The row is retried later and delays no other.
#[derive(Debug, Clone)]
pub struct SetAside {
    pub tries: u32,
    /// Time of the next attempt, on the monotonic clock.
    pub until: Micros,
    pub why: String,
}

#[derive(Debug, Default)]
pub struct Memory {
    hosts: HashMap<HostId, HostMemory>,
    /// Until when each instance was seen running; the store's at first.
    pub proofs: Option<Proofs>,
    /// Time of each instance's newest proof, on the monotonic clock.
    pub proved_at: HashMap<InstanceId, Micros>,
    /// End of the newest sealed month as last read, and whether every interval is sealed up to it.
    pub sealed: Option<(Micros, bool)>,
    /// Last check of a month that could not be sealed, on the monotonic clock.
    pub seal_looked: Option<Micros>,
    /// Instances whose rows cannot be written, by id.
    pub set_aside: BTreeMap<String, SetAside>,
    /// Incarnation and the controller's own parts of its start.
    pub timings: HashMap<InstanceId, (u64, Vec<TimedPart>)>,
}

#[derive(Debug, Default)]
struct HostMemory {
    /// Time of the report on the monotonic clock.
    last_report: Option<Micros>,
    agent_run: String,
    /// Troubles that the agent last reported.
    trouble: Vec<String>,
    /// Orphans on the host.
    orphans: Vec<Orphan>,
    /// Orphans that an administrator ends.
    ending: BTreeSet<InstanceId>,
    /// Time of the newest durable report on the monotonic clock, and its boot id.
    written: Option<(Micros, String)>,
}

impl Memory {
    /// Returns true if a row is set aside until later.
    pub fn is_aside(&self, id: &str, now: Micros) -> bool {
        self.set_aside.get(id).is_some_and(|aside| now < aside.until)
    }

    /// Time of a host's newest report to this run of the engine, on the monotonic clock.
    pub fn last_report(&self, host: &HostId) -> Option<Micros> {
        self.hosts.get(host).and_then(|host| host.last_report)
    }

    /// Records a report at a time of the monotonic clock. Returns true if the report is due to be
    /// made durable.
    pub fn reported(&mut self, host: &HostId, boot_id: &str, now: Micros, every: Micros) -> bool {
        let known = self.hosts.entry(host.clone()).or_default();
        known.last_report = known.last_report.max(Some(now));
        let fresh = known
            .written
            .as_ref()
            .is_some_and(|(at, boot)| boot == boot_id && now >= *at && (now - *at) < every);
        !fresh
    }

    /// Troubles that the host's agent last reported.
    pub fn trouble(&self, host: &HostId) -> Vec<String> {
        self.hosts.get(host).map(|host| host.trouble.clone()).unwrap_or_default()
    }

    /// Records an agent's troubles of its host, bounded: the agent's list may be of any size.
    pub fn set_trouble(&mut self, host: &HostId, trouble: &[String]) {
        let sentences = trouble.iter().take(agent::TROUBLES).map(|sentence| agent::bounded(sentence));
        self.hosts.entry(host.clone()).or_default().trouble = sentences.collect();
    }

    /// Orphans on a host.
    pub fn orphans(&self, host: &HostId) -> &[Orphan] {
        self.hosts.get(host).map_or(&[], |host| &host.orphans)
    }

    /// Records a host's orphans. Returns true if the list of orphans to end changed.
    pub fn set_orphans(&mut self, host: &HostId, orphans: Vec<Orphan>) -> bool {
        let known = self.hosts.entry(host.clone()).or_default();
        let before = known.ending.len();
        known.ending.retain(|id| orphans.iter().any(|orphan| orphan.instance_id == *id));
        known.orphans = orphans;
        known.ending.len() != before
    }

    /// Marks an orphan to be ended. Returns true if a host has it.
    pub fn end_orphan(&mut self, id: &InstanceId) -> bool {
        let mut has =
            self.hosts.values_mut().filter(|host| host.orphans.iter().any(|one| one.instance_id == *id));
        has.next().map(|host| host.ending.insert(id.clone())).is_some()
    }

    /// Orphans that a host must end.
    pub fn ending(&self, host: &HostId) -> Vec<InstanceId> {
        self.hosts.get(host).map(|host| host.ending.iter().cloned().collect()).unwrap_or_default()
    }

    /// Whether this is the first report of a run of the agent.
    pub fn is_first_of(&mut self, host: &HostId, agent_run: &str) -> bool {
        let known = self.hosts.entry(host.clone()).or_default();
        let first = known.agent_run != agent_run;
        agent_run.clone_into(&mut known.agent_run);
        first
    }

    /// Notes that it was made durable.
    pub fn written(&mut self, host: &HostId, boot_id: &str, now: Micros) {
        self.hosts.entry(host.clone()).or_default().written = Some((now, boot_id.to_owned()));
    }

    /// Records that an instance was seen running up to `seen`, at `at` on the monotonic clock.
    /// Proofs only grow.
    pub fn prove(&mut self, instance: &InstanceId, seen: Micros, at: Micros) {
        let proofs = self.proofs.get_or_insert_default();
        let known = proofs.entry(instance.to_string()).or_insert(seen);
        if seen >= *known {
            *known = seen;
            self.proved_at.insert(instance.clone(), at);
        }
    }
}
