//! Numbers about the database itself.

use super::codec::time;
use crate::error::StoreError;
use roost_types::Micros;
use rusqlite::{Connection, Transaction, params};

/// The newest time that anything was written at.
pub fn clock_high(db: &Connection) -> Result<Micros, StoreError> {
    let mut query = db.prepare_cached("SELECT value FROM meta WHERE name = 'clock_high'")?;
    Ok(query.query_row([], |row| Ok(Micros(row.get(0)?)))?)
}

/// Notes that something is written at this time.
pub fn written_at(db: &Transaction<'_>, at: Micros) -> Result<(), StoreError> {
    db.prepare_cached("UPDATE meta SET value = ?1 WHERE name = 'clock_high' AND value < ?1")?
        .execute(params![time(at)])?;
    Ok(())
}
