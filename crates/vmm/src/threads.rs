//! How threads are started: named, and parked until told otherwise by the messages they wait for.

use std::convert::Infallible;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use crate::error::{Error, Result};

/// Name of the main thread, which serves the API and steers the machine.
pub const API: &str = "vmm-api";
/// Name of the process that opens paths.
pub const OPENER: &str = "vmm-opener";
/// Name of the thread that loads a kernel or a snapshot while KVM makes the machine, and ends before that is built.
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
    builder(&name).spawn(noting(name, body)).map_err(Error::io(what))
}

/// Does `make` here, and has `work` done meanwhile by a thread of this name, which can ask whether `make` is not done after so long.
/// Both are over at the end, whatever has failed.
///
/// # Errors
/// [`Error::Io`]: there can be no thread; [`Error::State`]: it has panicked.
pub fn meanwhile<M, T: Send>(
    name: &str,
    make: impl FnOnce() -> M,
    work: impl FnOnce(&dyn Fn(Duration) -> bool) -> T + Send,
) -> Result<(M, T)> {
    // Nothing is sent: the sender goes when `make` is done.
    let (making, made) = mpsc::channel::<Infallible>();
    std::thread::scope(|scope| {
        let waits = move |time| made.recv_timeout(time) == Err(RecvTimeoutError::Timeout);
        let body = noting(name.to_owned(), move || work(&waits));
        let thread = builder(name).spawn_scoped(scope, body);
        let thread = thread.map_err(Error::io(format!("starting thread {name}")))?;
        let made = make();
        drop(making);
        let done = thread.join().map_err(|_| Error::State(format!("the thread {name} has failed")))?;
        Ok((made, done))
    })
}

fn builder(name: &str) -> Builder {
    Builder::new().name(name.to_owned()).stack_size(STACK)
}

fn noting<T>(name: String, body: impl FnOnce() -> T) -> impl FnOnce() -> T {
    move || {
        crate::seccomp::sigsys::note_thread_name(&name);
        body()
    }
}

/// Names the calling thread.
pub fn name_this(name: &str) {
    crate::seccomp::sigsys::note_thread_name(name);
    let Ok(name) = std::ffi::CString::new(name) else { return };
    // SAFETY: PR_SET_NAME copies up to 16 bytes from a NUL-terminated string.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
}

#[cfg(test)]
mod tests {
    use std::thread::sleep;

    use super::*;

    const SHORT: Duration = Duration::from_millis(5);
    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn work_is_done_for_as_long_as_something_is_made() {
        let asked = |make: fn()| {
            let count = |waits: &dyn Fn(Duration) -> bool| (0..).take_while(|_| waits(SHORT)).count();
            meanwhile("worker", make, count).unwrap().1
        };
        assert!(asked(|| sleep(10 * SHORT)) > 0);
        // Who waits hears at once that it is made.
        let (made, waits) = meanwhile("worker", || 7, |waits| waits(LONG)).unwrap();
        assert_eq!((made, waits), (7, false));
    }

    #[test]
    fn a_panic_is_told() {
        let failed = meanwhile("worker", || (), |_| panic!("on purpose"));
        assert!(failed.unwrap_err().to_string().contains("worker"));
    }
}
