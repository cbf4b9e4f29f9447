//! The one [`Store`] trait and SQLite behind it: the controller's memory, and the only one.
//!
//! ```text
//! engine, front ── Store (domain operations, each one transaction) ── SqliteStore ── database file
//!                        └── conformance: what every Store must do, as functions over a factory
//! ```
//! A change of state, its capacity claim and its billing event are one [`Change`] and one transaction: see
//! [`Store::commit`]. Nothing outside this crate can tear them apart.

#![forbid(unsafe_code)]

pub mod conformance;
mod error;
mod rows;
mod sqlite;
mod traits;

pub use error::StoreError;
pub use rows::*;
pub use sqlite::SqliteStore;
pub use traits::Store;
