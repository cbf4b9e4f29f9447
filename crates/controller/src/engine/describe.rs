//! What users see.

use super::actions::parse_ids;
use super::{Answer, Caller, Engine, errors};
use roost_placement::Wanted;
use roost_store::{HostRow, InstanceFilter, InstanceRecord, UsageFilter};
use roost_types::agent;
use roost_types::api::{
    DescribeHosts, DescribeInstanceTiming, DescribeInstanceTypes, DescribeInstances, DescribeVolumes,
    HostView, Hosts, Instance, InstanceTiming, InstanceTypes, Instances, PricedType, Volume, Volumes,
};
use roost_types::metering::{Proofs, UsageEvent};
use roost_types::state::Step;
use roost_types::{ApiError, ErrorCode, HostId, InstanceId, Micros};
use std::collections::{BTreeMap, HashMap};

/// Up to so many instances, their usage is read one by one rather than with everybody's.
const FEW: usize = 8;

pub(super) fn admins_only(caller: &Caller, what: &str) -> Answer<()> {
    if caller.admin {
        return Ok(());
    }
    Err(ApiError::new(
        ErrorCode::UnauthorizedOperation,
        format!("account {} may not {what}: administrators may", caller.account_name),
    ))
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "a request is taken as it came off the wire, and is done with"
)]
impl Engine {
    /// Lists instances.
    ///
    /// # Errors
    /// `InvalidInstanceID.NotFound` for one that is unknown or another account's.
    pub fn describe_instances(&self, caller: &Caller, request: DescribeInstances) -> Answer<Instances> {
        if request.all_accounts {
            admins_only(caller, "see every account's instances")?;
        }
        let now = self.clock.now();
        let ids = parse_ids(&request.instance_ids)?;
        let records = if ids.is_empty() {
            let filter = InstanceFilter {
                account_id: (!request.all_accounts).then(|| caller.account_id.clone()),
                gone_since: request.include_terminated.then(|| now - self.settings.show_terminated),
                ..Default::default()
            };
            self.store.instances(&filter).map_err(errors::of_store)?
        } else {
            self.owned(caller, &ids, now)?
        };
        Ok(Instances { instances: self.show(&records, now)? })
    }

    /// Instances as their owners see them.
    pub(super) fn show(&self, records: &[InstanceRecord], now: Micros) -> Answer<Vec<Instance>> {
        let usage = self.usage_of(records)?;
        let hosts: HashMap<HostId, HostRow> = self
            .store
            .hosts()
            .map_err(errors::of_store)?
            .into_iter()
            .map(|host| (host.facts.host_id.clone(), host))
            .collect();
        self.proofs().map(|proofs| {
            let none = Vec::new();
            records
                .iter()
                .map(|record| {
                    let events = usage.get(record.row.instance_id.as_str()).unwrap_or(&none);
                    let host = record.row.host_id.as_ref().and_then(|id| hosts.get(id));
                    self.show_one(record, events, &proofs, host, now)
                })
                .collect()
        })
    }

    fn usage_of(&self, records: &[InstanceRecord]) -> Answer<BTreeMap<String, Vec<UsageEvent>>> {
        let mut usage: BTreeMap<String, Vec<UsageEvent>> = BTreeMap::new();
        let mut add = |filter: UsageFilter| -> Answer<()> {
            for event in self.store.usage_events(&filter).map_err(errors::of_store)? {
                usage.entry(event.resource.clone()).or_default().push(event);
            }
            Ok(())
        };
        if records.len() <= FEW {
            for record in records {
                let resource = Some(record.row.instance_id.to_string());
                add(UsageFilter { resource, ..Default::default() })?;
            }
        } else {
            let mut accounts: Vec<_> = records.iter().map(|record| &record.row.account_id).collect();
            accounts.sort();
            accounts.dedup();
            for account in accounts {
                add(UsageFilter { account_id: Some(account.clone()), ..Default::default() })?;
            }
        }
        Ok(usage)
    }

    fn show_one(
        &self,
        record: &InstanceRecord,
        events: &[UsageEvent],
        proofs: &Proofs,
        host: Option<&HostRow>,
        now: Micros,
    ) -> Instance {
        let InstanceRecord { row, interface, volume } = record;
        // The host's clock measures a run's length, so a proof may be later than the controller's
        // time.
        let id = row.instance_id.as_str();
        let seconds =
            roost_billing::seconds(events, proofs, id, proofs.get(id).map_or(now, |at| now.max(*at)));
        let own = row.observed.as_ref().filter(|seen| seen.incarnation == row.incarnation);
        let silent = host
            .filter(|host| !matches!(row.step, Step::Rest | Step::Gone) && !self.is_alive(host))
            .map(|host| {
                let silence = self.silence(host).floor_secs();
                format!("host {} has not reported for {silence} s", host.facts.hostname)
            });
        Instance {
            instance_id: row.instance_id.clone(),
            account_id: row.account_id.clone(),
            reservation_id: row.reservation_id.clone(),
            launch_index: row.launch_index,
            state: row.state(),
            step: row.step,
            state_reason: row.state_reason.clone(),
            trouble: row.trouble.clone().or(silent),
            instance_type: row.instance_type.name.clone(),
            vcpus: row.instance_type.vcpus,
            memory_mib: row.instance_type.memory_mib,
            image_id: row.image_id.clone(),
            image_name: row.image_name.clone(),
            default_user: row.default_user.clone(),
            key_name: row.key_name.clone(),
            host_id: row.host_id.clone().filter(|_| row.step != Step::Gone),
            region: row.region.clone(),
            zone: row.zone.clone(),
            vpc_id: interface.vpc_id.clone(),
            subnet_id: interface.subnet_id.clone(),
            interface_id: interface.interface_id.clone(),
            private_ip: interface.private_ip,
            public_ip: interface.public_ip,
            root_volume_id: volume.volume_id.clone(),
            root_volume_gib: volume.size_gib,
            tags: row.tags.clone(),
            launched_at: row.launched_at,
            running_since: row.running_since,
            incarnation: row.incarnation,
            generation: row.generation,
            guest_ready: row.step == Step::Run && own.is_some_and(|seen| seen.guest_ready),
            ssh_host_key: own.and_then(|seen| seen.ssh_host_key.clone()),
            user_data_not_run: own.and_then(|seen| seen.user_data_not_run),
            metadata_options: row.metadata_options,
            used_seconds: seconds.used,
            billed_seconds: seconds.billed,
        }
    }

