//! Network namespaces with a name (a bind mount in a folder, as `ip netns` makes them) and work done inside them.

use crate::error::{Error, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use std::fs::{self, File};
use std::path::Path;

/// `f_type` of a namespace file, from linux/magic.h.
const NSFS_MAGIC: i64 = 0x6e73_6673;

/// Whether `file` is a namespace.
pub fn exists(file: &Path) -> bool {
    rustix::fs::statfs(file).is_ok_and(|stat| stat.f_type == NSFS_MAGIC)
}

/// Makes the namespace, if it is not there.
///
/// # Errors
/// No right to, or the folder cannot be written.
pub fn make(file: &Path) -> Result<()> {
    if exists(file) {
        return Ok(());
    }
    if let Some(folder) = file.parent() {
        fs::create_dir_all(folder).map_err(Error::file("create", folder))?;
    }
    File::create(file).map_err(Error::file("create", file))?;
    let target = file.to_owned();
    on_thread(move || {
        unshare(CloneFlags::CLONE_NEWNET).map_err(Error::sys("making a network namespace"))?;
        mount(Some("/proc/thread-self/ns/net"), &target, None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .map_err(|error| Error::file("mount a network namespace at", &target)(error.into()))
    })
}

/// Removes the namespace's name; the namespace goes with its last user.
///
/// # Errors
/// It is there and cannot be removed.
pub fn remove(file: &Path) -> Result<()> {
    while exists(file) {
        umount2(file, MntFlags::MNT_DETACH).map_err(|error| Error::file("unmount", file)(error.into()))?;
    }
    crate::durable::remove_file(file)
}

/// Does `work` on a thread inside the namespace. Sockets that it opens and programs that it starts belong there.
///
/// # Errors
/// There is no such namespace, or what `work` gave.
pub fn enter<T: Send + 'static>(file: &Path, work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    if !exists(file) {
        return Err(Error::NotNow(format!("{} is no network namespace", file.display())));
    }
    let namespace = File::open(file).map_err(Error::file("open", file))?;
    on_thread(move || {
        setns(&namespace, CloneFlags::CLONE_NEWNET).map_err(Error::sys("entering a network namespace"))?;
        drop(namespace);
        work()
    })
}

/// A namespace belongs to a thread: each piece of work gets one of its own, so that no other work is moved.
fn on_thread<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    std::thread::Builder::new()
        .name("netns".into())
        .spawn(work)
        .map_err(Error::io("starting a thread"))?
        .join()
        .unwrap_or_else(|_| Err(Error::NotNow("work in a network namespace panicked".into())))
}
