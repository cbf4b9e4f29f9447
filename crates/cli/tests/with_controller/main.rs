//! The command against the real controller, a process of its own on ports of its own. Hosts are simulated agents
//! that speak the real protocol over mTLS.

#![allow(clippy::unwrap_used, reason = "a failing test is what an unwrap is for here")]

mod agent;
mod stack;

mod access;
mod images;
mod lifecycle;
mod mistakes;
mod reports;
mod streams;
