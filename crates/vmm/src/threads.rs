//! How threads are started: named, and parked until told otherwise by the messages they wait for.

use std::thread::{Builder, JoinHandle};

use crate::error::{Error, Result};

/// Name of the main thread, which serves the API and steers the machine.
pub const API: &str = "vmm-api";
/// Name of the process that opens paths.
pub const OPENER: &str = "vmm-opener";
/// Name of the thread that loads a kernel, and ends before the machine is built.
pub const LOADER: &str = "vmm-loader";
/// Name of the device thread.
pub const DEVICES: &str = "vmm-dev";

/// Name of a thread that does the work of one disk.
pub const DISK: &str = "vmm-disk";

/// Name of a vCPU's thread.
#[must_use]
pub fn vcpu(id: u8) -> String {
    format!("vcpu{id}")
}

/// Stack of a thread. Only what is touched costs memory.
const STACK: usize = 512 * 1024;

/// Starts a named thread.
///
/// # Errors
/// [`Error::Io`].
pub fn spawn<T: Send + 'static>(
    name: String,
    body: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<T>> {
    let what = format!("starting thread {name}");
    let noted = name.clone();
    let body = move || {
        crate::seccomp::sigsys::note_thread_name(&noted);
        body()
    };
    Builder::new().name(name).stack_size(STACK).spawn(body).map_err(Error::io(what))
}

/// Names the calling thread.
pub fn name_this(name: &str) {
    crate::seccomp::sigsys::note_thread_name(name);
    let Ok(name) = std::ffi::CString::new(name) else { return };
    // SAFETY: PR_SET_NAME copies up to 16 bytes from a NUL-terminated string.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
}
