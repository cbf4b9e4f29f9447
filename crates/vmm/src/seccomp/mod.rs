//! System-call filters: one per kind of thread, installed by the thread itself before it touches anything of the
//! guest. In debug builds too.
//!
//! A forbidden call ends the process: SIGSYS arrives, and [`sigsys`] says which thread made which call.

mod names;
pub mod rules;
pub mod sigsys;

use std::sync::Arc;

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};

use crate::error::{Error, Result};

pub use names::name;
pub use rules::Kind;

/// A compiled filter.
pub type Filter = Arc<BpfProgram>;

/// Compiles the filter of a kind of thread.
///
/// # Errors
/// [`Error::Seccomp`].
pub fn compile(kind: Kind) -> Result<Filter> {
    let rules = rules::rules(kind).map_err(|error| Error::Seccomp(error.to_string()))?;
    let filter = SeccompFilter::new(rules, SeccompAction::Trap, SeccompAction::Allow, TargetArch::x86_64)
        .map_err(|error| Error::Seccomp(error.to_string()))?;
    let program: BpfProgram =
        filter.try_into().map_err(|error: seccompiler::BackendError| Error::Seccomp(error.to_string()))?;
    Ok(Arc::new(program))
}

/// Locks the calling thread down for good; threads that it starts later inherit the filter.
///
/// # Errors
/// [`Error::Seccomp`].
pub fn install(filter: &Filter) -> Result<()> {
    if filter.is_empty() {
        return Ok(());
    }
    seccompiler::apply_filter(filter).map_err(|error| Error::Seccomp(error.to_string()))
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
