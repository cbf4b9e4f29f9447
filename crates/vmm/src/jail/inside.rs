//! The child: from root of the host to a monitor that can do nothing but run.

use std::convert::Infallible;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::ptr::null;

use super::{
    DONE, EXECUTE, FAILED, Inside, JOIN, LIMIT, MAP, announce, check, landlock, limits, privileges, unshare,
};
use crate::error::{Error, Result};

/// A folder that is there wherever this program can run. The empty root is mounted over it, in the new namespace only.
const MOUNT_POINT: &std::ffi::CStr = c"/proc";

/// Never comes back.
pub(super) fn enter(inside: &Inside, mut talk: UnixStream, signals: &libc::sigset_t) -> ! {
    let error = match build(inside, &mut talk, signals) {
        Ok(never) => match never {},
        Err(error) => error,
    };
    let _ = talk.write_all(&[FAILED]);
    let _ = talk.write_all(error.chain().as_bytes());
    // SAFETY: ends the process; nothing of the parent's copy may be run or dropped.
    unsafe { libc::_exit(1) }
}

fn build(inside: &Inside, talk: &mut UnixStream, signals: &libc::sigset_t) -> Result<Infallible> {
    let options = &inside.options;
    die_with_parent(true)?;
    // SAFETY: plain call.
    check(unsafe { libc::setsid() }).map_err(Error::io("starting a session"))?;
    streams(inside).map_err(Error::io("redirecting the standard streams"))?;
    let cores = core_scheduling()?;
    ask(talk, JOIN)?;
    // After the cgroup, which becomes the root of all cgroups that can be seen from here.
    let flags = libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS | libc::CLONE_NEWNET;
    unshare(flags | libc::CLONE_NEWCGROUP, "making namespaces")?;
    empty_root()?;
    let name = options.id.as_deref().unwrap_or("anonymous");
    // SAFETY: the pointer and the length are one string's.
    check(unsafe { libc::sethostname(name.as_ptr().cast(), name.len()) })
        .map_err(Error::io("setting the host name"))?;
    privileges::leave_groups()?;
    if !options.no_user_namespace {
        enter_user_namespace()?;
        ask(talk, MAP)?;
    }
    ask(talk, LIMIT)?;
    limited(inside)?;
    privileges::drop_all(options.uid, options.gid)?;
    die_with_parent(true)?;
    // The change of the user took the signal away: the parent may have gone meanwhile.
    still_there(talk)?;
    for (name, folder) in &inside.folders {
        check_writable(name, *folder, options.uid)?;
    }
    let folders: Vec<RawFd> = inside.folders.iter().map(|(_, folder)| *folder).collect();
    let abi = landlock::restrict(inside.program.as_raw_fd(), &folders).map_err(Error::io("landlock"))?;
    announce(options, abi, cores);
    // SAFETY: clears permissions of files that this process makes.
    unsafe { libc::umask(0o077) };
    close_others(inside)?;
    // The monitor takes these two from a descriptor: one that is sent before it does must wait, as process 1 of a pid namespace never
    // sees what it does not listen to.
    let mut waiting = *signals;
    for signal in [libc::SIGTERM, libc::SIGINT] {
        // SAFETY: adds a signal that exists to the set.
        unsafe { libc::sigaddset(&raw mut waiting, signal) };
    }
    // SAFETY: the set is a valid one, and nobody wants the old mask.
    check(unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const waiting, std::ptr::null_mut()) })
        .map_err(Error::io("restoring the signal mask"))?;
    die_with_parent(!options.daemonize)?;
    talk.write_all(&[EXECUTE]).map_err(Error::io("talking to the parent"))?;
    execute(inside)
}

/// Takes a core scheduling cookie for this process; its threads inherit the cookie. No thread of
/// another process then runs on a sibling thread of the core at the same time, so SMT leaks nothing
/// between guests. Returns a sentence about the result.
fn core_scheduling() -> Result<&'static str> {
    // linux/prctl.h; libc does not define these.
    const PR_SCHED_CORE: libc::c_int = 62;
    const CREATE: libc::c_ulong = 1;
    const SCOPE_THREAD_GROUP: libc::c_ulong = 1;
    const THIS_PROCESS: libc::c_ulong = 0;
    // SAFETY: takes numbers; the last is a pointer that only another command writes to.
    let made = unsafe { libc::prctl(PR_SCHED_CORE, CREATE, THIS_PROCESS, SCOPE_THREAD_GROUP, 0_usize) };
    match check(made).map_err(|error| (error.raw_os_error(), error)) {
        Ok(()) => Ok("cores shared with no other machine at the same moment"),
        Err((Some(libc::ENODEV), _)) => Ok("no SMT, and so no core scheduling"),
        Err((Some(libc::EINVAL), _)) => Ok("no core scheduling in this kernel"),
        Err((_, error)) => Err(Error::io("core scheduling")(error)),
    }
}

/// Has the parent do something, and waits until it has.
fn ask(talk: &mut UnixStream, what: u8) -> Result<()> {
    let mut answer = [0];
    talk.write_all(&[what])
        .and_then(|()| talk.read_exact(&mut answer))
        .map_err(Error::io("talking to the parent"))?;
    if answer == [DONE] { Ok(()) } else { Err(Error::Jail("the parent did not understand".into())) }
}

/// The kernel kills this process when its parent ends, or does not. It forgets the former with each change of the user.
fn die_with_parent(yes: bool) -> Result<()> {
    let signal = if yes { libc::c_ulong::from(libc::SIGKILL.unsigned_abs()) } else { 0 };
    // SAFETY: takes a number.
    check(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, signal) })
        .map_err(Error::io("setting the parent-death signal"))
}

