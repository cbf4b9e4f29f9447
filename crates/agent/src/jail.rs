//! The jail: how a monitor comes to life without root, in an empty root folder.
//!
//! ```text
//! agent ── fork+exec ──▶ `roost-agent jail`        single-threaded, root
//!                          │ joins the instance's cgroup, new session
//!                          │ unshares mount, pid, ipc, uts, net, cgroup namespaces
//!                          ├── fork ──▶ pid 1 of the new pid namespace
//!                          │ says the pid │ root := an empty read-only tmpfs, everything else unmounted
//!                          ▼ ends         │ own uid and gid, no group, no capability, no_new_privs, limits
//!                                         │ closes every descriptor but the handed ones
//!                                         ▼ execveat(monitor's descriptor)
//! ```
//! No parent-death signal: the monitor outlives the agent. The report pipe is closed by the exec, so that an empty
//! rest of it means success.

use crate::error::{Error, Result};
use nix::fcntl::AtFlags;
use nix::libc;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::{
    ForkResult, Gid, Uid, chdir, execveat, fork, pivot_root, sethostname, setresgid, setresuid, setsid,
};
use serde::{Deserialize, Serialize};
use std::ffi::CString;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What the jail step is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JailSpec {
    /// The instance; also the host name inside.
    pub id: String,
    /// Written to, to join the cgroup.
    pub cgroup_procs: PathBuf,
    /// A folder of the host that the empty root is mounted over (inside the new namespace only).
    pub mount_point: PathBuf,
    /// User and group id.
    pub uid: u32,
    /// Threads that the monitor may have.
    pub threads: u64,
    /// The monitor's program, open.
    pub program: RawFd,
    /// Its arguments, the program's name first.
    pub arguments: Vec<String>,
    /// Descriptors that it gets, beside standard streams.
    pub keep: Vec<RawFd>,
    /// Where pid and errors are told.
    pub report: RawFd,
}

/// Starts a jailed program and gives its process id. Blocks until it was executed.
///
/// `jailer` is the program whose `jail` subcommand is [`enter`]; `log` takes the program's output.
///
/// # Errors
/// The first thing that failed on the way.
pub fn start(
    jailer: &Path,
    mut spec: JailSpec,
    program: &File,
    handed: &[&OwnedFd],
    log: File,
) -> Result<i32> {
    let (report, theirs) =
        nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(Error::sys("making a pipe"))?;
    spec.program = program.as_raw_fd();
    spec.keep = handed.iter().map(|fd| fd.as_raw_fd()).collect();
    spec.report = theirs.as_raw_fd();
    let told = told(&spec)?;

    let mut inherited: Vec<RawFd> = spec.keep.clone();
    inherited.extend([spec.program, spec.report, told.as_raw_fd()]);
    let mut command = Command::new(jailer);
    command.arg("jail").arg("--spec-fd").arg(told.as_raw_fd().to_string()).env_clear();
    let second = log.try_clone().map_err(Error::io("duplicating the log"))?;
    command.stdin(Stdio::null()).stdout(log).stderr(second);
    // SAFETY: only fcntl, which is async-signal-safe, on descriptors that live until the spawn is over.
    unsafe {
        command.pre_exec(move || inherited.iter().try_for_each(|fd| inherit(*fd)));
    }
    let mut child = command.spawn().map_err(Error::file("start the jail step of", jailer))?;
    drop(theirs);
    let mut text = String::new();
    let read = File::from(report).take(64 * 1024).read_to_string(&mut text);
    let status = child.wait().map_err(Error::io("waiting for the jail step"))?;
    read.map_err(Error::io("reading the jail step's report"))?;
    if let Some(error) = text.lines().find_map(|line| line.strip_prefix("error ")) {
        return Err(Error::NotNow(format!("jail: {error}")));
    }
    let pid = text.lines().find_map(|line| line.strip_prefix("pid ")?.parse().ok());
    pid.ok_or_else(|| Error::NotNow(format!("the jail step ended with {status} and without a word")))
}

/// The spec as a file that needs no name.
fn told(spec: &JailSpec) -> Result<File> {
    let memory = rustix::fs::memfd_create(c"jail", rustix::fs::MemfdFlags::CLOEXEC)
        .map_err(Error::sys("making a memory file"))?;
    let mut file = File::from(memory);
    let text =
        serde_json::to_vec(spec).map_err(|source| Error::Damaged { path: "jail spec".into(), source })?;
    file.write_all(&text).map_err(Error::io("writing the jail spec"))?;
    file.rewind().map_err(Error::io("writing the jail spec"))?;
    Ok(file)
}

