//! The monitor: one process per instance.
//!
//! A walk through the room, from the outside in:
//!
//! | module | what it holds |
//! |---|---|
//! | [`config`], [`console`], [`status`], [`exit`], [`client`], [`cli`] | what the agent shares with the monitor |
//! | [`descriptors`], [`opener`], [`stand_alone`] | names → open descriptors; the only places that open a path |
//! | [`preboot`], [`running`] | the two controllers: what may be asked before and after the start |
//! | [`jail`] | how a monitor comes to run without root, in an empty root |
//! | [`api`] | HTTP on a unix socket, in the shape of Firecracker's published API |
//! | [`vm`], [`vcpu`], [`memory`], [`ranges`], [`layout`], [`cpu`] | KVM: the machine |
//! | [`boot`], [`acpi`], [`mp_table`], [`smbios`], [`vmclock`] | what the guest finds in its memory when it starts |
//! | [`snapshot`] | a paused machine as two files, and machines that go on from them |
//! | [`page_server`] | a program beside the monitors, which brings the memory of such machines |
//! | [`bus`], [`devices`], [`event_loop`] | what the guest finds at its ports and registers |
//! | [`log`], [`metrics`] | what the monitor says about itself |
//! | [`seccomp`], [`sigbus`], [`threads`], [`heap`] | the lock-down, and what a process has |
//! | [`probe`] | the probe guest behind `roost doctor` |

// `println!` and `eprintln!` panic on a closed output, and a panic has no exit code of ours.
#![deny(clippy::print_stderr, clippy::print_stdout)]
// Tests build bytes out of numbers whose size they know.
#![cfg_attr(test, allow(clippy::cast_possible_truncation))]

pub mod acpi;
pub mod api;
pub mod boot;
pub mod bus;
pub mod cli;
pub mod client;
pub mod config;
pub mod console;
pub mod cpu;
pub mod descriptors;
pub mod devices;
mod error;
pub mod event_loop;
pub mod exit;
pub mod heap;
pub mod jail;
pub mod layout;
pub mod log;
pub mod memory;
pub mod metrics;
pub mod mp_table;
pub mod opener;
pub mod page_server;
pub mod preboot;
pub mod probe;
pub mod ranges;
pub mod running;
pub mod seccomp;
pub mod sigbus;
pub mod smbios;
pub mod snapshot;
pub mod stand_alone;
pub mod status;
pub mod threads;
pub mod vcpu;
pub mod vm;
pub mod vmclock;

pub use error::{Error, Result};
