//! Start, stop, reboot, terminate, another type: all or nothing over the instances of one call.

use super::launch::Stopwatch;
use super::{ATTEMPTS, Answer, Caller, Engine, errors};
use crate::lifecycle::{Draft, View, accept};
use roost_placement::{Host, Refusal, Wanted};
use roost_store::{Claim, InstanceRecord, StoreError};
use roost_types::api::{
    Done, ModifyInstanceType, RebootInstances, StartInstances, StateChange, StateChanges, StopInstances,
    TerminateInstances,
};
use roost_types::state::InstanceState;
use roost_types::{ApiError, ErrorCode, InstanceId, Micros};
use std::collections::HashSet;

/// Most ids in one request, as on EC2.
const MAX_IDS: usize = 1000;
/// Most ids that a refusal names.
const NAMED_IDS: usize = 20;

fn not_found(ids: &[&InstanceId]) -> ApiError {
    let mut names: Vec<_> = ids.iter().take(NAMED_IDS).map(ToString::to_string).collect();
    if let Some(more) = ids.len().checked_sub(NAMED_IDS).filter(|more| *more > 0) {
        names.push(format!("and {more} more"));
    }
    let (noun, verb) = if ids.len() == 1 { ("instance", "does") } else { ("instances", "do") };
    ApiError::new(
        ErrorCode::InvalidInstanceIdNotFound,
        format!("{noun} {} {verb} not exist", names.join(", ")),
    )
}

/// The ids of a call, each once, in the order given.
pub(super) fn parse_ids(texts: &[String]) -> Answer<Vec<InstanceId>> {
    if texts.len() > MAX_IDS {
        return Err(ApiError::new(
            ErrorCode::InvalidParameterValue,
            format!("instance_ids has {} ids: allowed are at most {MAX_IDS} in one request", texts.len()),
        ));
    }
    let (mut ids, mut seen) = (Vec::with_capacity(texts.len()), HashSet::with_capacity(texts.len()));
    for text in texts {
        let id: InstanceId = text.parse()?;
        if seen.insert(id.clone()) {
            ids.push(id);
        }
    }
    Ok(ids)
}

fn at_least_one(texts: &[String]) -> Answer<Vec<InstanceId>> {
    if texts.is_empty() {
        return Err(ApiError::new(
            ErrorCode::MissingParameter,
            "instance_ids is empty: name at least one instance",
        ));
    }
    parse_ids(texts)
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "a request is taken as it came off the wire, and is done with"
)]
impl Engine {
    /// Returns the caller's instances of these ids; an administrator gets those of any account.
    /// Another account's instance is absent, and so is an instance that ended too long ago to be
    /// shown.
    pub(super) fn owned(
        &self,
        caller: &Caller,
        ids: &[InstanceId],
        now: Micros,
    ) -> Answer<Vec<InstanceRecord>> {
        let mut records = Vec::with_capacity(ids.len());
        let mut absent = Vec::new();
        for id in ids {
            let record = self.store.instance(id).map_err(errors::of_store)?.filter(|record| {
                let forgotten =
                    record.row.terminated_at.is_some_and(|at| at < now - self.settings.show_terminated);
                (caller.admin || record.row.account_id == caller.account_id) && !forgotten
            });
            match record {
                Some(record) => records.push(record),
                None => absent.push(id),
            }
        }
        if absent.is_empty() { Ok(records) } else { Err(not_found(&absent)) }
    }

    /// Changes instances of the caller, all or none, and says from which state to which. A test can halt it at
    /// `point`.
    fn change(
        &self,
        caller: &Caller,
        ids: &[InstanceId],
        point: &'static str,
        mut edit: impl FnMut(&mut [Draft], &[View]) -> Answer<()>,
    ) -> Answer<StateChanges> {
        for _ in 0..ATTEMPTS {
            let now = self.clock.now();
            let records = self.owned(caller, ids, now)?;
            let before: Vec<InstanceState> = records.iter().map(|record| record.row.state()).collect();
            let views =
                records.iter().map(|record| self.view(&record.row, true, now)).collect::<Result<Vec<_>, _>>();
            let views = views.map_err(errors::of_store)?;
            let mut drafts: Vec<_> = records.into_iter().map(Draft::new).collect();
            edit(&mut drafts, &views)?;
            let answer = drafts
                .iter()
                .zip(before)
                .map(|(draft, previous)| StateChange {
                    instance_id: draft.record.row.instance_id.clone(),
                    previous,
                    current: draft.record.row.state(),
                })
                .collect();
            let changes = drafts
                .into_iter()
                .filter(Draft::is_change)
                .map(Draft::into_change)
                .collect::<Result<Vec<_>, _>>()
                .map_err(errors::of_store)?;
            let committed = {
                let _points = roost_halt::around(point);
                self.store.commit(&changes, now)
            };
            match committed {
                Ok(()) => {
                    if !changes.is_empty() {
                        self.announce();
                    }
                    return Ok(StateChanges { changes: answer });
                }
                Err(StoreError::Stale(_)) => {}
                Err(error) => return Err(errors::of_store(error)),
            }
        }
        let id = ids.first().map_or("", |id| id.as_str());
        Err(ApiError::new(
            ErrorCode::RequestLimitExceeded,
            format!("instance {id} changes all the time: try again in a moment"),
        ))
    }

