//! The agents' side: hello, what a host must look like, and what it reports.

use super::{ATTEMPTS, Answer, Engine, errors};
use crate::lifecycle::{Draft, adopt, advance, observe, spec};
use roost_placement::Wanted;
use roost_store::{Claim, ImageRow, InstanceFilter, InstanceRecord, StoreError};
use roost_types::agent::{
    Desired, HelloRequest, HelloResponse, HostFacts, Observation, PROTOCOL, Report, ReportAck,
};
use roost_types::state::Step;
use roost_types::{ApiError, ErrorCode, HostId, ImageId, InstanceId, Micros};
use std::collections::HashMap;

/// The circumstances of a report.
#[derive(Debug, Clone, Copy)]
struct Sight<'a> {
    host: &'a HostFacts,
    boot_id: &'a str,
    now: Micros,
    /// Current time of the monotonic clock.
    monotonic: Micros,
    /// The first report of a run of the agent, which may speak from memory.
    from_memory: bool,
}

impl Sight<'_> {
    /// The capacity that an instance claims of this host.
    fn claim(&self, record: &InstanceRecord) -> Claim {
        let kind = &record.row.instance_type;
        let wanted = Wanted { instance_type: kind, volume_gib: record.volume.size_gib, zone: None };
        Claim {
            host_id: self.host.host_id.clone(),
            cpu_milli: wanted.cpu_milli(),
            memory_mib: wanted.memory_mib(self.host),
        }
    }
}

fn same_host(host: &HostId, facts: &HostFacts) -> Answer<()> {
    if *host == facts.host_id {
        return Ok(());
    }
    Err(ApiError::new(
        ErrorCode::UnauthorizedOperation,
        format!("the certificate names host {host}, the message host {}", facts.host_id),
    ))
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "a request is taken as it came off the wire, and is done with"
)]
impl Engine {
    /// Welcomes an agent and notes what its host can hold.
    ///
    /// # Errors
    /// `Unsupported` for another protocol version, `UnauthorizedOperation` if the report claims
    /// another host, `InvalidParameterValue` for an implausible host.
    pub fn hello(&self, host: &HostId, request: HelloRequest) -> Answer<HelloResponse> {
        if request.protocol != PROTOCOL {
            return Err(ApiError::new(
                ErrorCode::Unsupported,
                format!(
                    "agent {} of host {host} speaks protocol {}, this controller speaks {PROTOCOL}: \
                     install both from the same release",
                    request.version, request.protocol
                ),
            ));
        }
        same_host(host, &request.host)?;
        self.plausible(&request.host)?;
        self.store.put_host(&request.host, self.clock.now()).map_err(errors::of_store)?;
        self.announce();
        let every = u64::try_from(self.settings.report_every.0 / 1000).unwrap_or(1);
        Ok(HelloResponse { report_every_ms: every.max(1) })
    }

    /// What a host must look like: every instance placed there that is not gone.
    ///
    /// # Errors
    /// If the store fails.
    pub fn desired(&self, host: &HostId) -> Answer<Desired> {
        let filter = InstanceFilter { host_id: Some(host.clone()), ..Default::default() };
        // An instance is left out if its row or its image cannot be read: its host leaves it
        // unchanged.
        let (records, _) = self.store.readable_instances(&filter).map_err(errors::of_store)?;
        let mut images: HashMap<ImageId, ImageRow> = HashMap::new();
        let mut instances = Vec::with_capacity(records.len());
        for record in records.iter().filter(|record| record.row.step != Step::Gone) {
            let id = &record.row.image_id;
            if !images.contains_key(id) {
                match self.store.image(id) {
                    Ok(Some(row)) => drop(images.insert(id.clone(), row)),
                    Ok(None) => tracing::error!(image = %id, "an instance's image is not in the database"),
                    Err(error) if errors::is_of_one_row(&error) => {
                        tracing::error!(image = %id, %error, "an instance's image cannot be read");
                    }
                    Err(error) => return Err(errors::of_store(error)),
                }
            }
            if let Some(image) = images.get(id) {
                instances.push(spec::ensure(record, image));
            }
        }
        Ok(spec::desired(instances, self.remember().ending(host)))
    }

    /// Takes an agent's report: dates it, records what is new, and does at once what follows from it.
    ///
    /// # Errors
    /// `UnauthorizedOperation` if the report is about another host, `InvalidParameterValue` for an
    /// implausible host; else errors of the store.
    pub fn report(&self, host: &HostId, report: Report) -> Answer<ReportAck> {
        same_host(host, &report.host)?;
        let now = self.clock.now();
        let known = self.store.host(host).map_err(errors::of_store)?;
        if known.as_ref().is_none_or(|known| known.facts != report.host) {
            self.plausible(&report.host)?;
            self.store.put_host(&report.host, now).map_err(errors::of_store)?;
        }
        self.with_proofs(|_| ()).map_err(errors::of_store)?;
        let monotonic = self.clock.monotonic();
        let due = self.remember().reported(host, &report.boot_id, monotonic, self.settings.proof_every);
        let durable = due || report.last;
        self.remember().set_trouble(host, &report.trouble);
        self.note_orphans(host, &report);
        let from_memory = self.remember().is_first_of(host, &report.agent_run);
        let sight = Sight { host: &report.host, boot_id: &report.boot_id, now, monotonic, from_memory };
        let filter = InstanceFilter { host_id: Some(host.clone()), ..Default::default() };
        let (records, unreadable) = self.store.readable_instances(&filter).map_err(errors::of_store)?;
        for (id, error) in unreadable.iter().filter(|(id, _)| !self.is_aside(id)) {
            self.set_aside(id, error);
        }
        let words: HashMap<&InstanceId, &Observation> =
            report.instances.iter().map(|word| (&word.instance_id, word)).collect();
        let mut changes = Vec::new();
        for record in records {
            let forgotten;
            let word = match words.get(&record.row.instance_id) {
                Some(word) => *word,
                None if was_forgotten(&record, &report.boot_id) => {
                    forgotten = observe::forgotten(&record.row);
                    &forgotten
                }
                None => continue,
            };
            let id = record.row.instance_id.clone();
            if self.is_aside(&id) {
                continue;
            }
            let draft = self.digest(record, word, sight).map_err(errors::of_store)?;
            if draft.is_change() {
                changes.push((id, word.clone(), draft));
            } else {
                self.remember().set_aside.remove(id.as_str());
            }
        }
        if durable {
            // Before the changes: what they close may hang on it, and what they do not touch must be proved too.
            let seen = self.proofs_of(&report)?;
            self.store.host_reported(host, &report.boot_id, now, &seen).map_err(errors::of_store)?;
            self.remember().written(host, &report.boot_id, monotonic);
        }
        if !changes.is_empty() {
            self.commit_report(&changes, sight)?;
            self.announce();
        }
        Ok(ReportAck { version: self.desired(host)?.version })
    }

