//! The virtual host: a small Debian in QEMU whose emulated CPU has SVM, so that KVM is real inside it.
//!
//! End-to-end tests run there, and so does everything on a box without usable KVM. `scripts/virtual-host` is
//! the command; [`VirtualHost`] is the same for tests. Why it is built the way it is:
//! `docs/decisions/0002-virtual-host.md`.

#![forbid(unsafe_code)]

#[cfg(feature = "sim")]
pub mod sim;
mod virtual_host;

pub use virtual_host::{
    Accelerator, Data, Error, HostOptions, Result, Share, VirtualHost, choose_accelerator, repository_root,
    workspace_shares,
};
