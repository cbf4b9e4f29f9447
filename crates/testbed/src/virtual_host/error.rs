//! What can go wrong with a virtual host, said to the person who wants it.

use std::path::{Path, PathBuf};

/// Shorthand for this module's results.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a virtual host could not be started, found, used or ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or folder of ours could not be read or written.
    #[error("{what} {}", path.display())]
    File {
        /// What was tried: "cannot read", "cannot create", …
        what: &'static str,
        /// On which path.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// A program that this needs could not be run or ended badly.
    #[error("{program}: {problem}")]
    Program {
        /// Its name.
        program: String,
        /// How it ended and its last words.
        problem: String,
    },
    /// A name that cannot be a virtual host's.
    #[error(
        "'{0}' cannot be a virtual host's name: 1 to 40 letters, digits, '-' and '_', beginning with a letter or digit"
    )]
    BadName(String),
    /// No virtual host of this name runs.
    #[error("no virtual host '{0}' is running; start it with: scripts/virtual-host --name {0} up")]
    NotRunning(String),
    /// It ended before it was ready.
    #[error(
        "the virtual host ended before it was ready.\nQEMU said: {qemu}\nIts console ends with:\n{console}"
    )]
    Died {
        /// QEMU's standard error.
        qemu: String,
        /// The last lines of the console.
        console: String,
    },
    /// It is up, but not ready within the deadline.
    #[error("the virtual host was not ready after {seconds} s; its console ends with:\n{console}")]
    NotReady {
        /// The deadline.
        seconds: u64,
        /// The last lines of the console.
        console: String,
    },
    /// No free port on the loopback interface.
    #[error("no free port on 127.0.0.1")]
    NoPort,
}

impl Error {
    pub(super) fn file(what: &'static str, path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Self::File { what, path, source }
    }

    pub(super) fn program(program: &str, problem: impl Into<String>) -> Self {
        Self::Program { program: program.to_owned(), problem: problem.into() }
    }
}
