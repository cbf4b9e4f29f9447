//! The controller as its clients see it: a real server over real TLS, requests signed by an independent signer.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod auth;
mod backup;
mod bills;
mod blobs;
mod errors;
mod harness;
mod limits;
mod metadata;
mod program;
mod sigv4_oracle;
mod streams;