fn still_there(talk: &UnixStream) -> Result<()> {
    let mut byte = 0_u8;
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    // SAFETY: one byte of room, which lives.
    let count = unsafe { libc::recv(talk.as_raw_fd(), (&raw mut byte).cast(), 1, flags) };
    if count == 0 { Err(Error::Jail("the parent is gone".into())) } else { Ok(()) }
}

/// The log takes the output; a process that nobody waits for holds no stream of its caller's.
fn streams(inside: &Inside) -> io::Result<()> {
    let empty = std::fs::File::options().read(true).write(true).open("/dev/null")?;
    let put = |from: RawFd, to| {
        // SAFETY: both are open; dup2 leaves the new one open over the execution.
        check(unsafe { libc::dup2(from, to) })
    };
    if inside.options.daemonize {
        (0..=2).try_for_each(|stream| put(empty.as_raw_fd(), stream))?;
    }
    if let Some(log) = &inside.log {
        (1..=2).try_for_each(|stream| put(log.as_raw_fd(), stream))?;
    }
    Ok(())
}

/// The root becomes an empty read-only tmpfs, and nothing else stays mounted.
fn empty_root() -> Result<()> {
    let mount = |what: &'static str, kind: *const libc::c_char, target: &std::ffi::CStr, flags, data| {
        // SAFETY: null or null-terminated strings.
        check(unsafe { libc::mount(c"none".as_ptr(), target.as_ptr(), kind, flags, data) })
            .map_err(Error::io(what))
    };
    let harmless = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
    let size = c"size=4k,nr_inodes=2,mode=555".as_ptr().cast();
    mount("making mounts private", null(), c"/", libc::MS_REC | libc::MS_PRIVATE, null())?;
    mount("mounting the empty root", c"tmpfs".as_ptr(), MOUNT_POINT, harmless, size)?;
    let enter = |path: &std::ffi::CStr| {
        // SAFETY: a null-terminated path.
        check(unsafe { libc::chdir(path.as_ptr()) }).map_err(Error::io("entering the empty root"))
    };
    enter(MOUNT_POINT)?;
    // The same folder twice: the old root ends up over the new one, and is taken off (pivot_root(2), NOTES).
    // SAFETY: null-terminated paths.
    check(unsafe { libc::syscall(libc::SYS_pivot_root, c".".as_ptr(), c".".as_ptr()) })
        .map_err(Error::io("changing the root (a host that runs from an initramfs cannot)"))?;
    // SAFETY: a null-terminated path.
    check(unsafe { libc::umount2(c".".as_ptr(), libc::MNT_DETACH) })
        .map_err(Error::io("unmounting the old root"))?;
    enter(c"/")?;
    let flags = harmless | libc::MS_REMOUNT | libc::MS_BIND | libc::MS_RDONLY;
    mount("making the root read-only", null(), c"/", flags, null())
}

fn enter_user_namespace() -> Result<()> {
    // SAFETY: no memory is concerned; this process has one thread.
    let made = check(unsafe { libc::unshare(libc::CLONE_NEWUSER) });
    made.map_err(|source| {
        let way = match source.raw_os_error() {
            Some(libc::ENOSPC) => "sysctl user.max_user_namespaces is 0 or used up: set it higher",
            Some(libc::EINVAL) => "this kernel has none (CONFIG_USER_NS)",
            _ => "the host forbids it",
        };
        let what =
            format!("making a user namespace: {way}, or do without that wall with --no-user-namespace");
        Error::Io { what, source }
    })
}

/// The limits are there (the parent has set them): a machine without them is not started.
fn limited(inside: &Inside) -> Result<()> {
    for (name, resource, value) in limits(inside) {
        let mut found = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: fills the struct that it is given.
        check(unsafe { libc::getrlimit(resource, &raw mut found) })
            .map_err(Error::io(format!("reading the limit {name}")))?;
        if (found.rlim_cur, found.rlim_max) != (value, value) {
            return Err(Error::Jail(format!("the limit {name} is {}, not {value}", found.rlim_max)));
        }
    }
    Ok(())
}

fn check_writable(name: &str, folder: RawFd, uid: u32) -> Result<()> {
    let (mode, flags) = (libc::W_OK | libc::X_OK, libc::AT_EMPTY_PATH | libc::AT_EACCESS);
    // SAFETY: an open descriptor and an empty, null-terminated path. Not libc's faccessat, which knows no empty path.
    check(unsafe { libc::syscall(libc::SYS_faccessat2, folder, c"".as_ptr(), mode, flags) }).map_err(
        Error::io(format!(
            "the folder {name:?} for vsock's sockets must be one that user {uid} can write: chown {uid} it"
        )),
    )
}

/// Everything is closed by the execution but what is handed over.
fn close_others(inside: &Inside) -> Result<()> {
    let failed = || Error::io("closing descriptors");
    // SAFETY: marks descriptors and closes nothing now.
    check(unsafe { libc::syscall(libc::SYS_close_range, 3_u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) })
        .map_err(failed())?;
    for descriptor in &inside.handed {
        // SAFETY: takes the mark off an open descriptor.
        check(unsafe { libc::fcntl(descriptor.as_raw_fd(), libc::F_SETFD, 0) }).map_err(failed())?;
    }
    Ok(())
}

fn execute(inside: &Inside) -> Result<Infallible> {
    let mut arguments: Vec<*const libc::c_char> = inside.arguments.iter().map(|word| word.as_ptr()).collect();
    arguments.push(null());
    let environment: [*const libc::c_char; 1] = [null()];
    // SAFETY: an open descriptor, an empty path, and null-terminated lists of null-terminated strings.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            inside.program.as_raw_fd(),
            c"".as_ptr(),
            arguments.as_ptr(),
            environment.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    Err(Error::io("executing the monitor (is it static, and executable for everybody?)")(
        io::Error::last_os_error(),
    ))
}
