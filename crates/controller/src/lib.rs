//! The controller: the only writer of truth. It answers users and agents, places instances, moves them through
//! their lives, and bills what ran.
//!
//! ```text
//! server/   two TLS listeners: api.rs (users, SigV4) and ../agents.rs (agents, client certificates)
//!   │         auth/     signatures, sealed secrets        blobs.rs    uploaded files
//!   │         actions/  the table of actions              streams.rs  consoles and tunnels
//!   ▼
//! engine/, lifecycle/   what happens to instances: accepted, placed, run, billed
//!   ▼
//! roost_store           the database
//!
//! config.rs  the state directory      setup.rs    init, agent-identity      tls.rs  certificates
//! serve.rs   puts it all together     offline.rs  usage log and bills without a running controller
//! backup.rs  backup and restore of the state directory
//! ```

// `println!` and `eprintln!` panic on a closed output, and a panic has no exit code of ours.
#![deny(clippy::print_stderr, clippy::print_stdout)]
#![forbid(unsafe_code)]

pub mod actions;
pub mod agents;
pub mod auth;
pub mod backup;
pub mod blobs;
pub mod config;
pub mod engine;
pub mod lifecycle;
pub mod offline;
pub mod serve;
pub mod server;
pub mod setup;
pub mod streams;
pub mod tls;
