//! `roost`: the command line of Roost. It shares only `roost-types` with the controller and speaks to it over the
//! same signed API that anyone may use.
//!
//! ```text
//! args ──→ commands ──→ client (sign, TLS, upgrade) ──→ controller
//!              │
//!              ├── output    tables, JSON, progress, exit codes
//!              ├── harmless  what a guest or another tenant wrote, made safe to print
//!              └── doctor    runs without a controller
//! ```

#![forbid(unsafe_code)]
// `println!` and `eprintln!` panic on a closed output, and a panic has no exit code of ours.
#![deny(clippy::print_stderr, clippy::print_stdout)]

mod args;
mod blob;
mod client;
mod commands;
mod config;
mod context;
mod doctor;
mod error;
mod exit;
mod harmless;
mod output;
mod parse;
mod progress;
mod resolve;
mod run;
#[cfg(test)]
mod sentences;
mod stderr;
mod terminal;
mod wait;

pub use run::main;
