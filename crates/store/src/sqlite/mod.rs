//! SQLite behind [`Store`]: one writer, any number of readers, every commit on the disk before it is answered.

mod accounts;
mod codec;
mod copy;
mod hosts;
mod images;
mod instances;
mod launch;
mod meta;
mod schema;
mod usage;

use crate::error::StoreError;
use crate::rows::{
    AccessKeyRow, BlobRow, Change, Claim, HostRow, ImageRow, InstanceFilter, InstanceRecord, KeyPairRow,
    Launch, Launched, NewAccountRows, Released, SubnetRow, UsageFilter, VolumeRow,
};
use crate::traits::Store;
use roost_types::agent::HostFacts;
use roost_types::api::Account;
use roost_types::metering::{Proofs, UsageEvent};
use roost_types::{AccountId, BlobId, HostId, ImageId, InstanceId, Micros, ReservationId, SubnetId, VpcId};
use rusqlite::{Connection, ErrorCode, OpenFlags, Transaction, TransactionBehavior};
use std::cmp::Ordering;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How long an operation waits for another process's lock.
const BUSY: Duration = Duration::from_secs(5);
/// Reader connections that are kept for the next reader.
const IDLE_READERS: usize = 8;

/// A [`Store`] in one SQLite file.
#[derive(Debug)]
pub struct SqliteStore {
    path: PathBuf,
    // Readers close before the writer: the last connection checkpoints the log into the file, and
    // must be able to write.
    readers: Mutex<Vec<Connection>>,
    writer: Mutex<Connection>,
}

impl SqliteStore {
    /// Opens the file, makes it if it is missing, brings its schema up to date and checks it quickly.
    ///
    /// # Errors
    /// `Corrupt`, `Locked`, `TooNew` or `Unusable`, each with the path.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let say = |error: rusqlite::Error| explain(path, &error);
        let mut writer = Connection::open(path).map_err(say)?;
        writer.busy_timeout(BUSY).map_err(say)?;
        writer.pragma_update(None, "journal_mode", "WAL").map_err(say)?;
        // A commit that was answered must survive a power cut: money hangs on it.
        writer.pragma_update(None, "synchronous", "FULL").map_err(say)?;
        writer.pragma_update(None, "foreign_keys", true).map_err(say)?;
        verdict(path, &writer, "quick_check")?;
        let found = schema_of(path, &writer)?;
        if found > schema::VERSION {
            return Err(too_new(path, found));
        }
        schema::migrations().to_latest(&mut writer).map_err(|error| match error {
            rusqlite_migration::Error::RusqliteError { err, .. } => explain(path, &err),
            other => StoreError::Database { path: path.display().to_string(), detail: other.to_string() },
        })?;
        Ok(Self { path: path.to_owned(), writer: Mutex::new(writer), readers: Mutex::new(Vec::new()) })
    }

    /// Opens the file read-only. A schema of another release is refused, not migrated. A controller
    /// may be running on the file.
    ///
    /// # Errors
    /// `TooNew`, `TooOld`, `Corrupt`, `Locked` or `Unusable`, each with the path.
    pub fn open_read_only(path: &Path) -> Result<Self, StoreError> {
        let reader = open_reader(path).map_err(|error| explain(path, &error))?;
        let found = schema_of(path, &reader)?;
        match found.cmp(&schema::VERSION) {
            Ordering::Greater => Err(too_new(path, found)),
            Ordering::Less => {
                Err(StoreError::TooOld { path: path.display().to_string(), found, known: schema::VERSION })
            }
            Ordering::Equal => {
                Ok(Self { path: path.to_owned(), writer: Mutex::new(reader), readers: Mutex::default() })
            }
        }
    }

    /// Copies a database to a new or empty file, consistent as of the call, and returns its schema.
    /// Writers continue meanwhile; `after_step` runs after every MiB.
    ///
    /// # Errors
    /// `Unusable` if `to` holds something or cannot be written, `TooNew` if this program does not
    /// know the schema; else errors of reading.
    pub fn copy(path: &Path, to: &Path, after_step: impl FnMut()) -> Result<i64, StoreError> {
        let reader = open_reader(path).map_err(|error| explain(path, &error))?;
        let found = schema_of(path, &reader)?;
        if found > schema::VERSION {
            return Err(too_new(path, found));
        }
        copy::copy(path, to, after_step)?;
        Ok(found)
    }

    /// Checks every page and index of a database file of any schema, such as a copy.
    ///
    /// # Errors
    /// `Corrupt` with SQLite's finding.
    pub fn verify(path: &Path) -> Result<(), StoreError> {
        let reader = open_reader(path).map_err(|error| explain(path, &error))?;
        verdict(path, &reader, "integrity_check")
    }

    /// One writing transaction.
    fn write<T>(&self, run: impl FnOnce(&Transaction<'_>) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let mut writer = lock(&self.writer);
        let transaction = writer
            .transaction_with_behavior(TransactionBehavior::Immediate)
            .map_err(|error| explain(&self.path, &error))?;
        let result = run(&transaction).map_err(|error| self.locate(error))?;
        transaction.commit().map_err(|error| explain(&self.path, &error))?;
        Ok(result)
    }

    /// One reading transaction: a consistent view.
    fn read<T>(&self, run: impl FnOnce(&Connection) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let idle = lock(&self.readers).pop();
        let mut reader = match idle {
            Some(reader) => reader,
            None => open_reader(&self.path).map_err(|error| explain(&self.path, &error))?,
        };
        let result = reader
            .transaction()
            .map_err(StoreError::from)
            .and_then(|transaction| run(&transaction))
            .map_err(|error| self.locate(error));
        let mut readers = lock(&self.readers);
        if readers.len() < IDLE_READERS {
            readers.push(reader);
        }
        result
    }

    /// Fills the path into an error that a query made without knowing it.
    fn locate(&self, error: StoreError) -> StoreError {
        match error {
            StoreError::Raw(error) => explain(&self.path, &error),
            other => other,
        }
    }
}

