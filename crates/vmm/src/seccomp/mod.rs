//! System-call filters: one per kind of thread, installed by the thread itself before it touches anything of the
//! guest. In debug builds too.
//!
//! A forbidden call ends the process: SIGSYS arrives, and [`sigsys`] says which thread made which call.

mod names;
mod program;
pub mod rules;
pub mod sigsys;

use std::sync::Arc;

use crate::error::{Error, Result};

pub use names::name;
pub use rules::Kind;

/// A compiled filter.
pub type Filter = Arc<Vec<libc::sock_filter>>;

/// Compiles the filter of a kind of thread.
///
/// # Errors
/// [`Error::Seccomp`].
pub fn compile(kind: Kind) -> Result<Filter> {
    of_lines(&rules::lines(kind))
}

/// Compiles the filter that allows these calls only.
///
/// # Errors
/// [`Error::Seccomp`].
pub fn of_lines(lines: &[(i64, rules::Only)]) -> Result<Filter> {
    let program = program::compile(lines, std::process::id());
    program.map(Arc::new).ok_or_else(|| Error::Seccomp(format!("{} lines are too many", lines.len())))
}

/// Locks the calling thread down for good; threads that it starts later inherit the filter.
///
/// # Errors
/// [`Error::Seccomp`].
pub fn install(filter: &Filter) -> Result<()> {
    if filter.is_empty() {
        return Ok(());
    }
    let failed = |what: &str| Error::Seccomp(format!("{what}: {}", std::io::Error::last_os_error()));
    // SAFETY: changes a flag of this thread.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } < 0 {
        return Err(failed("giving up new privileges"));
    }
    let program = libc::sock_fprog {
        len: u16::try_from(filter.len()).map_err(|error| Error::Seccomp(error.to_string()))?,
        filter: filter.as_ptr().cast_mut(),
    };
    // SAFETY: the kernel reads a program of this length, which lives until the call is over.
    let result =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0_u32, &raw const program) };
    if result < 0 { Err(failed("installing a filter")) } else { Ok(()) }
}

/// The filters of one machine's threads.
#[derive(Clone, Debug)]
pub struct Filters {
    /// The main thread.
    pub api: Filter,
    /// The device thread.
    pub devices: Filter,
    /// vCPU threads.
    pub vcpu: Filter,
}

impl Filters {
    /// Compiles all.
    ///
    /// # Errors
    /// [`Error::Seccomp`].
    pub fn new() -> Result<Self> {
        Ok(Self { api: compile(Kind::Api)?, devices: compile(Kind::Devices)?, vcpu: compile(Kind::Vcpu)? })
    }
}
