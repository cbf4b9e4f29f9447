//! Hosts and what is claimed of them.

use super::codec::{Cursor, int, json, text, time};
use super::usage;
use crate::error::StoreError;
use crate::rows::{Claim, HostRow};
use roost_types::agent::HostFacts;
use roost_types::{HostId, InstanceId, Micros};
use rusqlite::{Connection, OptionalExtension, Row, Transaction, params};

pub fn put(db: &Transaction<'_>, facts: &HostFacts, at: Micros) -> Result<(), StoreError> {
    db.execute(
        "INSERT INTO hosts (host_id, hostname, zone, cpu_milli, memory_mib, disk_gib, facts, registered_at,
             last_report_at)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?8)
         ON CONFLICT (host_id) DO UPDATE SET hostname = excluded.hostname, zone = excluded.zone,
             cpu_milli = excluded.cpu_milli, memory_mib = excluded.memory_mib, disk_gib = excluded.disk_gib,
             facts = excluded.facts,
             last_report_at = max(last_report_at, excluded.last_report_at)",
        params![
            text(&facts.host_id),
            facts.hostname,
            facts.zone,
            int(facts.cpu_milli),
            int(facts.memory_mib),
            int(facts.disk_gib),
            json(facts)?,
            time(at)
        ],
    )?;
    Ok(())
}

pub fn reported(
    db: &Transaction<'_>,
    host: &HostId,
    boot_id: &str,
    at: Micros,
    proofs: &[(InstanceId, Micros)],
) -> Result<(), StoreError> {
    let found = db.execute(
        "UPDATE hosts SET last_report_at = max(last_report_at, ?2), boot_id = ?3 WHERE host_id = ?1",
        params![host.as_str(), time(at), boot_id],
    )?;
    if found == 0 {
        return Err(StoreError::Missing { what: "host", value: host.to_string() });
    }
    proofs.iter().try_for_each(|(instance, seen)| usage::prove(db, instance.as_str(), *seen))
}

const HOSTS: &str = "SELECT h.facts, h.registered_at, h.last_report_at, h.boot_id,
        coalesce(sum(c.cpu_milli), 0), coalesce(sum(c.memory_mib), 0), count(c.instance_id),
        (SELECT coalesce(sum(v.size_gib), 0) FROM volumes v WHERE v.host_id = h.host_id AND v.state <> 'deleted')
    FROM hosts h LEFT JOIN claims c USING (host_id)";

fn host(row: &Row<'_>) -> Result<HostRow, rusqlite::Error> {
    let cursor = &mut Cursor::new(row);
    Ok(HostRow {
        facts: cursor.json()?,
        registered_at: cursor.time()?,
        last_report_at: cursor.time()?,
        boot_id: cursor.raw()?,
        claimed_cpu_milli: cursor.count()?,
        claimed_memory_mib: cursor.count()?,
        claims: cursor.count()?,
        claimed_disk_gib: cursor.count()?,
    })
}

pub fn all(db: &Connection) -> Result<Vec<HostRow>, StoreError> {
    let mut query =
        db.prepare_cached(&format!("{HOSTS} GROUP BY h.host_id ORDER BY h.hostname, h.host_id"))?;
    let rows = query.query_map([], host)?;
    Ok(rows.collect::<Result<_, _>>()?)
}

pub fn one(db: &Connection, id: &HostId) -> Result<Option<HostRow>, StoreError> {
    let mut query = db.prepare_cached(&format!("{HOSTS} WHERE h.host_id = ?1 GROUP BY h.host_id"))?;
    Ok(query.query_row([id.as_str()], host).optional()?)
}

/// Takes a claim if the host has room for it beside all others: the check and the write are one statement.
pub fn take(db: &Transaction<'_>, instance: &InstanceId, claim: &Claim) -> Result<(), StoreError> {
    let taken = db.execute(
        "INSERT INTO claims (instance_id, host_id, cpu_milli, memory_mib)
         SELECT ?1, h.host_id, ?3, ?4 FROM hosts h WHERE h.host_id = ?2
             AND h.cpu_milli >= ?3 + (SELECT coalesce(sum(cpu_milli), 0) FROM claims WHERE host_id = ?2)
             AND h.memory_mib >= ?4 + (SELECT coalesce(sum(memory_mib), 0) FROM claims WHERE host_id = ?2)",
        params![text(instance), text(&claim.host_id), int(claim.cpu_milli), int(claim.memory_mib)],
    )?;
    if taken == 1 {
        return Ok(());
    }
    match one(db, &claim.host_id)? {
        None => Err(StoreError::Missing { what: "host", value: claim.host_id.to_string() }),
        Some(_) => Err(StoreError::NoRoom {
            host: claim.host_id.clone(),
            what: format!("{} milli-CPUs and {} MiB", claim.cpu_milli, claim.memory_mib),
        }),
    }
}

/// Claims capacity for an object that is on the host already.
pub fn hold(db: &Transaction<'_>, instance: &InstanceId, claim: &Claim) -> Result<(), StoreError> {
    db.execute(
        "INSERT INTO claims (instance_id, host_id, cpu_milli, memory_mib) VALUES (?1, ?2, ?3, ?4)",
        params![text(instance), text(&claim.host_id), int(claim.cpu_milli), int(claim.memory_mib)],
    )?;
    Ok(())
}

/// Checks that a host's disk has room for one more volume. The volume's row, written in the same
/// transaction, is the claim.
pub fn has_disk(db: &Transaction<'_>, host: &HostId, size_gib: u64) -> Result<(), StoreError> {
    let fits: Option<bool> = db
        .prepare_cached(
            "SELECT h.disk_gib >= ?2 + (SELECT coalesce(sum(size_gib), 0) FROM volumes
                 WHERE host_id = ?1 AND state <> 'deleted')
             FROM hosts h WHERE h.host_id = ?1",
        )?
        .query_row(params![text(host), int(size_gib)], |row| row.get(0))
        .optional()?;
    match fits {
        Some(true) => Ok(()),
        Some(false) => {
            Err(StoreError::NoRoom { host: host.clone(), what: format!("{size_gib} GiB of disk") })
        }
        None => Err(StoreError::Missing { what: "host", value: host.to_string() }),
    }
}

pub fn release(db: &Transaction<'_>, instance: &InstanceId) -> Result<(), StoreError> {
    db.execute("DELETE FROM claims WHERE instance_id = ?1", [instance.as_str()])?;
    Ok(())
}

pub fn claim(db: &Connection, instance: &InstanceId) -> Result<Option<Claim>, StoreError> {
    let read = |row: &Row<'_>| {
        let cursor = &mut Cursor::new(row);
        Ok(Claim { host_id: cursor.parse()?, cpu_milli: cursor.count()?, memory_mib: cursor.count()? })
    };
    let mut query =
        db.prepare_cached("SELECT host_id, cpu_milli, memory_mib FROM claims WHERE instance_id = ?1")?;
    Ok(query.query_row([instance.as_str()], read).optional()?)
}
