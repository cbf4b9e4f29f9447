//! Names → open descriptors. This is the only place of the monitor that opens a path, and it refuses to once the
//! process is locked down (the system-call filters refuse it too). Descriptors may still be handed over then, and a process of its
//! own may open paths ([`crate::opener`]).

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::{Error, Result};
use crate::opener::Opener;

/// Most descriptors with a name.
pub const MAX_HANDED: usize = 256;

/// The descriptors handed over, by name. Clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Descriptors {
    handed: Arc<Mutex<BTreeMap<String, OwnedFd>>>,
    /// Opened by path before the lock, and kept for a second look.
    kept: Arc<Mutex<BTreeMap<(String, Access), File>>>,
    locked: Arc<AtomicBool>,
    opener: Option<Opener>,
}

impl Descriptors {
    /// Takes over the descriptors of `--fd NAME=N` options.
    ///
    /// # Errors
    /// [`Error::Config`] when the text has another form, a name or a number is there twice, or the number is not an
    /// open descriptor.
    pub fn from_options(options: &[String]) -> Result<Self> {
        let this = Self::default();
        let mut numbers = std::collections::BTreeSet::new();
        for option in options {
            let parsed = option.rsplit_once('=').and_then(|(name, n)| Some((name, n.parse::<RawFd>().ok()?)));
            let Some((name, number)) = parsed.filter(|(name, number)| !name.is_empty() && *number > 2) else {
                return Err(Error::Config(format!(
                    "--fd {option:?} is not of the form NAME=N with N above 2"
                )));
            };
            if !numbers.insert(number) || this.has(name) {
                return Err(Error::Config(format!("--fd {option:?}: that name or number is there twice")));
            }
            this.insert(name, take(number, "--fd")?)?;
        }
        Ok(this)
    }

    /// With a process that opens paths after lock-down.
    #[must_use]
    pub fn with(self, opener: Option<Opener>) -> Self {
        Self { opener, ..self }
    }

    fn names(&self) -> MutexGuard<'_, BTreeMap<String, OwnedFd>> {
        self.handed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds one descriptor under a name, in place of what had it.
    ///
    /// # Errors
    /// [`Error::State`] when there are too many.
    pub fn insert(&self, name: impl Into<String>, descriptor: impl Into<OwnedFd>) -> Result<()> {
        let (mut names, name) = (self.names(), name.into());
        if names.len() >= MAX_HANDED && !names.contains_key(&name) {
            return Err(Error::State(format!(
                "descriptors: there are {MAX_HANDED}, which is all there can be"
            )));
        }
        names.insert(name, descriptor.into());
        Ok(())
    }

    /// Gives up all of them, with their names.
    #[must_use]
    pub fn take_all(&self) -> Vec<(String, OwnedFd)> {
        std::mem::take(&mut *self.names()).into_iter().collect()
    }

    /// From here on no path is opened: the process is locked down.
    pub fn lock(&self) {
        self.locked.store(true, Ordering::SeqCst);
    }

    /// Whether the name was handed over.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.names().contains_key(name)
    }

    /// A duplicate of a handed descriptor, so that the same file may serve twice (a base below two overlays).
    ///
    /// # Errors
    /// [`Error::NotHanded`], [`Error::Io`].
    pub fn handed(&self, name: &str, what: &'static str) -> Result<OwnedFd> {
        let names = self.names();
        let descriptor = names.get(name).ok_or_else(|| Error::NotHanded { what, name: name.to_owned() })?;
        descriptor.try_clone().map_err(Error::io(format!("duplicating the descriptor {name:?}")))
    }

    /// The file of this name: a handed descriptor, or the path of that name opened as asked.
    ///
    /// # Errors
    /// [`Error::Open`] with what was tried, [`Error::NotHanded`] after [`Descriptors::lock`].
    pub fn file(&self, name: &str, what: &'static str, access: Access) -> Result<File> {
        if self.has(name) {
            return Ok(File::from(self.handed(name, what)?));
        }
        let opened = match (self.locked.load(Ordering::SeqCst), &self.opener) {
            (false, _) => access.options().open(name),
            (true, Some(opener)) => opener.open(name, access),
            (true, None) => return Err(Error::NotHanded { what, name: name.to_owned() }),
        };
        opened.map_err(|source| Error::Open { what, path: name.into(), source })
    }

    /// The same for a file that may be asked for again after the lock: what was opened by path is kept until the end.
    ///
    /// # Errors
    /// As [`Descriptors::file`], [`Error::Io`].
    pub fn file_to_keep(&self, name: &str, what: &'static str, access: Access) -> Result<File> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let duplicate = |file: &File| file.try_clone().map_err(Error::io(format!("duplicating {name:?}")));
        if self.has(name) {
            return self.file(name, what, access);
        }
        let key = (name.to_owned(), access);
        if let Some(file) = kept.get(&key) {
            return duplicate(file);
        }
        let file = self.file(name, what, access)?;
        if !self.locked.load(Ordering::SeqCst) {
            kept.insert(key, duplicate(&file)?);
        }
        Ok(file)
    }

    /// The file or pipe of this name, for output that never waits for who reads it. Of a handed descriptor that is so from here on for
    /// all that share it (`O_NONBLOCK`).
    ///
    /// # Errors
    /// As [`Descriptors::file`], [`Error::Config`] for a descriptor that cannot be written.
    pub fn output(&self, name: &str, what: &'static str) -> Result<File> {
        let file = self.file(name, what, Access::Output)?;
        // SAFETY: F_GETFL only reads an open descriptor's flags.
        let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
        if flags < 0 || flags & libc::O_ACCMODE == libc::O_RDONLY {
            return Err(Error::Config(format!("{what}: the descriptor {name:?} cannot be written")));
        }
        // SAFETY: sets flags of an open descriptor.
        let set = || unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) };
        if flags & libc::O_NONBLOCK == 0 && set() < 0 {
            return Err(Error::io(format!("{what} {name:?}"))(std::io::Error::last_os_error()));
        }
        Ok(file)
    }

    /// The unix socket of this name, connected: a handed descriptor that is, or the path of that name.
    ///
    /// # Errors
    /// [`Error::Open`]: nobody listens.
    pub fn stream(&self, name: &str, what: &'static str) -> Result<UnixStream> {
        if self.has(name) {
            return self.handed(name, what).map(UnixStream::from);
        }
        UnixStream::connect(name).map_err(|source| Error::Open { what, path: name.into(), source })
    }

    /// The folder of this name: a handed descriptor, or the path of that name.
    ///
    /// # Errors
    /// [`Error::Open`], also for what is no folder.
    pub fn folder(&self, name: &str, what: &'static str) -> Result<OwnedFd> {
        if self.has(name) {
            return self.handed(name, what);
        }
        let path = PathBuf::from(name);
        let opened = OpenOptions::new().read(true).custom_flags(FOLDER).open(&path);
        opened.map(OwnedFd::from).map_err(|source| Error::Open { what, path, source })
    }
}

