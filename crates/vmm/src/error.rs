//! The crate's error: what failed, with which value, and why.

use std::path::PathBuf;

use crate::exit::ExitCode;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong before and while a guest runs.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration does not parse or makes no sense; the text names the field.
    #[error("configuration: {0}")]
    Config(String),
    /// A name in the configuration is neither a handed descriptor nor a path that opens.
    #[error("cannot open {what} {path:?}, which is no handed descriptor either")]
    Open {
        /// What the file is for.
        what: &'static str,
        /// The path that was tried.
        path: PathBuf,
        /// Why it did not open.
        #[source]
        source: std::io::Error,
    },
    /// A path on the command line does not open.
    #[error("cannot open {what} {path:?}")]
    Path {
        /// What the file is for.
        what: &'static str,
        /// The path that was tried.
        path: PathBuf,
        /// Why it did not open.
        #[source]
        source: std::io::Error,
    },
    /// A name in the configuration was looked up after lock-down, when no path may be opened.
    #[error("{what} {name:?} was not handed over as a descriptor, and paths are not opened after lock-down")]
    NotHanded {
        /// What the descriptor is for.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// KVM refused a call.
    #[error("KVM: {what} failed")]
    Kvm {
        /// The call.
        what: &'static str,
        /// Why.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// KVM is there but lacks something that the monitor cannot do without.
    #[error("KVM lacks {0}")]
    KvmLacks(String),
    /// The kernel image cannot be loaded.
    #[error("kernel image: {0}")]
    Kernel(String),
    /// Guest memory could not be made or written.
    #[error("guest memory: {0}")]
    Memory(String),
    /// A disk image is broken or unfit.
    #[error("disk {id:?}: {what}")]
    Disk {
        /// The drive.
        id: String,
        /// What was attempted.
        what: String,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// A host object failed.
    #[error("{what}")]
    Io {
        /// What was attempted.
        what: String,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// The jail could not be built.
    #[error("jail: {0}")]
    Jail(String),
    /// A system-call filter could not be built or set.
    #[error("seccomp: {0}")]
    Seccomp(String),
    /// A snapshot cannot be taken or loaded.
    #[error("snapshot: {0}")]
    Snapshot(String),
    /// The request does not fit the state that the machine is in.
    #[error("{0}")]
    State(String),
}

impl Error {
    /// Wraps a KVM error.
    pub fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |source| Self::Kvm { what, source }
    }

    /// Wraps an I/O error.
    pub fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    /// Wraps an error of guest memory.
    pub fn memory(what: &str) -> impl FnOnce(vm_memory::GuestMemoryError) -> Self + '_ {
        move |source| Self::Memory(format!("{what}: {source}"))
    }

    /// The exit code that this error ends the process with.
    #[must_use]
    pub const fn exit_code(&self) -> ExitCode {
        match self {
            Self::Config(_)
            | Self::Kernel(_)
            | Self::State(_)
            | Self::Snapshot(_)
            | Self::NotHanded { .. } => ExitCode::Config,
            Self::Kvm { .. } | Self::KvmLacks(_) => ExitCode::Kvm,
            Self::Open { .. }
            | Self::Path { .. }
            | Self::Disk { .. }
            | Self::Io { .. }
            | Self::Memory(_)
            | Self::Jail(_) => ExitCode::HostIo,
            Self::Seccomp(_) => ExitCode::Internal,
        }
    }

    /// The whole chain of causes on one line.
    #[must_use]
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
