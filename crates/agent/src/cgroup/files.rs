//! The files and folders of a cgroup v2 mount.

use crate::error::{Error, Result};
use nix::libc;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long the kernel may take to clear a killed cgroup.
pub const CLEARING: Duration = Duration::from_secs(10);

/// A whole file.
pub fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(Error::file("read", path))
}

/// A folder, which may be there.
pub fn make(path: &Path) -> Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            Err(Error::file("create", path)(error))
        }
        _ => Ok(()),
    }
}

/// Passes controllers down to the children, and reads back that they are.
pub fn enable(path: &Path, controllers: &[&str]) -> Result<()> {
    let file = path.join("cgroup.subtree_control");
    let has = || read(&file).map(|text| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>());
    let missing: Vec<&str> = {
        let have = has()?;
        controllers.iter().copied().filter(|name| !have.iter().any(|h| h == name)).collect()
    };
    for name in missing {
        fs::write(&file, format!("+{name}")).map_err(|error| {
            Error::Impossible(format!(
                "the cgroup controller {name:?} cannot be enabled in {}: {error}; available there: {}",
                file.display(),
                fs::read_to_string(path.join("cgroup.controllers")).unwrap_or_default().trim()
            ))
        })?;
    }
    let have = has()?;
    match controllers.iter().find(|name| !have.iter().any(|h| h == *name)) {
        None => Ok(()),
        Some(name) => {
            Err(Error::Impossible(format!("the cgroup controller {name:?} is not in {}", file.display())))
        }
    }
}

/// A cgroup and those below it; its processes have been told to go.
pub fn remove_tree(path: &Path) -> Result<()> {
    if let Ok(children) = fs::read_dir(path) {
        for child in children.flatten().filter(|child| child.path().is_dir()) {
            remove_tree(&child.path())?;
        }
    }
    let deadline = Instant::now() + CLEARING;
    loop {
        match fs::remove_dir(path) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            // A zombie counts until its parent has seen it.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(error) => return Err(Error::file("remove", path)(error)),
        }
    }
}

/// `f_type` of a cgroup2 mount, from linux/magic.h.
pub fn is_cgroup2(path: &Path) -> bool {
    rustix::fs::statfs(path).is_ok_and(|stat| stat.f_type == 0x6367_7270)
}

/// A number of a flat-keyed file such as `cpu.stat`.
pub fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
}