/// Flags of a descriptor that only stands for a folder.
const FOLDER: i32 = libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC;

/// How a path is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Access {
    /// Read only.
    Read,
    /// Read and write an existing file.
    ReadWrite,
    /// Read and write, made if missing.
    CreateReadWrite,
    /// Append, made if missing.
    Append,
    /// Append without waiting, made if missing; a named pipe needs no reader (it is opened for reading, too).
    Output,
}

impl Access {
    const ALL: [Self; 5] = [Self::Read, Self::ReadWrite, Self::CreateReadWrite, Self::Append, Self::Output];

    /// The way of this number, as it goes between processes.
    #[must_use]
    pub fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|access| *access as u8 == number)
    }

    /// How the standard library says it.
    #[must_use]
    pub fn options(self) -> OpenOptions {
        let mut options = OpenOptions::new();
        match self {
            Self::Read => options.read(true),
            Self::ReadWrite => options.read(true).write(true),
            Self::CreateReadWrite => options.read(true).write(true).create(true).truncate(false),
            Self::Append => options.append(true).create(true),
            Self::Output => options.read(true).append(true).create(true).custom_flags(libc::O_NONBLOCK),
        };
        options
    }
}

/// Takes over an inherited descriptor by its number.
///
/// # Errors
/// [`Error::Config`] if nothing is open there.
pub fn take(number: RawFd, what: &str) -> Result<OwnedFd> {
    // SAFETY: fcntl on any number is harmless; it says whether a descriptor is open there.
    let flags = unsafe { libc::fcntl(number, libc::F_GETFD) };
    if number < 0 || flags < 0 {
        return Err(Error::Config(format!("{what}: descriptor {number} is not open")));
    }
    // SAFETY: the descriptor is open, and the command line gives it to us; each number is taken once.
    let descriptor = unsafe { OwnedFd::from_raw_fd(number) };
    // SAFETY: as above; keeps it from programs that we never start.
    unsafe { libc::fcntl(number, libc::F_SETFD, flags | libc::FD_CLOEXEC) };
    Ok(descriptor)
}

/// A duplicate of stdin (0) or stdout (1).
///
/// # Errors
/// It is closed.
pub fn take_standard(number: RawFd) -> std::io::Result<OwnedFd> {
    // SAFETY: fcntl on any number is harmless.
    let duplicate = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) };
    if duplicate < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: fcntl just made this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(duplicate) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::IntoRawFd;

    #[test]
    fn options_are_checked() {
        for bad in ["", "a", "a=", "=7", "a=x", "a=1", "a=987654"] {
            assert!(Descriptors::from_options(&[bad.to_owned()]).is_err(), "{bad:?}");
        }
        let number = File::open("/dev/null").unwrap().into_raw_fd();
        let descriptors = Descriptors::from_options(&[format!("kernel={number}")]).unwrap();
        assert!(descriptors.has("kernel"));
        assert!(descriptors.handed("kernel", "kernel").is_ok());
        assert!(descriptors.handed("initrd", "initrd").is_err());
        // A name may be a path, and a path may hold anything.
        let number = File::open("/dev/null").unwrap().into_raw_fd();
        assert!(Descriptors::from_options(&[format!("/a=b/c={number}")]).unwrap().has("/a=b/c"));
    }

    #[test]
    fn after_the_lock_only_what_was_kept_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let name = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        for path in ["kept", "not kept"] {
            File::create(dir.path().join(path)).unwrap();
        }
        let descriptors = Descriptors::default();
        descriptors.file_to_keep(&name("kept"), "disk", Access::Read).unwrap();
        descriptors.file(&name("not kept"), "disk", Access::Read).unwrap();
        descriptors.lock();
        descriptors.file_to_keep(&name("kept"), "disk", Access::Read).unwrap();
        for (path, access) in [("kept", Access::ReadWrite), ("not kept", Access::Read)] {
            let error = descriptors.file_to_keep(&name(path), "disk", access).unwrap_err();
            assert!(matches!(error, Error::NotHanded { .. }), "{error}");
        }
    }

    #[test]
    fn a_missing_path_is_named() {
        let error = Descriptors::default().file("/no/such/kernel", "kernel", Access::Read).unwrap_err();
        assert!(error.chain().contains("kernel \"/no/such/kernel\""), "{}", error.chain());
    }
}
