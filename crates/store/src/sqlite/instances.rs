//! Instances: reading them with all their rows, changing them, leasing them.

use super::codec::{Cursor, flag, int, json, maybe, text, time};
use super::{hosts, usage};
use crate::error::StoreError;
use crate::rows::{
    Change, ClaimChange, InstanceFilter, InstanceRecord, InstanceRow, InterfaceRow, VolumeRow,
};
use roost_types::state::{Step, VolumeState};
use roost_types::{AccountId, InstanceId, Micros};
use rusqlite::types::Value;
use rusqlite::{Connection, OptionalExtension, Row, Transaction, params, params_from_iter};

/// The columns of an instance's own row, in the order that [`values`] writes and [`instance`] reads.
const COLUMNS: [&str; 43] = [
    "instance_id",
    "account_id",
    "owner",
    "region",
    "zone",
    "reservation_id",
    "launch_index",
    "launched_at",
    "desired",
    "step",
    "step_since",
    "observed",
    "state_reason",
    "trouble",
    "generation",
    "incarnation",
    "incarnation_at",
    "reboots",
    "force",
    "host_id",
    "boot_id",
    "open_since",
    "running_since",
    "bill_until",
    "tries",
    "not_before",
    "deadline",
    "type_spec",
    "image_id",
    "image_name",
    "default_user",
    "key_name",
    "public_keys",
    "user_data",
    "tags",
    "metadata_options",
    "client_token",
    "timing",
    "terminated_at",
    "segment",
    "continues",
    "state",
    "type_name",
];

fn values(row: &InstanceRow) -> Result<Vec<Value>, StoreError> {
    Ok(vec![
        text(&row.instance_id),
        text(&row.account_id),
        text(&row.owner),
        text(&row.region),
        text(&row.zone),
        text(&row.reservation_id),
        int(row.launch_index.into()),
        time(row.launched_at),
        text(row.desired),
        text(row.step),
        time(row.step_since),
        row.observed.as_ref().map_or(Ok(Value::Null), json)?,
        row.state_reason.as_ref().map_or(Ok(Value::Null), json)?,
        maybe(row.trouble.as_ref(), text),
        int(row.generation),
        int(row.incarnation),
        time(row.incarnation_at),
        int(row.reboots),
        flag(row.force),
        maybe(row.host_id.as_ref(), text),
        maybe(row.boot_id.as_ref(), text),
        maybe(row.open_since, time),
        maybe(row.running_since, time),
        maybe(row.bill_until, time),
        int(row.tries.into()),
        time(row.not_before),
        maybe(row.deadline, time),
        json(&row.instance_type)?,
        text(&row.image_id),
        text(&row.image_name),
        text(&row.default_user),
        maybe(row.key_name.as_ref(), text),
        json(&row.public_keys)?,
        maybe(row.user_data.as_ref(), text),
        json(&row.tags)?,
        json(&row.metadata_options)?,
        maybe(row.client_token.as_ref(), text),
        json(&row.timing)?,
        maybe(row.terminated_at, time),
        int(row.segment),
        flag(row.continues),
        text(row.state()),
        text(&row.instance_type.name),
    ])
}

fn instance(cursor: &mut Cursor<'_>) -> Result<InstanceRow, rusqlite::Error> {
    Ok(InstanceRow {
        revision: cursor.count()?,
        instance_id: cursor.parse()?,
        account_id: cursor.parse()?,
        owner: cursor.raw()?,
        region: cursor.raw()?,
        zone: cursor.raw()?,
        reservation_id: cursor.parse()?,
        launch_index: cursor.count()?,
        launched_at: cursor.time()?,
        desired: cursor.parse()?,
        step: cursor.parse()?,
        step_since: cursor.time()?,
        observed: cursor.maybe_json()?,
        state_reason: cursor.maybe_json()?,
        trouble: cursor.raw()?,
        generation: cursor.count()?,
        incarnation: cursor.count()?,
        incarnation_at: cursor.time()?,
        reboots: cursor.count()?,
        force: cursor.raw()?,
        host_id: cursor.maybe_parse()?,
        boot_id: cursor.raw()?,
        open_since: cursor.maybe_time()?,
        running_since: cursor.maybe_time()?,
        bill_until: cursor.maybe_time()?,
        tries: cursor.count()?,
        not_before: cursor.time()?,
        deadline: cursor.maybe_time()?,
        instance_type: cursor.json()?,
        image_id: cursor.parse()?,
        image_name: cursor.raw()?,
        default_user: cursor.raw()?,
        key_name: cursor.raw()?,
        public_keys: cursor.json()?,
        user_data: cursor.raw()?,
        tags: cursor.json()?,
        metadata_options: cursor.json()?,
        client_token: cursor.raw()?,
        timing: cursor.json()?,
        terminated_at: cursor.maybe_time()?,
        segment: cursor.count()?,
        continues: cursor.raw()?,
    })
}

