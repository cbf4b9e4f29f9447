//! What happens at a forbidden system call: one line that names the thread and the call, the status event, the end.
//!
//! All of this runs inside a signal handler: no allocation, no locks, only `write` and `_exit`.

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicI32, Ordering};

use super::names;
use crate::error::{Error, Result};
use crate::exit::ExitCode;
use crate::status::boottime_ns;

static STATUS_FD: AtomicI32 = AtomicI32::new(-1);

/// Installs the handler. `status` is where status events go.
///
/// # Errors
/// [`Error::Io`].
pub fn install(status: Option<RawFd>) -> Result<()> {
    STATUS_FD.store(status.unwrap_or(-1), Ordering::SeqCst);
    // SAFETY: a zeroed sigaction is a valid value.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handle as *const () as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
    // SAFETY: the action is valid and the handler is async-signal-safe.
    let result = unsafe { libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) };
    if result < 0 {
        Err(Error::io("installing the SIGSYS handler")(std::io::Error::last_os_error()))
    } else {
        Ok(())
    }
}

/// `si_syscall` of a SIGSYS: behind signal number, errno, code (with padding) and the calling address.
const SI_SYSCALL_OFFSET: usize = 24;

extern "C" fn handle(_signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel hands a siginfo of 128 bytes, so the offset lies inside.
    let number = unsafe { info.cast::<u8>().add(SI_SYSCALL_OFFSET) }.cast::<libc::c_int>();
    // SAFETY: for SIGSYS the call's number lies there.
    let number = unsafe { number.read_unaligned() };
    let number = i64::from(number);
    report(b"seccomp", ExitCode::Seccomp, |line| {
        line.text(b" made the forbidden system call ").text(names::name(number).as_bytes());
        line.text(b" (").number(number.unsigned_abs()).text(b")");
    });
    // SAFETY: ends the process at once, from any context.
    unsafe { libc::_exit(ExitCode::Seccomp.code()) };
}

/// The thread's name cannot be asked for here (that call may be forbidden too), so threads note it beforehand.
fn thread_name(buffer: &mut [u8; 16]) -> std::result::Result<usize, ()> {
    NAME.try_with(|name| {
        let name = name.get();
        *buffer = name;
        name.iter().position(|byte| *byte == 0).unwrap_or(name.len())
    })
    .map_err(drop)
}

thread_local! {
    static NAME: std::cell::Cell<[u8; 16]> = const { std::cell::Cell::new([0; 16]) };
}

/// Notes the calling thread's name for the message.
pub fn note_thread_name(name: &str) {
    let mut bytes = [0; 16];
    for (byte, value) in bytes.iter_mut().zip(name.bytes()) {
        *byte = value;
    }
    NAME.with(|cell| cell.set(bytes));
}

/// Says what the calling thread did, on stderr, in the log and in the status file. Inside a signal handler, too.
pub(crate) fn report(reason: &[u8], code: ExitCode, what: impl Fn(&mut Line)) {
    let mut name = [0_u8; 16];
    let thread = thread_name(&mut name).map_or(&b"?"[..], |length| &name[..length]);
    let mut line = Line::default();
    line.text(b"roost-vmm: thread ").text(thread);
    what(&mut line);
    line.text(b"; the machine ends\n").write(libc::STDERR_FILENO);
    if let Some(log) = crate::log::descriptor() {
        line.write(log);
    }
    let status = STATUS_FD.load(Ordering::SeqCst);
    if status >= 0 {
        let mut line = Line::default();
        line.text(b"{\"event\":\"exited\",\"boottime_ns\":").number(boottime_ns());
        line.text(b",\"reason\":\"").text(reason).text(b"\",\"code\":").number(u64::from(code as u8));
        line.text(b",\"message\":\"thread ").text(thread);
        what(&mut line);
        line.text(b"\"}\n").write(status);
    }
}

/// A line that is put together without allocation.
pub(crate) struct Line {
    bytes: [u8; 512],
    length: usize,
}

impl Default for Line {
    fn default() -> Self {
        Self { bytes: [0; 512], length: 0 }
    }
}

impl Line {
    pub(crate) fn text(&mut self, text: &[u8]) -> &mut Self {
        for byte in text {
            if self.length < self.bytes.len() {
                self.bytes[self.length] = *byte;
                self.length += 1;
            }
        }
        self
    }

    pub(crate) fn number(&mut self, mut number: u64) -> &mut Self {
        let mut digits = [0; 20];
        let mut at = digits.len();
        loop {
            at -= 1;
            digits[at] = b'0' + (number % 10) as u8;
            number /= 10;
            if number == 0 {
                break;
            }
        }
        self.text(&digits[at..])
    }

    fn write(&self, descriptor: RawFd) {
        // SAFETY: the bytes are valid for that length; the result does not matter any more.
        unsafe { libc::write(descriptor, self.bytes.as_ptr().cast(), self.length) };
    }
}
