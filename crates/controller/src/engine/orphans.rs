//! Orphans: instances on a host that the database does not know, as it came from a backup. Nobody
//! is billed for an orphan. The orphan's capacity is not placed again. Administrators list and end
//! orphans.

use super::describe::admins_only;
use super::{Answer, Caller, Engine};
use roost_types::agent::{HostFacts, ORPHANS, Orphan, Report};
use roost_types::api::{Done, EndOrphan};
use roost_types::state::Step;
use roost_types::{ApiError, ErrorCode, HostId, InstanceId};

impl Engine {
    /// Records the orphans of a report. An instance with a row here is no orphan, even if the row
    /// is unreadable.
    pub(super) fn note_orphans(&self, host: &HostId, report: &Report) {
        let unknown = |orphan: &&Orphan| match self.store.instance(&orphan.instance_id) {
            Ok(Some(record)) => record.row.step == Step::Gone || record.row.host_id.as_ref() != Some(host),
            Ok(None) => true,
            Err(_) => false,
        };
        let orphans: Vec<_> = report.orphans.iter().take(ORPHANS).filter(unknown).cloned().collect();
        if self.remember().set_orphans(host, orphans) {
            self.announce();
        }
    }

    /// The capacity that a host's orphans claim: milli-CPUs and MiB.
    pub(super) fn taken_by_orphans(&self, facts: &HostFacts) -> (u64, u64) {
        self.remember().orphans(&facts.host_id).iter().fold((0, 0), |(cpu, memory), orphan| {
            let with_overhead = orphan.memory_mib.saturating_add(facts.overhead_mib);
            (cpu.saturating_add(orphan.cpu_milli), memory.saturating_add(with_overhead))
        })
    }

    /// Ends an orphan: its host removes it and its disk.
    ///
    /// # Errors
    /// `UnauthorizedOperation` for others than administrators, `InvalidInstanceID.NotFound` if no
    /// host has such an orphan.
    pub fn end_orphan(&self, caller: &Caller, request: &EndOrphan) -> Answer<Done> {
        admins_only(caller, "end orphans")?;
        let id: InstanceId = request.instance_id.parse()?;
        if !self.remember().end_orphan(&id) {
            return Err(ApiError::new(
                ErrorCode::InvalidInstanceIdNotFound,
                format!("no host reports an orphan {id}: DescribeHosts lists those there are"),
            ));
        }
        tracing::warn!(instance = %id, by = %caller.account_name, "an orphan is ended");
        self.announce();
        Ok(Done {})
    }
}