/// Everything of instances, in the order that [`record`] reads.
fn select(tail: &str) -> String {
    let own: String = COLUMNS[..41].iter().map(|column| format!(", i.{column}")).collect();
    format!(
        "SELECT i.revision{own},
            n.interface_id, n.account_id, n.vpc_id, n.subnet_id, n.instance_id, n.mac, n.private_ip,
            n.prefix_len, n.gateway, n.public_ip, n.ingress, n.released_at,
            {VOLUME}
         FROM instances i JOIN interfaces n USING (instance_id) JOIN volumes v USING (instance_id) {tail}"
    )
}

const VOLUME: &str = "v.volume_id, v.account_id, v.zone, v.host_id, v.instance_id, v.state, v.volume_type,
    v.size_gib, v.delete_on_termination, v.created_at,
    EXISTS (SELECT 1 FROM usage_events u WHERE u.resource = v.volume_id AND u.is_open = 1)";

fn interface(cursor: &mut Cursor<'_>) -> Result<InterfaceRow, rusqlite::Error> {
    Ok(InterfaceRow {
        interface_id: cursor.parse()?,
        account_id: cursor.parse()?,
        vpc_id: cursor.parse()?,
        subnet_id: cursor.parse()?,
        instance_id: cursor.parse()?,
        mac: cursor.raw()?,
        private_ip: cursor.parse()?,
        prefix_len: cursor.count()?,
        gateway: cursor.parse()?,
        public_ip: cursor.parse()?,
        ingress: cursor.json()?,
        released_at: cursor.maybe_time()?,
    })
}

fn volume(cursor: &mut Cursor<'_>) -> Result<VolumeRow, rusqlite::Error> {
    Ok(VolumeRow {
        volume_id: cursor.parse()?,
        account_id: cursor.parse()?,
        zone: cursor.raw()?,
        host_id: cursor.maybe_parse()?,
        instance_id: cursor.maybe_parse()?,
        state: cursor.parse()?,
        volume_type: cursor.raw()?,
        size_gib: cursor.count()?,
        delete_on_termination: cursor.raw()?,
        created_at: cursor.time()?,
        metered: cursor.raw()?,
    })
}

fn record(row: &Row<'_>) -> Result<InstanceRecord, rusqlite::Error> {
    let cursor = &mut Cursor::new(row);
    Ok(InstanceRecord { row: instance(cursor)?, interface: interface(cursor)?, volume: volume(cursor)? })
}

pub fn insert(db: &Transaction<'_>, row: &InstanceRow) -> Result<(), StoreError> {
    let holes: String = (1..=COLUMNS.len()).map(|n| format!("?{n}, ")).collect();
    db.prepare_cached(&format!(
        "INSERT INTO instances ({}, revision) VALUES ({holes}1)",
        COLUMNS.join(", ")
    ))?
    .execute(params_from_iter(values(row)?))?;
    Ok(())
}

pub fn one(db: &Connection, id: &InstanceId) -> Result<Option<InstanceRecord>, StoreError> {
    let mut query = db.prepare_cached(&select("WHERE i.instance_id = ?1"))?;
    Ok(query.query_row([id.as_str()], record).optional()?)
}

pub fn list(db: &Connection, filter: &InstanceFilter) -> Result<Vec<InstanceRecord>, StoreError> {
    each(db, filter)?.into_iter().map(|(_, record)| record).collect()
}

