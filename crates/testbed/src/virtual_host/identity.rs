//! Who speaks to whom: the user's key, the virtual host's key (made outside, so that it is known before the
//! first connection), its name and its list of shares, as a bare tar on a disk of its own.

use super::process::run;
use super::seat::{Seat, private_dir, state_dir};
use super::{Error, Result, Share};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The user's private key for every virtual host of theirs.
pub(super) fn user_key() -> Result<PathBuf> {
    let dir = state_dir().join("virtual-hosts");
    private_dir(&dir)?;
    make_key(&dir.join(".id_ed25519"), "roost virtual host user")
}

fn make_key(path: &Path, comment: &str) -> Result<PathBuf> {
    if !path.exists() {
        // Made aside and linked into place: of two makers one wins, and both use the winner's.
        let new = path.with_extension(format!("new-{}", std::process::id()));
        run(Command::new("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-C", comment, "-f"])
            .arg(&new))?;
        let public = |key: &Path| PathBuf::from(format!("{}.pub", key.display()));
        if fs::hard_link(&new, path).is_ok() {
            fs::rename(public(&new), public(path)).map_err(Error::file("cannot write", path))?;
        }
        let _ = fs::remove_file(public(&new));
        fs::remove_file(&new).map_err(Error::file("cannot remove", &new))?;
    }
    Ok(path.to_owned())
}

/// Writes the identity disk and the file of known hosts into the seat.
pub(super) fn make_identity(seat: &Seat, name: &str, shares: &[Share]) -> Result<()> {
    let user = user_key()?;
    let host = make_key(&seat.file("ssh_host_ed25519_key"), name)?;
    let read = |key: &Path| {
        let path = PathBuf::from(format!("{}.pub", key.display()));
        // The winner of a race may be about to write it.
        super::process::wait_for_file(&path)?;
        fs::read_to_string(&path).map_err(Error::file("cannot read", &path))
    };
    let put = |file: &str, text: String| {
        let path = seat.file(file);
        fs::write(&path, text).map_err(Error::file("cannot write", &path))
    };
    put("known_hosts", format!("roost-virtual-host {}", read(&host)?))?;
    put("authorized_keys", read(&user)?)?;
    put("name", format!("{name}\n"))?;
    put(
        "shares",
        shares.iter().enumerate().map(|(i, share)| format!("share{i} {}\n", share.name)).collect(),
    )?;
    let disk = seat.file("identity.img");
    run(Command::new("tar")
        .args(["--owner=0", "--group=0", "--numeric-owner", "-C"])
        .arg(&seat.dir)
        .arg("-cf")
        .arg(&disk)
        .args(["ssh_host_ed25519_key", "authorized_keys", "name", "shares"]))?;
    Ok(())
}
