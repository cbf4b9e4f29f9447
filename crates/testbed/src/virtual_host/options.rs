//! What a caller may choose.

use super::{Accelerator, Error, Result, Share};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What becomes of `/var/lib/roost` when the virtual host ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Data {
    /// It goes away.
    ThrowAway,
    /// It stays for the next start under the same name, and so does what was changed below `/etc`.
    Kept,
}

/// How to start a virtual host.
#[derive(Debug, Clone)]
pub struct HostOptions {
    /// Its name: several run side by side under different ones.
    pub name: String,
    /// Virtual CPUs, 1 or more.
    pub cpus: u32,
    /// Features of a CPU, by QEMU's names, that these do not have: an older host, to move guests to.
    pub lacks: Vec<String>,
    /// Memory in MiB, 1024 or more.
    pub memory_mib: u32,
    /// Capacity of the data disk in GiB (a sparse file).
    pub data_gib: u32,
    /// What becomes of the data disk.
    pub data: Data,
    /// What is put below `/opt/roost`.
    pub shares: Vec<Share>,
    /// Host ports that reach the same port inside, beside ssh: (outside, or the next free one; inside).
    pub forwards: Vec<(Option<u16>, u16)>,
    /// How its CPUs are made; `None` looks at the machine.
    pub accelerator: Option<Accelerator>,
    /// How long the start may take, once the image is built.
    pub ready_within: Duration,
}

/// The controller's API port, the same on both sides when it is free.
pub(super) const API_PORT: u16 = 7443;

impl Default for HostOptions {
    fn default() -> Self {
        Self {
            name: "main".to_owned(),
            cpus: 2,
            lacks: Vec::new(),
            memory_mib: 6144,
            data_gib: 40,
            data: Data::ThrowAway,
            shares: Vec::new(),
            forwards: vec![(Some(API_PORT), API_PORT)],
            accelerator: None,
            ready_within: Duration::from_secs(180),
        }
    }
}

/// The name becomes a folder, a host name and part of process arguments.
pub(super) fn check_name(name: &str) -> Result<()> {
    let fits = (1..=40).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
        && name.as_bytes()[0].is_ascii_alphanumeric();
    if fits { Ok(()) } else { Err(Error::BadName(name.to_owned())) }
}

/// The checkout that this program was built from, or the one that `ROOST_ROOT` names.
#[must_use]
pub fn repository_root() -> PathBuf {
    std::env::var_os("ROOST_ROOT")
        .filter(|folder| !folder.is_empty())
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../.."), PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::check_name;

    #[test]
    fn a_name_is_a_plain_word() {
        for good in ["main", "test-123", "a_b", "7"] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        let long = "a".repeat(41);
        for bad in ["", "-x", "../etc", "a b", "a/b", "ä", long.as_str()] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }
}
