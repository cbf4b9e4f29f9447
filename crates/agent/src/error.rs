//! The crate's error: what failed, on which thing, and why.

use std::path::{Path, PathBuf};

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong on a host.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file operation failed.
    #[error("cannot {what} {path:?}")]
    File {
        /// What was attempted, as a verb.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A system call or socket operation failed.
    #[error("{what}")]
    Io {
        /// What was attempted.
        what: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file of ours does not parse.
    #[error("{path:?} is damaged")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// A netlink request failed.
    #[error("network: cannot {what}")]
    Netlink {
        /// What was attempted.
        what: String,
        /// Why.
        #[source]
        source: Box<rtnetlink::Error>,
    },
    /// A helper program failed.
    #[error("{program}: {what}: {stderr}")]
    Program {
        /// The program.
        program: &'static str,
        /// What it should have done.
        what: String,
        /// What it said.
        stderr: String,
    },
    /// The controller did not do its part.
    #[error("controller {url}: {what}")]
    Controller {
        /// What was asked.
        url: String,
        /// What came instead.
        what: String,
        /// Why, where there is more to say.
        #[source]
        source: Option<Box<reqwest::Error>>,
    },
    /// The host cannot do this, however often it is tried.
    #[error("{0}")]
    Impossible(String),
    /// Something is not yet or no longer so; worth another try.
    #[error("{0}")]
    NotNow(String),
    /// Another agent works on this state folder.
    #[error(
        "another roost-agent already works on {path:?} (it holds the lock {lock:?}); \
         a host has one agent per state folder: stop that one, or give this one its own --state-dir"
    )]
    Locked {
        /// The state folder.
        path: PathBuf,
        /// The lock file.
        lock: PathBuf,
    },
}

impl Error {
    /// Wraps an I/O error on a file; `what` is a verb.
    pub fn file(what: &'static str, path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_owned();
        move |source| Self::File { what, path, source }
    }

    /// Wraps another I/O error.
    pub fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    /// Wraps an error number.
    pub fn sys<E: Into<std::io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source: source.into() }
    }

    /// Wraps a netlink error.
    pub fn netlink(what: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> Self {
        let what = what.into();
        move |source| Self::Netlink { what, source: Box::new(source) }
    }

    /// Whether trying again is pointless.
    pub const fn is_permanent(&self) -> bool {
        matches!(self, Self::Impossible(_))
    }

    /// The whole chain of causes on one line.
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut source = std::error::Error::source(self);
        while let Some(cause) = source {
            text.push_str(": ");
            text.push_str(&cause.to_string());
            source = cause.source();
        }
        text
    }
}
