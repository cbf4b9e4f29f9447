//! The parent beside a monitor in the foreground: no root any more, passes signals on, ends as the monitor ends.

use std::io;

use super::check;
use crate::error::{Error, Result};

/// Signals that are passed on; the first is about the monitor's own end.
const SIGNALS: [libc::c_int; 5] = [libc::SIGCHLD, libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT];

fn signals() -> libc::sigset_t {
    // SAFETY: a set is plain data, for which all zeroes is a valid value.
    let mut set = unsafe { std::mem::zeroed() };
    // SAFETY: empties the set that it is given.
    unsafe { libc::sigemptyset(&raw mut set) };
    for signal in SIGNALS.into_iter().filter(|signal| !ignored(*signal)) {
        // SAFETY: adds a signal that exists to the set.
        unsafe { libc::sigaddset(&raw mut set, signal) };
    }
    set
}

/// Whether the caller ignores a signal, as nohup(1) does; blocked, it would be queued all the same.
fn ignored(signal: libc::c_int) -> bool {
    // SAFETY: a zeroed sigaction is a valid value.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: fills the struct that it is given.
    let asked = unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut action) };
    asked == 0 && action.sa_sigaction == libc::SIG_IGN
}

/// Lets signals wait, and gives the mask that was before.
pub(super) fn block() -> io::Result<libc::sigset_t> {
    // SAFETY: the default. Whoever ignores it gets none, and never hears of its children's ends.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
    // SAFETY: as above.
    let (set, mut before) = (signals(), unsafe { std::mem::zeroed() });
    // SAFETY: reads one set and fills another.
    check(unsafe { libc::sigprocmask(libc::SIG_BLOCK, &raw const set, &raw mut before) })?;
    Ok(before)
}

/// Kills the child and waits until it is gone.
pub(super) fn end(pid: libc::pid_t) {
    // SAFETY: the child has not been waited for, so the number is still its own.
    unsafe { libc::kill(pid, libc::SIGKILL) };
    // SAFETY: no status is asked for.
    unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) };
}

/// Waits until the monitor ends, and gives its exit code, or 128 and the signal that ended it.
///
/// # Errors
/// [`Error::Io`].
pub(super) fn wait(pid: libc::pid_t, uid: u32, gid: u32) -> Result<i32> {
    step_down(uid, gid).inspect_err(|_| end(pid)).map_err(Error::io("giving up root beside the monitor"))?;
    let set = signals();
    loop {
        let mut signal = 0;
        // SAFETY: reads the set and fills the number; the signals are blocked.
        let result = unsafe { libc::sigwait(&raw const set, &raw mut signal) };
        if result != 0 {
            return Err(Error::io("waiting for a signal")(io::Error::from_raw_os_error(result)));
        }
        if signal != libc::SIGCHLD {
            // Each as the one that ends a machine in order: process 1 of a pid namespace is deaf to those that it does not listen to.
            // SAFETY: as in `end`. It may have ended meanwhile, which comes next.
            unsafe { libc::kill(pid, libc::SIGTERM) };
            continue;
        }
        let mut status = 0;
        // SAFETY: fills the status.
        let ended = unsafe { libc::waitpid(pid, &raw mut status, libc::WNOHANG) };
        check(ended).map_err(Error::io("waiting for the monitor"))?;
        if ended == pid && libc::WIFEXITED(status) {
            return Ok(libc::WEXITSTATUS(status));
        }
        if ended == pid && libc::WIFSIGNALED(status) {
            return Ok(128 + libc::WTERMSIG(status));
        }
    }
}

/// Becomes the monitor's user, who may send it signals, and lets go of everything that was opened for it.
fn step_down(uid: u32, gid: u32) -> io::Result<()> {
    // SAFETY: nothing here uses a descriptor above the standard streams any more.
    check(unsafe { libc::syscall(libc::SYS_close_range, 3_u32, u32::MAX, 0) })?;
    // SAFETY: a list of no groups is not read.
    check(unsafe { libc::setgroups(0, std::ptr::null()) })?;
    // SAFETY: takes numbers.
    check(unsafe { libc::setresgid(gid, gid, gid) })?;
    // SAFETY: takes numbers. With root's id go its capabilities.
    check(unsafe { libc::setresuid(uid, uid, uid) })
}
