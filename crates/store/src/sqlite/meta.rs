//! Values about the database itself.

use super::codec::time;
use crate::error::StoreError;
use roost_types::Micros;
use rusqlite::{Connection, Transaction, params};

/// The database's epoch.
pub fn epoch(db: &Connection) -> Result<i64, StoreError> {
    Ok(db.query_row("SELECT value FROM meta WHERE name = 'epoch'", [], |row| row.get(0))?)
}

pub fn begin_epoch(db: &Transaction<'_>, at_least: i64) -> Result<i64, StoreError> {
    let mut query =
        db.prepare_cached("UPDATE meta SET value = max(value + 1, ?1) WHERE name = 'epoch' RETURNING value")?;
    Ok(query.query_row([at_least], |row| row.get(0))?)
}

/// Newest time of any commit.
pub fn clock_high(db: &Connection) -> Result<Micros, StoreError> {
    let mut query = db.prepare_cached("SELECT value FROM meta WHERE name = 'clock_high'")?;
    Ok(query.query_row([], |row| Ok(Micros(row.get(0)?)))?)
}

/// End of the newest sealed month.
pub fn sealed(db: &Connection) -> Result<Micros, StoreError> {
    let mut query = db.prepare_cached("SELECT value FROM meta WHERE name = 'sealed'")?;
    Ok(query.query_row([], |row| Ok(Micros(row.get(0)?)))?)
}

pub fn seal(db: &Transaction<'_>, until: Micros) -> Result<(), StoreError> {
    db.execute("UPDATE meta SET value = ?1 WHERE name = 'sealed' AND value < ?1", params![time(until)])?;
    Ok(())
}

/// Records the time of a commit.
pub fn written_at(db: &Transaction<'_>, at: Micros) -> Result<(), StoreError> {
    db.prepare_cached("UPDATE meta SET value = ?1 WHERE name = 'clock_high' AND value < ?1")?
        .execute(params![time(at)])?;
    Ok(())
}
