//! What a vsock device is configured with.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Context ids below are the hypervisor's, this machine's own, and the host's (virtio 1.2, 5.10.4).
const FIRST_CID: u64 = 3;
/// The one above is "any".
const LAST_CID: u64 = 0xffff_fffe;
/// Longest name of a socket: what an address of a unix socket holds, less `_`, a port and the NUL.
const MAX_NAME: usize = 108 - 12;

/// A vsock device: connections between guest and host without a network, each a unix socket on the host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// A name that some clients give; of no consequence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_id: Option<String>,
    /// The guest's context id.
    pub guest_cid: u64,
    /// `FOLDER/NAME`: the socket that host programs connect to, in a handed folder or a path. Programs that guests connect to
    /// listen on `NAME_PORT` beside it.
    pub uds_path: String,
}

impl VsockConfig {
    /// Checks the fields.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn check(&self) -> Result<()> {
        if !(FIRST_CID..=LAST_CID).contains(&self.guest_cid) {
            return Err(Error::Config(format!(
                "vsock: guest_cid {} is outside {FIRST_CID}–{LAST_CID}",
                self.guest_cid
            )));
        }
        let (folder, name) = self.place();
        if folder.is_empty()
            || name.len() > MAX_NAME
            || matches!(name, "" | "." | "..")
            || name.contains('\0')
        {
            return Err(Error::Config(format!(
                "vsock: uds_path {:?} does not end in a name of 1–{MAX_NAME} bytes",
                self.uds_path
            )));
        }
        Ok(())
    }

    /// The folder and the socket's name in it.
    #[must_use]
    pub fn place(&self) -> (&str, &str) {
        match self.uds_path.rsplit_once('/') {
            Some(("", name)) => ("/", name),
            Some(place) => place,
            None => (".", &self.uds_path),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(guest_cid: u64, uds_path: &str) -> VsockConfig {
        VsockConfig { vsock_id: None, guest_cid, uds_path: uds_path.into() }
    }

    #[test]
    fn a_path_is_a_folder_and_a_name() {
        for (path, folder, name) in [
            ("v.sock", ".", "v.sock"),
            ("./v.sock", ".", "v.sock"),
            ("sockets/v", "sockets", "v"),
            ("/run/a b/v", "/run/a b", "v"),
            ("/v", "/", "v"),
        ] {
            assert_eq!(at(3, path).place(), (folder, name));
            at(3, path).check().unwrap();
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_its_field() {
        let long = "a".repeat(MAX_NAME + 1);
        for path in ["", "run/", "run/..", ".", "a\0b", long.as_str()] {
            assert!(at(3, path).check().unwrap_err().to_string().contains("uds_path"), "{path:?}");
        }
        at(3, &long[1..]).check().unwrap();
        at(LAST_CID, "v").check().unwrap();
        for cid in [0, 1, 2, LAST_CID + 1, u64::MAX] {
            let why = at(cid, "v").check().unwrap_err().to_string();
            assert!(why.contains(&format!("guest_cid {cid} is outside 3–4294967294")), "{why}");
        }
    }
}
