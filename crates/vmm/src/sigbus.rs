//! What happens when the monitor touches a page that the host cannot bring: it says so and ends.
//!
//! Guest memory is mapped from files in three ways: persistent memory, a kernel, a snapshot's memory. A page behind the end of a file
//! that was cut short, or one that the host cannot read, is a SIGBUS for the thread that touches it, and EFAULT from KVM_RUN when the
//! guest does. Nothing can be put in its place that the guest would not take for the file.

use crate::error::{Error, Result};
use crate::exit::ExitCode;
use crate::seccomp::sigsys;

/// `BUS_ADRERR` (asm-generic/siginfo.h): there is nothing at that address.
const BUS_ADRERR: libc::c_int = 2;

/// What a missing page is, for people.
pub const MISSING: &str = "a page that is not there: a file that guest memory is mapped from was cut short, has no room or cannot be read";

/// Installs the handler. A file that reaches the limit of sizes (`RLIMIT_FSIZE`) is an error of its write from here on, and no signal
/// that ends the process.
///
/// # Errors
/// [`Error::Io`].
pub fn install() -> Result<()> {
    // SAFETY: ignores a signal.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    // SAFETY: a zeroed sigaction is a valid value.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handle as *const () as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER | libc::SA_ONSTACK;
    // SAFETY: the action is valid and the handler is async-signal-safe.
    let result = unsafe { libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut()) };
    if result < 0 {
        Err(Error::io("installing the SIGBUS handler")(std::io::Error::last_os_error()))
    } else {
        Ok(())
    }
}

extern "C" fn handle(_signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel hands a siginfo.
    let code = unsafe { (*info).si_code };
    sigsys::report(b"error", ExitCode::HostIo, |line| {
        match code {
            BUS_ADRERR => line.text(b" touched ").text(MISSING.as_bytes()),
            _ => line.text(b" got SIGBUS, code ").number(u64::from(code.unsigned_abs())),
        };
    });
    // SAFETY: ends the process at once, from any context.
    unsafe { libc::_exit(ExitCode::HostIo.code()) };
}