    /// What the report proves, for the store.
    fn proofs_of(&self, report: &Report) -> Answer<Vec<(InstanceId, Micros)>> {
        self.with_proofs(|proofs| {
            let of = |id: &InstanceId| Some((id.clone(), *proofs.get(id.as_str())?));
            report.instances.iter().filter_map(|word| of(&word.instance_id)).collect()
        })
        .map_err(errors::of_store)
    }

    /// One observation, taken in: the row as it will be after it and all steps that follow.
    fn digest(
        &self,
        record: InstanceRecord,
        word: &Observation,
        sight: Sight<'_>,
    ) -> Result<Draft, StoreError> {
        let Sight { boot_id, now, monotonic, from_memory, .. } = sight;
        let mut draft = Draft::new(record);
        let adopts = adopt::is_ahead(&draft.record.row, word);
        if adopts {
            let row = &draft.record.row;
            tracing::warn!(
                instance = %row.instance_id, known = row.incarnation, found = word.incarnation,
                "its host knows of a newer start than the database, which came from a backup: it is taken over"
            );
            let view = self.view(row, true, now)?;
            let claim = sight.claim(&draft.record);
            adopt::adopt(&mut draft, word, claim, &view);
        }
        if let Some(row) = observe::observe(&draft.record.row, word, boot_id, now) {
            draft.record.row = row;
        }
        let row = &mut draft.record.row;
        if row.timing.controller.is_empty()
            && let Some((incarnation, parts)) = self.remember().timings.get(&row.instance_id)
            && *incarnation == row.incarnation
        {
            row.timing.controller.clone_from(parts);
        } else if row.step == Step::Run {
            self.remember().timings.remove(&row.instance_id);
        }
        // The proof of an adopted run counts once the row is written. Until then the older run's
        // proof counts.
        let counts = !adopts
            && word.incarnation == row.incarnation
            && row.boot_id.as_ref().is_none_or(|boot| boot == boot_id)
            && !matches!(row.step, Step::Rest | Step::Gone);
        if let Some((seen, age)) = observe::proof_of_life(row, word, now, from_memory).filter(|_| counts) {
            let seen = row.bill_until.map_or(seen, |end| end.min(seen));
            self.remember().prove(&row.instance_id, seen, monotonic - age);
        }
        let was_open = row.open_since.is_some();
        let view = self.view(row, true, now)?;
        advance(&mut draft, &view);
        let row = &draft.record.row;
        if row.open_since.is_some() && !was_open {
            // The first proof is durable together with the opening event.
            let proof = self.with_proofs(|proofs| proofs.get(row.instance_id.as_str()).copied())?;
            draft.prove(proof);
        }
        Ok(draft)
    }

    /// Commits the changes of a report in one transaction. If a row changed meanwhile or cannot be
    /// written, the changes are committed one by one.
    fn commit_report(&self, changes: &[(InstanceId, Observation, Draft)], sight: Sight<'_>) -> Answer<()> {
        let all: Result<Vec<_>, _> =
            changes.iter().map(|(_, _, draft)| draft.clone().into_change()).collect();
        let points: Vec<_> =
            changes.iter().filter_map(|(_, _, draft)| draft.point()).map(roost_halt::around).collect();
        let committed = all.and_then(|all| self.store.commit(&all, sight.now));
        drop(points);
        match committed {
            Ok(()) => {
                let mut memory = self.remember();
                changes.iter().for_each(|(id, ..)| drop(memory.set_aside.remove(id.as_str())));
                Ok(())
            }
            Err(error) if errors::is_of_one_row(&error) => changes
                .iter()
                .try_for_each(|(id, word, _)| self.settle(id, self.commit_word(id, word, sight))),
            Err(error) => Err(errors::of_store(error)),
        }
    }

    fn commit_word(&self, id: &InstanceId, word: &Observation, sight: Sight<'_>) -> Result<(), StoreError> {
        for _ in 0..ATTEMPTS {
            let Some(record) = self.store.instance(id)? else { return Ok(()) };
            let draft = self.digest(record, word, sight)?;
            if !draft.is_change() {
                return Ok(());
            }
            let _points = draft.point().map(roost_halt::around);
            match self.store.commit(&[draft.into_change()?], sight.now) {
                Err(StoreError::Stale(_)) => {}
                written => return written,
            }
        }
        Err(StoreError::Stale(id.clone()))
    }
}

/// Whether a host that rebooted does not even mention an instance that was running there.
fn was_forgotten(record: &InstanceRecord, boot_id: &str) -> bool {
    record.row.step == Step::Run && record.row.boot_id.as_ref().is_some_and(|boot| boot != boot_id)
}
