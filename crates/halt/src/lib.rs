//! Named points at which a test can halt the real agent and the real controller, to kill something exactly there.
//!
//! A process that was started with `ROOST_HALT_POINTS=FOLDER` stops itself, all threads of it, when it passes a
//! point that has a file of its name in the folder. Whoever made the file sees it in state `T`, and decides: SIGKILL,
//! or SIGCONT after something else was killed. Without the variable, which is read once at start, passing a point
//! reads one atomic and does nothing. Why not a cargo feature: `docs/decisions/0011-halt-points.md`.

#![forbid(unsafe_code)]

use nix::sys::signal::{Signal, raise};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// The environment variable that names the folder.
pub const VARIABLE: &str = "ROOST_HALT_POINTS";

static FOLDER: OnceLock<PathBuf> = OnceLock::new();

/// Why the folder is not used. The process must not start then: whoever may write there could halt it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It is not there, or cannot be looked at.
    #[error("{VARIABLE} names {folder:?}, which cannot be used: {source}")]
    Unusable {
        /// The folder.
        folder: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Somebody else could make files in it.
    #[error(
        "{VARIABLE} names {0:?}, which must be a folder that belongs to root and that only root can write to"
    )]
    Open(PathBuf),
}

/// Reads the environment; call it once, before anything else. Gives the folder if points are live.
///
/// # Errors
/// The variable is set and its folder is not root's alone.
pub fn from_environment() -> Result<Option<&'static Path>, Error> {
    let named = std::env::var_os(VARIABLE).filter(|folder| !folder.is_empty());
    let Some(folder) = named.map(PathBuf::from) else { return Ok(None) };
    check(&folder)?;
    Ok(Some(FOLDER.get_or_init(|| folder)))
}

fn check(folder: &Path) -> Result<(), Error> {
    let meta = std::fs::symlink_metadata(folder)
        .map_err(|source| Error::Unusable { folder: folder.to_owned(), source })?;
    let roots_alone = meta.is_dir() && meta.uid() == 0 && meta.mode() & 0o022 == 0;
    if roots_alone { Ok(()) } else { Err(Error::Open(folder.to_owned())) }
}

/// Passes the point `<name>.before` now, and `<name>.after` when the answer is dropped.
#[must_use = "it passes the second point when it is dropped"]
pub fn around(name: &'static str) -> Around {
    pass(name, "before");
    Around(name)
}

/// See [`around`].
#[derive(Debug)]
pub struct Around(&'static str);

impl Drop for Around {
    fn drop(&mut self) {
        pass(self.0, "after");
    }
}

fn pass(name: &str, side: &str) {
    if let Some(folder) = FOLDER.get()
        && folder.join(format!("{name}.{side}")).exists()
    {
        // To this very thread, so that it goes no further; the kernel stops the others with it. It cannot fail: the
        // signal exists and the thread lives.
        let _ = raise(Signal::SIGSTOP);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn only_a_folder_of_roots_alone_is_taken() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let ours = nix::unistd::geteuid().is_root();
        assert_eq!(check(folder.path()).is_ok(), ours, "{:?}", check(folder.path()));
        let mode = std::fs::Permissions::from_mode(0o777);
        std::fs::set_permissions(folder.path(), mode).expect("it is ours");
        assert!(matches!(check(folder.path()), Err(Error::Open(_))));
        assert!(matches!(check(Path::new("/nonexistent")), Err(Error::Unusable { .. })));
        let file = folder.path().join("file");
        std::fs::write(&file, "").expect("it is ours");
        assert!(matches!(check(&file), Err(Error::Open(_))));
    }

    #[test]
    fn without_the_variable_nothing_halts() {
        // Were a point live here, this test would stop for ever.
        drop(around("anything"));
    }
}