    /// How long the parts of an instance's latest start took.
    ///
    /// # Errors
    /// `InvalidInstanceID.NotFound`.
    pub fn describe_instance_timing(
        &self,
        caller: &Caller,
        request: DescribeInstanceTiming,
    ) -> Answer<InstanceTiming> {
        let id: InstanceId = request.instance_id.parse()?;
        let now = self.clock.now();
        let records = self.owned(caller, std::slice::from_ref(&id), now)?;
        let Some(record) = records.into_iter().next() else {
            return Err(ApiError::new(
                ErrorCode::InvalidInstanceIdNotFound,
                format!("instance {id} does not exist"),
            ));
        };
        let timing = record.row.timing;
        let mut parts = timing.controller;
        if parts.is_empty()
            && let Some((incarnation, fresh)) = self.remember().timings.get(&id)
            && *incarnation == record.row.incarnation
        {
            parts.clone_from(fresh);
        }
        parts.extend(timing.host);
        parts.extend(timing.guest);
        Ok(InstanceTiming { instance_id: id, incarnation: record.row.incarnation, parts })
    }

    /// Lists the caller's volumes.
    ///
    /// # Errors
    /// If the store fails.
    pub fn describe_volumes(&self, caller: &Caller, _request: DescribeVolumes) -> Answer<Volumes> {
        let rows = self.store.volumes(&caller.account_id).map_err(errors::of_store)?;
        let volumes = rows
            .into_iter()
            .map(|row| Volume {
                volume_id: row.volume_id,
                state: row.state,
                size_gib: row.size_gib,
                instance_id: row.instance_id,
                created_at: row.created_at,
            })
            .collect();
        Ok(Volumes { volumes })
    }

    /// Lists hosts.
    ///
    /// # Errors
    /// `UnauthorizedOperation` for others than administrators.
    pub fn describe_hosts(&self, caller: &Caller, _request: DescribeHosts) -> Answer<Hosts> {
        admins_only(caller, "list hosts")?;
        let now = self.clock.now();
        let rows = self.store.hosts().map_err(errors::of_store)?;
        let mut hosts = Vec::with_capacity(rows.len());
        for row in rows {
            let alive = self.is_alive(&row);
            let silence = self.silence(&row);
            let memory = self.remember();
            let trouble = memory.trouble(&row.facts.host_id);
            let orphans = memory.orphans(&row.facts.host_id).to_vec();
            drop(memory);
            hosts.push(HostView {
                alive,
                trouble,
                orphans,
                last_report_at: now - silence,
                facts: row.facts,
                claimed_cpu_milli: row.claimed_cpu_milli,
                claimed_memory_mib: row.claimed_memory_mib,
                claimed_disk_gib: row.claimed_disk_gib,
                instances: row.claims,
            });
        }
        Ok(Hosts { hosts, trouble: self.troubles() })
    }

    /// Troubles of the controller itself: its clock, and rows that cannot be written.
    fn troubles(&self) -> Vec<String> {
        let aside: Vec<_> = self
            .remember()
            .set_aside
            .iter()
            .map(|(id, aside)| {
                let times = if aside.tries == 1 { "time" } else { "times" };
                let sentence = format!("{id} could not be written {} {times}: {}", aside.tries, aside.why);
                agent::bounded(&sentence)
            })
            .collect();
        self.clock.trouble().into_iter().chain(aside).take(agent::TROUBLES).collect()
    }

    /// Lists instance types with their prices, and why one cannot run here.
    ///
    /// # Errors
    /// If the store fails.
    pub fn describe_instance_types(
        &self,
        caller: &Caller,
        _request: DescribeInstanceTypes,
    ) -> Answer<InstanceTypes> {
        let now = self.clock.now();
        let hosts = self.placeable()?;
        let instance_types = self
            .catalogue
            .iter()
            .map(|kind| PricedType {
                price_per_hour: self.prices.instance_hour(&kind.name, now),
                unsupported: roost_placement::unsupported(
                    &hosts,
                    &Wanted { instance_type: kind, volume_gib: 1, zone: None },
                )
                .map(|why| if caller.admin { why.to_string() } else { why.counted() }),
                instance_type: kind.clone(),
            })
            .collect();
        Ok(InstanceTypes { instance_types, currency: self.prices.currency() })
    }
}
