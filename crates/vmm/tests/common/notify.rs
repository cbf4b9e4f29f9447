//! A program whose system calls its parent is told of before they happen.
//!
//! The child puts a seccomp filter on itself, before it executes the program, that turns the calls into notifications.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::time::Duration;

/// `_IOWR('!', 0, struct seccomp_notif)`.
const SECCOMP_IOCTL_NOTIF_RECV: libc::Ioctl = 0xc050_2100;
/// `_IOWR('!', 1, struct seccomp_notif_resp)`.
const SECCOMP_IOCTL_NOTIF_SEND: libc::Ioctl = 0xc018_2101;
const SECCOMP_USER_NOTIF_FLAG_CONTINUE: u32 = 1;
/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const SECOND_ARGUMENT: u32 = 24;

/// Which calls.
#[derive(Clone, Copy)]
pub enum Calls {
    /// `ioctl` with this request.
    Ioctl(u32),
    /// All but those that a program is executed with and that its listener is sent with.
    All,
}

/// Starts a program; its notifications arrive at the descriptor.
///
/// # Errors
/// It does not start.
pub fn spawn(command: &mut Command, calls: Calls) -> io::Result<(Child, OwnedFd)> {
    let (ours, theirs) = UnixStream::pair()?;
    let socket = theirs.as_raw_fd();
    // SAFETY: what runs between fork and exec makes system calls only: no allocation, no locks.
    unsafe { command.pre_exec(move || send(socket, listen(calls)?)) };
    let child = command.spawn()?;
    Ok((child, receive(&ours)?))
}

/// Waits for a call; `None` when all threads of the program are gone.
///
/// # Errors
/// Nothing comes within `limit`.
pub fn next(listener: &OwnedFd, limit: Duration) -> io::Result<Option<libc::seccomp_notif>> {
    loop {
        let mut poll = libc::pollfd { fd: listener.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let milliseconds = i32::try_from(limit.as_millis()).unwrap_or(i32::MAX);
        // SAFETY: one valid pollfd.
        let ready = unsafe { libc::poll(&raw mut poll, 1, milliseconds) };
        if ready < 0 {
            return Err(io::Error::last_os_error());
        }
        if ready == 0 {
            return Err(io::Error::other(format!("no call within {limit:?}")));
        }
        if poll.revents & libc::POLLIN == 0 {
            return Ok(None);
        }
        // SAFETY: all zeroes is a valid value, and what the kernel asks for.
        let mut notification: libc::seccomp_notif = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel fills the structure that it is given.
        let taken =
            unsafe { libc::ioctl(listener.as_raw_fd(), SECCOMP_IOCTL_NOTIF_RECV, &raw mut notification) };
        if taken == 0 {
            return Ok(Some(notification));
        }
        let error = io::Error::last_os_error();
        // A signal took the thread out of its call before it was looked at.
        if error.raw_os_error() != Some(libc::ENOENT) {
            return Err(error);
        }
    }
}

/// Lets a call happen.
pub fn go_on(listener: &OwnedFd, notification: &libc::seccomp_notif) {
    // SAFETY: all zeroes is a valid value.
    let mut response: libc::seccomp_notif_resp = unsafe { std::mem::zeroed() };
    response.id = notification.id;
    response.flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE;
    // A thread that a signal took out of its call is not there any more. SAFETY: the response is valid.
    unsafe { libc::ioctl(listener.as_raw_fd(), SECCOMP_IOCTL_NOTIF_SEND, &raw mut response) };
}

/// Puts the filter on the calling process; returns its listener.
fn listen(calls: Calls) -> io::Result<RawFd> {
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let statement = |code, k| libc::sock_filter { code, jt: 0, jf: 0, k };
    let jump = |k, jt, jf| libc::sock_filter { code: EQUAL, jt, jf, k };
    let (tell, allow) =
        (statement(RETURN, libc::SECCOMP_RET_USER_NOTIF), statement(RETURN, libc::SECCOMP_RET_ALLOW));
    let mut one = [
        statement(LOAD, NUMBER),
        jump(libc::SYS_ioctl as u32, 0, 3),
        statement(LOAD, SECOND_ARGUMENT),
        jump(if let Calls::Ioctl(request) = calls { request } else { 0 }, 0, 1),
        tell,
        allow,
    ];
    // The parent answers only once it has the listener and the program runs.
    let mut all = [
        statement(LOAD, NUMBER),
        jump(libc::SYS_sendmsg as u32, 3, 0),
        jump(libc::SYS_close as u32, 2, 0),
        jump(libc::SYS_execve as u32, 1, 0),
        tell,
        allow,
    ];
    let filter = if matches!(calls, Calls::All) { &mut all } else { &mut one };
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: sets a flag of this process.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the program is valid and outlives the call, which copies it.
    let listener = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &raw const program,
        )
    };
    if listener < 0 { Err(io::Error::last_os_error()) } else { Ok(listener as RawFd) }
}

/// Room for one control message with one descriptor, aligned as its header is.
#[repr(C, align(8))]
struct Control([u8; 24]);

/// A message of one byte, and of one descriptor beside it.
fn message(byte: &mut libc::iovec, control: &mut Control) -> libc::msghdr {
    // SAFETY: a zeroed msghdr is a valid value.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = byte;
    message.msg_iovlen = 1;
    message.msg_control = control.0.as_mut_ptr().cast();
    message.msg_controllen = control.0.len();
    message
}

fn send(socket: RawFd, descriptor: RawFd) -> io::Result<()> {
    let (mut byte, mut control) = (0_u8, Control([0; 24]));
    let mut vector = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    let message = message(&mut vector, &mut control);
    // SAFETY: the message is valid.
    let header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    // SAFETY: the control buffer has room for one header.
    let header = unsafe { &mut *header };
    header.cmsg_level = libc::SOL_SOCKET;
    header.cmsg_type = libc::SCM_RIGHTS;
    header.cmsg_len = 20;
    // SAFETY: the header is valid, its data follows it inside the control buffer.
    let data = unsafe { libc::CMSG_DATA(header) }.cast::<RawFd>();
    // SAFETY: there is room for one descriptor.
    unsafe { data.write_unaligned(descriptor) };
    // SAFETY: the message and all that it points to are valid.
    let sent = unsafe { libc::sendmsg(socket, &raw const message, 0) };
    // SAFETY: closes this process's own copy.
    unsafe { libc::close(descriptor) };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn receive(socket: &UnixStream) -> io::Result<OwnedFd> {
    let (mut byte, mut control) = (0_u8, Control([0; 24]));
    let mut vector = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    let mut message = message(&mut vector, &mut control);
    // SAFETY: the message and all that it points to are valid.
    let count = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC) };
    if count < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel filled the control buffer and its length.
    let header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    if count == 0 || header.is_null() {
        return Err(io::Error::other("the child sent no listener"));
    }
    // SAFETY: the header is valid, its data follows it.
    let data = unsafe { libc::CMSG_DATA(header) }.cast::<RawFd>();
    // SAFETY: SCM_RIGHTS brought one descriptor.
    let descriptor = unsafe { data.read_unaligned() };
    // SAFETY: the kernel just made this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}
