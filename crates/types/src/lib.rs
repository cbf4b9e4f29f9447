//! What every room of Roost says to every other: ids, states and their transition tables, instance types,
//! sizes, money as integers, and the wire types of both APIs (CLI ↔ controller ↔ agent).
//!
//! This crate does nothing: no I/O, no clock, no randomness. Ids are made from bytes that are passed in, times
//! are passed in, and every type here can be built in a test in one line.

#![forbid(unsafe_code)]

pub mod agent;
pub mod api;
pub mod contents;
pub mod error;
pub mod forward;
pub mod ids;
pub mod instance_type;
pub mod metering;
pub mod money;
pub mod name;
pub mod state;
pub mod time;
pub mod user_data;

pub use error::{ApiError, ErrorCode};
pub use ids::*;
pub use instance_type::InstanceType;
pub use money::{Currency, Money, Rate};
pub use state::{DesiredState, InstanceState, Step};
pub use time::Micros;
pub use user_data::UserDataForm;