/// Reads instances by id, each on its own.
#[expect(clippy::type_complexity, reason = "a list of results")]
pub fn each(
    db: &Connection,
    filter: &InstanceFilter,
) -> Result<Vec<(InstanceId, Result<InstanceRecord, StoreError>)>, StoreError> {
    let mut conditions = Vec::new();
    let mut arguments = Vec::new();
    let mut demand = |column: &str, id: Option<&str>| {
        if let Some(id) = id {
            arguments.push(text(id));
            conditions.push(format!("i.{column} = ?{}", arguments.len()));
        }
    };
    demand("account_id", filter.account_id.as_ref().map(AccountId::as_str));
    demand("reservation_id", filter.reservation_id.as_ref().map(roost_types::ReservationId::as_str));
    demand("host_id", filter.host_id.as_ref().map(roost_types::HostId::as_str));
    match filter.gone_since {
        None => conditions.push("i.terminated_at IS NULL".to_owned()),
        Some(since) => {
            arguments.push(time(since));
            conditions.push(format!("(i.terminated_at IS NULL OR i.terminated_at >= ?{})", arguments.len()));
        }
    }
    let mut query = db.prepare_cached(&select(&format!(
        "WHERE {} ORDER BY i.launched_at, i.reservation_id, i.launch_index",
        conditions.join(" AND ")
    )))?;
    let rows = query.query_map(params_from_iter(arguments), |row| {
        let mut cursor = Cursor::new(row);
        let _revision: Value = cursor.raw()?;
        Ok((cursor.parse()?, record(row).map_err(StoreError::from)))
    })?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// One change with all that belongs to it.
pub fn change(db: &Transaction<'_>, change: &Change, now: Micros) -> Result<(), StoreError> {
    let row = &change.row;
    let id = &row.instance_id;
    let sets: String =
        COLUMNS.iter().enumerate().map(|(at, column)| format!("{column} = ?{}, ", at + 1)).collect();
    let lease = if change.release_lease { ", lease = 0, lease_owner = NULL" } else { "" };
    let mut arguments = values(row)?;
    arguments.push(int(row.revision));
    let written = db
        .prepare_cached(&format!(
            "UPDATE instances SET {sets}revision = revision + 1{lease}
             WHERE instance_id = ?1 AND revision = ?{}",
            arguments.len()
        ))?
        .execute(params_from_iter(arguments))?;
    if written == 0 {
        return Err(StoreError::Stale(id.clone()));
    }
    match &change.claim {
        ClaimChange::Keep => {}
        ClaimChange::Take(claim) => hosts::take(db, id, claim)?,
        ClaimChange::Hold(claim) => hosts::hold(db, id, claim)?,
        ClaimChange::Release => hosts::release(db, id)?,
    }
    change.usage.iter().try_for_each(|event| usage::append(db, event))?;
    if let Some(seen) = change.proof {
        usage::prove(db, id.as_str(), seen)?;
    }
    if let Some(state) = change.volume {
        db.execute("UPDATE volumes SET state = ?2 WHERE instance_id = ?1", params![text(id), text(state)])?;
    }
    if change.release_addresses {
        db.execute(
            "UPDATE interfaces SET released_at = ?2 WHERE instance_id = ?1 AND released_at IS NULL",
            params![text(id), time(now)],
        )?;
    }
    Ok(())
}

pub fn lease(
    db: &Transaction<'_>,
    id: &InstanceId,
    owner: &str,
    now: Micros,
    until: Micros,
) -> Result<Option<InstanceRecord>, StoreError> {
    let taken: Option<String> = db
        .prepare_cached(
            "UPDATE instances SET lease = ?3, lease_owner = ?2
             WHERE instance_id = ?1 AND lease < ?4 RETURNING instance_id",
        )?
        .query_row(params![id.as_str(), owner, time(until), time(now)], |row| row.get(0))
        .optional()?;
    match taken {
        Some(_) => one(db, id),
        None => Ok(None),
    }
}

pub fn due(db: &Connection, now: Micros, limit: u32) -> Result<Vec<InstanceId>, StoreError> {
    let mut query = db.prepare_cached(
        "SELECT instance_id FROM instances
         WHERE terminated_at IS NULL AND not_before <= ?1 AND lease < ?1 AND step <> ?2
         ORDER BY not_before, instance_id LIMIT ?3",
    )?;
    let rows =
        query.query_map(params![time(now), text(Step::Rest), limit], |row| Cursor::new(row).parse())?;
    Ok(rows.collect::<Result<_, _>>()?)
}

pub fn next_due(db: &Connection) -> Result<Option<Micros>, StoreError> {
    let mut query = db.prepare_cached(
        "SELECT min(max(not_before, lease + 1)) FROM instances WHERE terminated_at IS NULL AND step <> ?1",
    )?;
    Ok(query.query_row([text(Step::Rest)], |row| Cursor::new(row).maybe_time())?)
}

pub fn volumes(db: &Connection, account: &AccountId) -> Result<Vec<VolumeRow>, StoreError> {
    let mut query = db.prepare_cached(&format!(
        "SELECT {VOLUME} FROM volumes v WHERE v.account_id = ?1 AND v.state <> ?2
         ORDER BY v.created_at, v.volume_id"
    ))?;
    let rows = query.query_map(params![account.as_str(), text(VolumeState::Deleted)], |row| {
        volume(&mut Cursor::new(row))
    })?;
    Ok(rows.collect::<Result<_, _>>()?)
}
