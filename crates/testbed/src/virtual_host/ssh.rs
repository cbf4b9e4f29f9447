//! Commands inside, over ssh to the forwarded port.

use super::identity::user_key;
use super::seat::Seat;
use super::{Error, Result};
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// Puts together an `ssh` command for the virtual host of this seat. Nobody's own ssh configuration matters, and
/// the host must show the key that was made for it.
pub(super) fn command(seat: &Seat, port: u16) -> Result<Command> {
    let mut ssh = Command::new("ssh");
    ssh.args(["-F", "none", "-p", &port.to_string(), "-i"]).arg(user_key()?);
    for option in [
        "IdentitiesOnly=yes",
        "BatchMode=yes",
        "StrictHostKeyChecking=yes",
        "HostKeyAlias=roost-virtual-host",
        "ConnectTimeout=15",
        "ServerAliveInterval=15",
        "ServerAliveCountMax=8",
        "LogLevel=ERROR",
    ] {
        ssh.args(["-o", option]);
    }
    // One connection for many commands: a handshake is half a second of an emulated CPU. It ends with the host, or
    // when nobody has used it for a while. A socket's path has at most 107 bytes, and ssh adds 17 while it makes it.
    let socket = seat.file("ssh").display().to_string();
    if socket.len() < 90 && !socket.contains(['%', ' ', '"']) {
        ssh.args(["-o", "ControlMaster=auto", "-o", "ControlPersist=30", "-o"]);
        ssh.arg(format!("ControlPath={socket}"));
    }
    // ssh reads quotes and tokens in this value.
    let known = seat.file("known_hosts").display().to_string().replace('%', "%%");
    ssh.arg("-o").arg(format!("UserKnownHostsFile=\"{known}\""));
    ssh.args(["-l", "root", "127.0.0.1"]);
    Ok(ssh)
}

/// Runs a shell command to its end and collects what it says.
pub(super) fn output(seat: &Seat, port: u16, script: &str) -> Result<Output> {
    command(seat, port)?
        .arg(script)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| Error::program("ssh", error.to_string()))
}

/// Copies files and folders (by their own names) into a folder inside, which is made when missing.
pub(super) fn copy_in(seat: &Seat, port: u16, sources: &[impl AsRef<Path>], target: &str) -> Result<()> {
    let mut tar = Command::new("tar");
    tar.args(["--sparse", "-cf", "-"]);
    for source in sources {
        let source = source.as_ref();
        let absolute = source.canonicalize().map_err(Error::file("cannot read", source))?;
        let (Some(folder), Some(name)) = (absolute.parent(), absolute.file_name()) else {
            return Err(Error::program("tar", format!("cannot copy {}", source.display())));
        };
        tar.arg("-C").arg(folder).arg(name);
    }
    let mut packer = tar
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| Error::program("tar", error.to_string()))?;
    let pipe = packer.stdout.take().map_or_else(Stdio::null, Stdio::from);
    // tar replaces a file by a new one, so a program that runs keeps its own.
    let folder = quoted(target);
    let unpacked = command(seat, port)?
        .arg(format!("mkdir -p {folder} && tar -C {folder} --no-same-owner -xf -"))
        .stdin(pipe)
        .output()
        .map_err(|error| Error::program("ssh", error.to_string()))?;
    let packed = packer.wait().map_err(|error| Error::program("tar", error.to_string()))?;
    if packed.success() && unpacked.status.success() {
        Ok(())
    } else {
        Err(Error::program("copying files in", String::from_utf8_lossy(&unpacked.stderr).trim().to_owned()))
    }
}

/// One word for a POSIX shell.
pub(super) fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::quoted;

    #[test]
    fn a_quoted_word_is_one_word() {
        assert_eq!(quoted("a b"), "'a b'");
        assert_eq!(quoted("it's"), "'it'\\''s'");
    }
}