    /// Starts stopped instances: each claims capacity again on the host that has its volume. Those that are pending or
    /// running stay as they are, so a start whose answer was lost can be asked for again.
    ///
    /// # Errors
    /// EC2's; `InsufficientInstanceCapacity` if a host is full, `Unavailable` if it does not answer.
    pub fn start_instances(&self, caller: &Caller, request: StartInstances) -> Answer<StateChanges> {
        let began = self.clock.monotonic();
        let ids = at_least_one(&request.instance_ids)?;
        let mut watch = Stopwatch::default();
        let mut incarnations = Vec::new();
        let answer = self.change(caller, &ids, "controller.start", |drafts, views| {
            incarnations.clear();
            let mut stopped = Vec::new();
            for (draft, view) in drafts.iter_mut().zip(views) {
                if accept::needs_start(&draft.record.row)? {
                    stopped.push((draft, view));
                }
            }
            if stopped.is_empty() {
                return Ok(());
            }
            let mut hosts = watch.store(self, || self.placeable())?;
            for (draft, view) in stopped {
                let claim = watch.placement(self, || reclaim(&mut hosts, draft, caller))?;
                accept::start(draft, claim, view.now, &view.limits);
                let row = &draft.record.row;
                incarnations.push((row.instance_id.clone(), row.incarnation));
            }
            Ok(())
        })?;
        let parts = watch.parts(self.clock.monotonic() - began);
        let mut memory = self.remember();
        for (id, incarnation) in incarnations {
            memory.timings.insert(id, (incarnation, parts.clone()));
        }
        drop(memory);
        Ok(answer)
    }

    /// Stops running instances; their bills end now.
    ///
    /// # Errors
    /// EC2's.
    pub fn stop_instances(&self, caller: &Caller, request: StopInstances) -> Answer<StateChanges> {
        let ids = at_least_one(&request.instance_ids)?;
        self.change(caller, &ids, "controller.stop", |drafts, views| {
            drafts
                .iter_mut()
                .zip(views)
                .try_for_each(|(draft, view)| accept::stop(draft, request.force, view))
        })
    }

    /// Reboots running instances.
    ///
    /// # Errors
    /// EC2's.
    pub fn reboot_instances(&self, caller: &Caller, request: RebootInstances) -> Answer<Done> {
        let ids = at_least_one(&request.instance_ids)?;
        self.change(caller, &ids, "controller.reboot", |drafts, _| {
            drafts.iter_mut().try_for_each(accept::reboot)
        })?;
        Ok(Done {})
    }

    /// Removes instances for good, in whatever state they are; again is fine.
    ///
    /// # Errors
    /// EC2's.
    pub fn terminate_instances(&self, caller: &Caller, request: TerminateInstances) -> Answer<StateChanges> {
        let ids = at_least_one(&request.instance_ids)?;
        self.change(caller, &ids, "controller.terminate", |drafts, views| {
            for (draft, view) in drafts.iter_mut().zip(views) {
                accept::terminate(draft, view);
            }
            Ok(())
        })
    }

    /// Gives a stopped instance another type.
    ///
    /// # Errors
    /// EC2's; `Unsupported` if its host could not hold that type even empty.
    pub fn modify_instance_type(&self, caller: &Caller, request: ModifyInstanceType) -> Answer<Done> {
        let id: InstanceId = request.instance_id.parse()?;
        let kind = self.instance_type(&request.instance_type)?.clone();
        self.change(caller, &[id], "controller.modify", |drafts, _| {
            let hosts = self.placeable()?;
            for draft in drafts {
                accept::retype(draft, &kind)?;
                // The volume exists and is claimed.
                let wanted = Wanted { instance_type: &kind, volume_gib: 0, zone: None };
                let host =
                    hosts.iter().find(|host| Some(&host.facts.host_id) == draft.record.row.host_id.as_ref());
                let never = host.and_then(|host| {
                    roost_placement::refusal(host, &wanted)
                        .filter(Refusal::is_for_good)
                        .map(|why| format!("{} cannot run on {}", kind.name, told(host, &why, caller)))
                });
                if let Some(why) = never {
                    return Err(ApiError::new(ErrorCode::Unsupported, why));
                }
            }
            Ok(())
        })?;
        Ok(Done {})
    }
}

/// The instance's host and why it refuses. Name and room of the host are for administrators.
fn told(host: &Host, why: &Refusal, caller: &Caller) -> String {
    if caller.admin {
        format!("host {}: it {why}", host.facts.hostname)
    } else {
        format!("its host: {}", why.reason())
    }
}

/// The claim that an instance takes again on the host that has its volume; noted in `hosts` for the next one.
fn reclaim(hosts: &mut [Host], draft: &Draft, caller: &Caller) -> Answer<Claim> {
    let row = &draft.record.row;
    // The volume exists and is claimed.
    let wanted = Wanted { instance_type: &row.instance_type, volume_gib: 0, zone: None };
    let host =
        hosts.iter_mut().find(|host| Some(&host.facts.host_id) == row.host_id.as_ref()).ok_or_else(|| {
            let text = format!("the host of instance {} is unknown", row.instance_id);
            ApiError::new(ErrorCode::InternalError, text)
        })?;
    if let Some(why) = roost_placement::refusal(host, &wanted) {
        let code = match why {
            Refusal::Silent => ErrorCode::Unavailable,
            _ => ErrorCode::InsufficientInstanceCapacity,
        };
        let text = format!("instance {} has its volume on {}", row.instance_id, told(host, &why, caller));
        return Err(ApiError::new(code, text));
    }
    let claim = Claim {
        host_id: host.facts.host_id.clone(),
        cpu_milli: wanted.cpu_milli(),
        memory_mib: wanted.memory_mib(&host.facts),
    };
    host.claimed_cpu_milli += claim.cpu_milli;
    host.claimed_memory_mib += claim.memory_mib;
    Ok(claim)
}