fn inherit(fd: RawFd) -> std::io::Result<()> {
    // SAFETY: clears the close-on-exec flag of a number; a bad one is an error.
    let result = unsafe { libc::fcntl(fd, libc::F_SETFD, 0) };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

/// The `jail` subcommand: never returns to the caller's world. Must run in a process with one thread.
pub fn enter(spec_fd: RawFd) -> ! {
    // SAFETY: the agent hands this number over, and nothing else in this fresh process owns it.
    let mut told = unsafe { File::from_raw_fd(spec_fd) };
    let mut text = String::new();
    let spec: JailSpec = match told.read_to_string(&mut text).map(|_| serde_json::from_str(&text)) {
        Ok(Ok(spec)) => spec,
        _ => {
            eprintln!(
                "roost-agent jail: descriptor {spec_fd} holds no jail spec; this is the agent's own subcommand"
            );
            std::process::exit(2);
        }
    };
    // SAFETY: as above.
    let mut report = unsafe { File::from_raw_fd(spec.report) };
    let error = match run(&spec, &mut report) {
        Ok(never) => match never {},
        Err(error) => error,
    };
    let _ = writeln!(report, "error {}", error.chain());
    std::process::exit(1);
}

fn run(spec: &JailSpec, report: &mut File) -> Result<std::convert::Infallible> {
    let own = std::process::id().to_string();
    std::fs::write(&spec.cgroup_procs, own)
        .map_err(Error::file("join the cgroup with", &spec.cgroup_procs))?;
    setsid().map_err(Error::sys("starting a session"))?;
    unshare(
        CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWPID
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWNET
            | CloneFlags::CLONE_NEWCGROUP,
    )
    .map_err(Error::sys("making namespaces"))?;
    // SAFETY: this process has one thread.
    match unsafe { fork() }.map_err(Error::sys("forking"))? {
        ForkResult::Parent { child } => {
            let _ = writeln!(report, "pid {child}");
            std::process::exit(0);
        }
        ForkResult::Child => {}
    }
    empty_root(&spec.mount_point)?;
    sethostname(&spec.id).map_err(Error::sys("setting the host name"))?;
    limit(spec)?;
    become_nobody(spec.uid)?;
    close_others(spec)?;
    exec(spec)
}

/// The root becomes an empty read-only tmpfs, and nothing else stays mounted.
fn empty_root(mount_point: &Path) -> Result<()> {
    let none = None::<&str>;
    let sys = Error::sys::<nix::Error>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .map_err(sys("making mounts private"))?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("none"), mount_point, Some("tmpfs"), flags, Some("size=4k,nr_inodes=2,mode=555"))
        .map_err(sys("mounting the empty root"))?;
    chdir(mount_point).map_err(sys("entering the empty root"))?;
    // The same folder twice: the old root ends up over the new one, and is taken off (pivot_root(2), NOTES).
    pivot_root(".", ".").map_err(sys("changing the root"))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(sys("unmounting the old root"))?;
    chdir("/").map_err(sys("entering the new root"))?;
    let flags = flags | MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    mount(none, "/", none, flags, none).map_err(sys("making the root read-only"))
}

fn limit(spec: &JailSpec) -> Result<()> {
    let files = u64::try_from(spec.keep.len()).unwrap_or(0) + 512;
    for (resource, value) in
        [(Resource::RLIMIT_CORE, 0), (Resource::RLIMIT_NOFILE, files), (Resource::RLIMIT_NPROC, spec.threads)]
    {
        setrlimit(resource, value, value).map_err(Error::sys(format!("limiting {resource:?}")))?;
    }
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
    Ok(())
}

fn become_nobody(uid: u32) -> Result<()> {
    let caps = |error: caps::errors::CapsError| Error::NotNow(format!("dropping capabilities: {error}"));
    for capability in caps::all() {
        // Capabilities that this kernel does not know cannot be had either; what remains is read back.
        let _ = caps::drop(None, caps::CapSet::Bounding, capability);
    }
    caps::clear(None, caps::CapSet::Ambient).map_err(caps)?;
    nix::unistd::setgroups(&[]).map_err(Error::sys("leaving all groups"))?;
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(uid));
    setresgid(gid, gid, gid).map_err(Error::sys("changing the group"))?;
    setresuid(uid, uid, uid).map_err(Error::sys("changing the user"))?;
    nix::sys::prctl::set_no_new_privs().map_err(Error::sys("giving up new privileges"))?;
    for set in
        [caps::CapSet::Effective, caps::CapSet::Permitted, caps::CapSet::Inheritable, caps::CapSet::Bounding]
    {
        let left = caps::read(None, set).map_err(caps)?;
        if !left.is_empty() {
            return Err(Error::Impossible(format!("capabilities are left in the {set:?} set: {left:?}")));
        }
    }
    Ok(())
}

fn close_others(spec: &JailSpec) -> Result<()> {
    // SAFETY: marks descriptors as close-on-exec and closes nothing now.
    let result = unsafe { libc::syscall(libc::SYS_close_range, 3_u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    nix::errno::Errno::result(result).map_err(Error::sys("closing descriptors"))?;
    spec.keep.iter().try_for_each(|fd| inherit(*fd)).map_err(Error::io("handing descriptors over"))
}

fn exec(spec: &JailSpec) -> Result<std::convert::Infallible> {
    let arguments: Vec<CString> = spec
        .arguments
        .iter()
        .map(|argument| CString::new(argument.as_str()))
        .collect::<std::result::Result<_, _>>()
        .map_err(|_| Error::Impossible("an argument holds a NUL byte".into()))?;
    // SAFETY: the agent handed this number over; borrowed for the call only.
    let program = unsafe { std::os::fd::BorrowedFd::borrow_raw(spec.program) };
    let environment: [CString; 0] = [];
    execveat(program.as_fd(), c"", &arguments, &environment, AtFlags::AT_EMPTY_PATH)
        .map_err(Error::sys("executing the monitor (is it static, and executable for all?)"))
}
