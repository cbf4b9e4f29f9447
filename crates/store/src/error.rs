//! How an operation on the store fails.

use roost_types::{HostId, InstanceId};

/// Why the store did not do what was asked. Nothing was written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file is no database, or a damaged one.
    #[error(
        "the database {path} is damaged ({detail}): restore it from a backup, or move it away to begin anew"
    )]
    Corrupt {
        /// The database file.
        path: String,
        /// What SQLite says of it.
        detail: String,
    },
    /// Another process holds it for longer than the time that we wait.
    #[error("the database {path} is locked by another process: is a second controller running on it?")]
    Locked {
        /// The database file.
        path: String,
    },
    /// There is no room on its disk. What was committed before is safe, and it goes on once there is room.
    #[error("the disk of the database {path} is full: free some space")]
    Full {
        /// The database file.
        path: String,
    },
    /// The file cannot be opened or written.
    #[error("cannot use the database {path}: {detail}")]
    Unusable {
        /// The database file.
        path: String,
        /// Why.
        detail: String,
    },
    /// It was written by a newer program.
    #[error("the database {path} has schema {found}, this program knows schemas up to {known}: upgrade it")]
    TooNew {
        /// The database file.
        path: String,
        /// Schema number in the file.
        found: i64,
        /// Newest schema number that this program knows.
        known: i64,
    },
    /// A database of an older program that was opened read-only.
    #[error(
        "the database {path} has schema {found}, this program reads schema {known}: start this release's \
         controller on it once, or use the program of the release that runs on it"
    )]
    TooOld {
        /// The database file.
        path: String,
        /// Schema number of the file.
        found: i64,
        /// The only schema number that this program reads.
        known: i64,
    },
    /// Somebody changed the instance since it was read: read it again and decide again.
    #[error("instance {0} changed meanwhile")]
    Stale(InstanceId),
    /// The host has less room than the claims together take.
    #[error("host {host} has no room: {what} were claimed beyond what is free")]
    NoRoom {
        /// The host.
        host: HostId,
        /// The claim that did not fit, such as `8 GiB of disk`.
        what: String,
    },
    /// Every address is taken.
    #[error("no free address is left in {0}")]
    NoAddress(String),
    /// Something of that name or id exists.
    #[error("{what} {value:?} exists already")]
    Duplicate {
        /// What, such as `account name`.
        what: &'static str,
        /// Its value.
        value: String,
    },
    /// Something that the operation refers to does not exist.
    #[error("no {what} {value:?}")]
    Missing {
        /// What, such as `host`.
        what: &'static str,
        /// Its value.
        value: String,
    },
    /// A usage event that contradicts the log: a second open interval, or the end of none.
    #[error("usage log of {resource}: {detail}")]
    Usage {
        /// The resource.
        resource: String,
        /// What contradicts.
        detail: String,
    },
    /// A row that this program cannot read.
    #[error("unreadable {what} in the database: {detail}")]
    Unreadable {
        /// The column or row.
        what: String,
        /// Why.
        detail: String,
    },
    /// What SQLite reported to a query; the store adds the path before anybody sees it.
    #[doc(hidden)]
    #[error(transparent)]
    Raw(#[from] rusqlite::Error),
    /// Anything else that the database reports.
    #[error("database {path}: {detail}")]
    Database {
        /// The database file.
        path: String,
        /// What SQLite says.
        detail: String,
    },
}