fn open_reader(path: &Path) -> Result<Connection, rusqlite::Error> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let reader = Connection::open_with_flags(path, flags)?;
    reader.busy_timeout(BUSY)?;
    Ok(reader)
}

fn schema_of(path: &Path, db: &Connection) -> Result<i64, StoreError> {
    db.pragma_query_value(None, "user_version", |row| row.get(0)).map_err(|error| explain(path, &error))
}

fn too_new(path: &Path, found: i64) -> StoreError {
    StoreError::TooNew { path: path.display().to_string(), found, known: schema::VERSION }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic within a transaction rolled it back: the connection behind a poisoned lock is as good as before.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Asks SQLite to check the file.
fn verdict(path: &Path, connection: &Connection, pragma: &str) -> Result<(), StoreError> {
    let found: String = connection
        .pragma_query_value(None, pragma, |row| row.get(0))
        .map_err(|error| explain(path, &error))?;
    if found == "ok" {
        Ok(())
    } else {
        Err(StoreError::Corrupt { path: path.display().to_string(), detail: found })
    }
}

/// SQLite's error as ours, with the path.
fn explain(path: &Path, error: &rusqlite::Error) -> StoreError {
    let path = path.display().to_string();
    let detail = error.to_string();
    if let rusqlite::Error::FromSqlConversionFailure(..) | rusqlite::Error::IntegralValueOutOfRange(..) =
        error
    {
        return StoreError::Unreadable { what: "row".into(), detail };
    }
    match error.sqlite_error_code() {
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => StoreError::Corrupt { path, detail },
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => StoreError::Locked { path },
        Some(ErrorCode::DiskFull) => StoreError::Full { path },
        Some(
            ErrorCode::CannotOpen
            | ErrorCode::ReadOnly
            | ErrorCode::PermissionDenied
            | ErrorCode::SystemIoFailure,
        ) => StoreError::Unusable { path, detail },
        _ => StoreError::Database { path, detail },
    }
}

/// Whether an error is a broken UNIQUE or PRIMARY KEY.
fn is_duplicate(error: &rusqlite::Error) -> bool {
    use rusqlite::ffi::{SQLITE_CONSTRAINT_PRIMARYKEY, SQLITE_CONSTRAINT_UNIQUE};
    matches!(error, rusqlite::Error::SqliteFailure(cause, _)
        if matches!(cause.extended_code, SQLITE_CONSTRAINT_PRIMARYKEY | SQLITE_CONSTRAINT_UNIQUE))
}

/// Whether an error is a reference to nothing.
fn is_missing(error: &rusqlite::Error) -> bool {
    matches!(error, rusqlite::Error::SqliteFailure(cause, _)
        if cause.extended_code == rusqlite::ffi::SQLITE_CONSTRAINT_FOREIGNKEY)
}

impl Store for SqliteStore {
    fn create_account(&self, new: &NewAccountRows) -> Result<(), StoreError> {
        self.write(|db| accounts::create(db, new))
    }
    fn accounts(&self) -> Result<Vec<Account>, StoreError> {
        self.read(accounts::all)
    }
    fn account(&self, id: &AccountId) -> Result<Option<Account>, StoreError> {
        self.read(|db| accounts::one(db, id))
    }
    fn access_key(&self, access_key_id: &str) -> Result<Option<(AccessKeyRow, Account)>, StoreError> {
        self.read(|db| accounts::key(db, access_key_id))
    }
    fn add_access_key(&self, key: &AccessKeyRow) -> Result<(), StoreError> {
        self.write(|db| accounts::add_key(db, key))
    }
    fn default_subnet(
        &self,
        account: &AccountId,
        region: &str,
        zone: &str,
        fresh: (&VpcId, &SubnetId),
    ) -> Result<SubnetRow, StoreError> {
        if let Some(row) = self.read(|db| accounts::find_subnet(db, account, region, zone))? {
            return Ok(row);
        }
        self.write(|db| accounts::default_subnet(db, account, region, zone, fresh))
    }
    fn create_key_pair(&self, row: &KeyPairRow) -> Result<(), StoreError> {
        self.write(|db| accounts::create_key_pair(db, row))
    }
    fn key_pairs(&self, account: &AccountId) -> Result<Vec<KeyPairRow>, StoreError> {
        self.read(|db| accounts::key_pairs(db, account))
    }
    fn key_pair(&self, account: &AccountId, name: &str) -> Result<Option<KeyPairRow>, StoreError> {
        self.read(|db| accounts::key_pair(db, account, name))
    }
    fn delete_key_pair(&self, account: &AccountId, name: &str) -> Result<bool, StoreError> {
        self.write(|db| accounts::delete_key_pair(db, account, name))
    }
    fn put_blob(&self, row: &BlobRow) -> Result<(), StoreError> {
        self.write(|db| images::put_blob(db, row))
    }
    fn blob(&self, id: &BlobId) -> Result<Option<BlobRow>, StoreError> {
        self.read(|db| images::blob(db, id))
    }
    fn owns_blob(&self, account: &AccountId, id: &BlobId) -> Result<bool, StoreError> {
        self.read(|db| images::owns_blob(db, account, id))
    }
    fn blob_bytes(&self, account: &AccountId) -> Result<u64, StoreError> {
        self.read(|db| images::blob_bytes(db, account))
    }
    fn release_blob(&self, account: &AccountId, id: &BlobId, at: Micros) -> Result<Released, StoreError> {
        self.write(|db| images::release_blob(db, account, id, at))
    }
    fn release_unnamed_blobs(&self, before: Micros, at: Micros) -> Result<u64, StoreError> {
        self.write(|db| images::release_unnamed_blobs(db, before, at))
    }
    fn register_image(&self, row: &ImageRow) -> Result<(), StoreError> {
        self.write(|db| images::register(db, row))
    }
    fn images(&self, account: &AccountId) -> Result<Vec<ImageRow>, StoreError> {
        self.read(|db| images::visible(db, account))
    }
    fn find_image(&self, account: &AccountId, id_or_name: &str) -> Result<Option<ImageRow>, StoreError> {
        self.read(|db| images::find(db, account, id_or_name))
    }
    fn image(&self, id: &ImageId) -> Result<Option<ImageRow>, StoreError> {
        self.read(|db| images::one(db, id))
    }
    fn deregister_image(&self, id: &ImageId, at: Micros) -> Result<bool, StoreError> {
        self.write(|db| images::deregister(db, id, at))
    }
    fn put_host(&self, facts: &HostFacts, at: Micros) -> Result<(), StoreError> {
        self.write(|db| {
            hosts::put(db, facts, at)?;
            meta::written_at(db, at)
        })
    }
    fn host_reported(
        &self,
        host: &HostId,
        boot_id: &str,
        at: Micros,
        proofs: &[(InstanceId, Micros)],
    ) -> Result<(), StoreError> {
        self.write(|db| {
            hosts::reported(db, host, boot_id, at, proofs)?;
            meta::written_at(db, at)
        })
    }
    fn hosts(&self) -> Result<Vec<HostRow>, StoreError> {
        self.read(hosts::all)
    }
    fn host(&self, id: &HostId) -> Result<Option<HostRow>, StoreError> {
        self.read(|db| hosts::one(db, id))
    }
    fn launch(&self, new: &Launch) -> Result<Launched, StoreError> {
        self.write(|db| {
            meta::written_at(db, new.reservation.created_at)?;
            launch::launch(db, new)
        })
    }
    fn client_token(
        &self,
        account: &AccountId,
        token: &str,
    ) -> Result<Option<(String, ReservationId)>, StoreError> {
        self.read(|db| launch::token(db, account, token))
    }
    fn instance(&self, id: &InstanceId) -> Result<Option<InstanceRecord>, StoreError> {
        self.read(|db| instances::one(db, id))
    }
    fn instances(&self, filter: &InstanceFilter) -> Result<Vec<InstanceRecord>, StoreError> {
        self.read(|db| instances::list(db, filter))
    }
    fn readable_instances(
        &self,
        filter: &InstanceFilter,
    ) -> Result<(Vec<InstanceRecord>, Vec<(InstanceId, StoreError)>), StoreError> {
        let all = self.read(|db| instances::each(db, filter))?;
        let mut readable = (Vec::with_capacity(all.len()), Vec::new());
        for (id, record) in all {
            match record {
                Ok(record) => readable.0.push(record),
                Err(error) => readable.1.push((id, self.locate(error))),
            }
        }
        Ok(readable)
    }

    fn commit(&self, changes: &[Change], now: Micros) -> Result<(), StoreError> {
        self.write(|db| {
            meta::written_at(db, now)?;
            changes.iter().try_for_each(|change| instances::change(db, change, now))
        })
    }
    fn lease(
        &self,
        id: &InstanceId,
        owner: &str,
        now: Micros,
        until: Micros,
    ) -> Result<Option<InstanceRecord>, StoreError> {
        self.write(|db| instances::lease(db, id, owner, now, until))
    }
    fn due(&self, now: Micros, limit: u32) -> Result<Vec<InstanceId>, StoreError> {
        self.read(|db| instances::due(db, now, limit))
    }
    fn next_due(&self) -> Result<Option<Micros>, StoreError> {
        self.read(instances::next_due)
    }
    fn claim(&self, id: &InstanceId) -> Result<Option<Claim>, StoreError> {
        self.read(|db| hosts::claim(db, id))
    }
    fn volumes(&self, account: &AccountId) -> Result<Vec<VolumeRow>, StoreError> {
        self.read(|db| instances::volumes(db, account))
    }
    fn usage_events(&self, filter: &UsageFilter) -> Result<Vec<UsageEvent>, StoreError> {
        self.read(|db| usage::events(db, filter))
    }
    fn proofs(&self) -> Result<Proofs, StoreError> {
        self.read(usage::proofs)
    }
    fn sealed(&self) -> Result<Micros, StoreError> {
        self.read(meta::sealed)
    }

    fn seal(&self, until: Micros) -> Result<(), StoreError> {
        self.write(|db| meta::seal(db, until))
    }

    fn clock_high(&self) -> Result<Micros, StoreError> {
        self.read(meta::clock_high)
    }

    fn check(&self) -> Result<(), StoreError> {
        let connection = open_reader(&self.path).map_err(|error| explain(&self.path, &error))?;
        verdict(&self.path, &connection, "integrity_check")?;
        let broken: Option<String> = usage::contradiction(&connection).map_err(|error| self.locate(error))?;
        match broken {
            None => Ok(()),
            Some(detail) => Err(StoreError::Corrupt { path: self.path.display().to_string(), detail }),
        }
    }
    fn epoch(&self) -> Result<i64, StoreError> {
        self.read(meta::epoch)
    }
    fn begin_epoch(&self, at_least: i64) -> Result<i64, StoreError> {
        self.write(|db| meta::begin_epoch(db, at_least))
    }
    fn backup(&self, to: &Path) -> Result<(), StoreError> {
        copy::copy(&self.path, to, || ())
    }
}
