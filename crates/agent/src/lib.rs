//! The host agent: root, one per host. It makes the host match what the controller wants of it, and reports what
//! it sees.
//!
//! A walk through the room, from what is decided to what is done:
//!
//! | module | what it holds |
//! |---|---|
//! | [`agent`] | which instances there are; `ensure` in, report out |
//! | [`task`] | one task per instance: look, plan, do one thing, again |
//! | [`plan`] | what to do next: pure |
//! | [`record`] | what is remembered durably; the refusal rules |
//! | [`host`] | the seam: everything the reconciler wants of a host |
//! | [`scan`] | what a guest says of itself on its console |
//! | [`net`] | the network of an instance |
//! | [`cgroup`] | families, instances, limits read back |
//! | [`storage`] | images fetched once, volumes on them |
//! | [`disk`] | its free space, and what is kept of it |
//! | [`unpack`] | images are unpacked in a process without privilege |
//! | [`jail`], [`monitor`] | how a monitor comes to life, and what is known of it |
//! | [`outputs`], [`users`] | the files that a monitor writes, within bounds; the user ids that monitors have |
//! | [`real`], [`facts`] | the host as it is, and what it can hold |
//! | [`leftovers`] | what is still there of an instance |
//! | [`controller`], [`connection`], [`streams`] | the conversation with the controller |
//! | [`trouble`] | what is wrong with the host itself, for its owner |
//! | [`names`], [`clock`], [`durable`], [`error`] | the ground |

// `println!` and `eprintln!` panic on a closed output, and a panic has no exit code of ours.
#![deny(clippy::print_stderr, clippy::print_stdout)]

pub mod agent;
pub mod cgroup;
pub mod clock;
pub mod connection;
pub mod controller;
pub mod disk;
pub mod durable;
pub mod error;
pub mod facts;
pub mod host;
pub mod jail;
pub mod leftovers;
pub mod monitor;
pub mod names;
pub mod net;
pub mod outputs;
pub mod plan;
pub mod real;
pub mod record;
pub mod scan;
pub mod storage;
pub mod streams;
pub mod task;
#[doc(hidden)]
pub mod testing;
pub mod trouble;
pub mod unpack;
pub mod users;

pub use error::{Error, Result};
