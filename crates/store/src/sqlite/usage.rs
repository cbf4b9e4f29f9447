//! The usage log and the proofs of life.

use super::codec::{Cursor, flag, int, text, time};
use super::is_duplicate;
use crate::error::StoreError;
use crate::rows::UsageFilter;
use roost_types::Micros;
use roost_types::metering::{Proofs, UsageEvent, UsageKind};
use rusqlite::{Connection, OptionalExtension, Row, Transaction, params};

const COLUMNS: &str =
    "account_id, resource, meter, incarnation, sequence, kind, at, sku, quantity, continues";

fn event(row: &Row<'_>) -> Result<UsageEvent, rusqlite::Error> {
    let cursor = &mut Cursor::new(row);
    Ok(UsageEvent {
        account: cursor.parse()?,
        resource: cursor.raw()?,
        meter: cursor.parse()?,
        incarnation: cursor.count()?,
        sequence: cursor.count()?,
        kind: cursor.parse()?,
        at: cursor.time()?,
        sku: cursor.raw()?,
        quantity: cursor.count()?,
        continues: cursor.raw()?,
    })
}

/// Appends an event. The same event again is no event; another one under its key, a second open interval or the
/// end of none is refused.
pub fn append(db: &Transaction<'_>, new: &UsageEvent) -> Result<(), StoreError> {
    let refuse =
        |detail: &str| StoreError::Usage { resource: new.resource.clone(), detail: detail.to_owned() };
    let known = db
        .prepare_cached(&format!(
            "SELECT {COLUMNS} FROM usage_events
             WHERE resource = ?1 AND meter = ?2 AND incarnation = ?3 AND sequence = ?4"
        ))?
        .query_row(params![new.resource, text(new.meter), int(new.incarnation), int(new.sequence)], event)
        .optional()?;
    match known {
        Some(known) if known == *new => return Ok(()),
        Some(_) => return Err(refuse("another event has the same incarnation and sequence")),
        None => {}
    }
    if new.kind == UsageKind::Close {
        let closed = db.execute(
            "UPDATE usage_events SET is_open = 0
             WHERE resource = ?1 AND meter = ?2 AND incarnation = ?3 AND is_open = 1 AND at <= ?4",
            params![new.resource, text(new.meter), int(new.incarnation), time(new.at)],
        )?;
        if closed != 1 {
            return Err(refuse("an end without an open interval that began before it"));
        }
    }
    db.execute(
        &format!(
            "INSERT INTO usage_events ({COLUMNS}, is_open) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)"
        ),
        params![
            text(&new.account),
            new.resource,
            text(new.meter),
            int(new.incarnation),
            int(new.sequence),
            text(new.kind),
            time(new.at),
            new.sku,
            int(new.quantity),
            flag(new.continues),
            flag(new.kind == UsageKind::Open),
        ],
    )
    .map_err(
        |error| {
            if is_duplicate(&error) { refuse("an interval is open already") } else { error.into() }
        },
    )?;
    Ok(())
}

/// Notes that a resource was seen in use; an older proof never replaces a newer one.
pub fn prove(db: &Transaction<'_>, resource: &str, seen: Micros) -> Result<(), StoreError> {
    db.prepare_cached(
        "INSERT INTO proofs (resource, seen_at) VALUES (?1, ?2)
         ON CONFLICT (resource) DO UPDATE SET seen_at = max(seen_at, excluded.seen_at)",
    )?
    .execute(params![resource, time(seen)])?;
    Ok(())
}

pub fn events(db: &Connection, filter: &UsageFilter) -> Result<Vec<UsageEvent>, StoreError> {
    let mut query = db.prepare_cached(&format!(
        "SELECT {COLUMNS} FROM usage_events
         WHERE (?1 IS NULL OR account_id = ?1) AND (?2 IS NULL OR resource = ?2) ORDER BY number"
    ))?;
    let account = filter.account_id.as_ref().map(roost_types::AccountId::as_str);
    let rows = query.query_map(params![account, filter.resource], event)?;
    Ok(rows.collect::<Result<_, _>>()?)
}

pub fn proofs(db: &Connection) -> Result<Proofs, StoreError> {
    let mut query = db.prepare_cached("SELECT resource, seen_at FROM proofs")?;
    let rows = query.query_map([], |row| Ok((row.get(0)?, Micros(row.get(1)?))))?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// What must never be (a host may shrink below its claims, so that is not among it), each as a query for one example of it.
const CONTRADICTIONS: [(&str, &str); 3] = [
    (
        "a claim held by an instance that is at rest or gone",
        "SELECT instance_id FROM claims JOIN instances USING (instance_id)
         WHERE state IN ('stopped', 'terminated')",
    ),
    (
        "no claim held by an instance that needs one",
        "SELECT instance_id FROM instances LEFT JOIN claims c USING (instance_id)
         WHERE state IN ('pending', 'running', 'stopping') AND c.instance_id IS NULL",
    ),
    (
        "an interval open of an instance that is at rest or gone",
        "SELECT u.resource FROM usage_events u JOIN instances i ON i.instance_id = u.resource
         WHERE u.is_open = 1 AND i.state IN ('stopped', 'terminated')",
    ),
];

pub fn contradiction(db: &Connection) -> Result<Option<String>, StoreError> {
    for (what, query) in CONTRADICTIONS {
        let example: Option<String> = db.query_row(query, [], |row| row.get(0)).optional()?;
        if let Some(example) = example {
            return Ok(Some(format!("{what}: {example}")));
        }
    }
    let dangling: Option<String> =
        db.query_row("SELECT \"table\" FROM pragma_foreign_key_check", [], |row| row.get(0)).optional()?;
    Ok(dangling.map(|table| format!("a reference to nothing in {table}")))
}
