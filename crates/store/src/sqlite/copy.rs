//! A copy of a database that is in use.
//!
//! The copy reads one snapshot from its own connection. Writers neither wait for the copy nor
//! restart it.

use super::{explain, open_reader};
use crate::error::StoreError;
use rusqlite::Connection;
use rusqlite::backup::{Backup, StepResult};
use std::path::Path;
use std::time::Duration;

/// Pages of 4 KiB per step of the copy.
const STEP: i32 = 256;

pub fn copy(from: &Path, to: &Path, mut after_step: impl FnMut()) -> Result<(), StoreError> {
    let say = |error: rusqlite::Error| explain(from, &error);
    let unusable = |detail: String| StoreError::Unusable { path: to.display().to_string(), detail };
    if std::fs::metadata(to).is_ok_and(|there| there.len() > 0) {
        return Err(unusable("it exists already; name a new file".into()));
    }
    let reader = open_reader(from).map_err(say)?;
    let snapshot = reader.unchecked_transaction().map_err(say)?;
    // The first read takes the snapshot.
    snapshot.query_row("SELECT count(*) FROM sqlite_schema", [], |_| Ok(())).map_err(say)?;
    let write = |error: rusqlite::Error| unusable(error.to_string());
    let mut target = Connection::open(to).map_err(write)?;
    {
        let backup = Backup::new(&snapshot, &mut target).map_err(write)?;
        loop {
            match backup.step(STEP).map_err(write)? {
                StepResult::Done => break,
                StepResult::More => after_step(),
                // A checkpoint can lock the file for a moment.
                _ => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }
    // The copy is a single file without a write-ahead log.
    target.pragma_update(None, "journal_mode", "DELETE").map_err(write)?;
    target.close().map_err(|(_, error)| write(error))
}
