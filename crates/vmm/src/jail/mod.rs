//! The jail: how a monitor comes to run without root, in an empty root folder.
//!
//! ```text
//! `roost-vmm jail`     single-threaded, root
//!   │ opens all that the configuration names (files.rs): no path is of use inside
//!   ├── fork ──▶ process 1 of a fresh pid namespace (inside.rs), new session
//!   │ cgroup   ◀─ asks │
//!   │                  │ unshares mount, ipc, uts, net and cgroup namespaces, owned by the host's root
//!   │                  │ root := an empty read-only tmpfs, everything else unmounted
//!   │                  │ no groups, a user namespace
//!   │ id maps  ◀─ asks │
//!   │                  │ limits, uid and gid, no capability (read back), no_new_privs, landlock
//!   │                  │ closes every descriptor but the handed ones
//!   │ hears of success ▼ execveat(the program's descriptor)
//!   ▼ ends (--daemonize), or goes on without root until the monitor ends
//! ```
//! Why the user namespace comes last: what is made in it is owned by it, and whoever got capabilities in it, by a bug of the kernel's
//! say, would have them over the mounts and the network too. As it is, it owns nothing, and one id is mapped in it.
//! The ids inside are the host's, so that files, limits and other processes see the user that they would see without it.
//!
//! Until the program is executed the child has a parent-death signal, and each side ends when the other is gone: a kill at any
//! point leaves nothing. With `--daemonize` the monitor outlives the step, as it outlives the agent.

mod files;
mod inside;
mod landlock;
pub mod options;
mod privileges;
mod waiter;

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::cli::Run;
use crate::config::VmConfig;
use crate::descriptors::Descriptors;
use crate::error::{Error, Result};
use crate::{log, stand_alone};

pub use options::{Limits, Options};

/// The child wants to be put into its cgroup.
const JOIN: u8 = b'j';
/// The child is in its user namespace, and wants ids there.
const MAP: u8 = b'm';
const LIMIT: u8 = b'l';
/// The child executes its program next.
const EXECUTE: u8 = b'x';
/// What follows is why the child gave up.
const FAILED: u8 = b'e';
/// The parent has done what was asked.
const DONE: u8 = b'd';

/// All that the child needs.
struct Inside {
    options: Options,
    /// The program, and its arguments.
    program: File,
    arguments: Vec<CString>,
    /// What it gets, beside standard streams.
    handed: Vec<OwnedFd>,
    /// Of these: folders in which it makes sockets, with their names.
    folders: Vec<(String, RawFd)>,
    log: Option<File>,
}

/// Builds the jail and runs the monitor in it. The calling process must have one thread. Gives the exit code: with `--daemonize` 0 as
/// soon as the monitor runs, else the monitor's own.
///
/// # Errors
/// Whatever kept the monitor from running; nothing is left behind then.
pub fn run(options: Options) -> Result<i32> {
    // SAFETY: plain call without arguments.
    if unsafe { libc::geteuid() } != 0 {
        return Err(Error::Jail(
            "must be started as root, which it gives up for the monitor: try sudo".into(),
        ));
    }
    let inside = prepare(options)?;
    // Before the fork, so that no signal falls between it and the waiting.
    let signals = waiter::block().map_err(Error::io("blocking signals"))?;
    let (talk, theirs) = UnixStream::pair().map_err(Error::io("making a socket pair"))?;
    unshare(libc::CLONE_NEWPID, "making a pid namespace")?;
    // SAFETY: this process has one thread, so the child's copy is whole; it never returns from here.
    let pid = match unsafe { libc::fork() } {
        0 => {
            drop(talk);
            inside::enter(&inside, theirs, &signals)
        }
        -1 => return Err(Error::io("forking")(io::Error::last_os_error())),
        pid => pid,
    };
    drop(theirs);
    if let Err(error) = accompany(&talk, pid, &inside) {
        waiter::end(pid);
        return Err(error);
    }
    if inside.options.daemonize {
        // Whoever closed our stdout does not want to know.
        let _ = writeln!(io::stdout(), "{pid}");
        return Ok(0);
    }
    let Options { uid, gid, .. } = inside.options;
    drop((inside, talk));
    waiter::wait(pid, uid, gid)
}

/// Opens everything, and says it to the monitor by descriptors.
fn prepare(options: Options) -> Result<Inside> {
    if let Some(path) = &options.netns {
        enter_network(path)?;
    }
    // Each option of `run` is here, so that none is forgotten.
    let Run {
        config: _,
        config_fd: _,
        fds,
        api_sock: _,
        api_fd: _,
        hold,
        open_paths: _,
        id,
        logger,
        metrics_path,
    } = &options.run;
    let run = &options.run;
    let descriptors = Descriptors::from_options(fds)?;
    for (name, what) in [(&logger.log_path, "log"), (metrics_path, "metrics")] {
        if let Some(name) = name.as_ref().filter(|name| !descriptors.has(name)) {
            descriptors.insert(name, descriptors.output(name, what)?)?;
        }
    }
    let text = stand_alone::config_text(run)?;
    let config = text.as_deref().map(VmConfig::from_json).transpose()?;
    if let Some(config) = config {
        files::open(&config, &descriptors)?;
    }
    files::open_kvm(&descriptors)?;
    let listener = stand_alone::listener(run)?;
    let path = options.exec_file.as_deref().unwrap_or(Path::new("/proc/self/exe"));
    let program = File::open(path).map_err(Error::io(format!("opening the program {}", path.display())))?;
    let log = options.log.as_ref().map(|path| {
        let file = File::options().append(true).create(true).open(path);
        file.map_err(Error::io(format!("opening the log {}", path.display())))
    });
    let log = log.transpose()?;

    let mut words = vec!["roost-vmm".to_owned(), "run".to_owned()];
    let mut handed = Vec::new();
    let mut hand = |option: &str, name: &str, descriptor: OwnedFd| {
        words.extend([option.to_owned(), format!("{name}{}", descriptor.as_raw_fd())]);
        handed.push(descriptor);
    };
    if let Some(text) = text {
        hand("--config-fd", "", memory_file(&text).map_err(Error::io("keeping the configuration"))?.into());
    }
    if let Some(listener) = listener {
        hand("--api-fd", "", listener.into());
    }
    let mut folders = Vec::new();
    for (name, descriptor) in descriptors.take_all() {
        let option = format!("{name}=");
        let Some(mount) = files::folder(&name, &descriptor)? else {
            hand("--fd", &option, descriptor);
            continue;
        };
        folders.push((name, mount.as_raw_fd()));
        hand("--fd", &option, mount);
    }
    words.extend(hold.then(|| "--hold".to_owned()));
    words.extend(logger.show_level.unwrap_or(false).then(|| "--show-level".to_owned()));
    words.extend(logger.show_log_origin.unwrap_or(false).then(|| "--show-log-origin".to_owned()));
    let level = logger.level.map(|level| format!("{level:?}"));
    for (option, value) in [
        ("--id", id),
        ("--log-path", &logger.log_path),
        ("--level", &level),
        ("--module", &logger.module),
        ("--metrics-path", metrics_path),
    ] {
        words.extend(value.iter().flat_map(|value| [option.to_owned(), value.clone()]));
    }
    let arguments = words.into_iter().map(CString::new).collect::<std::result::Result<_, _>>();
    let arguments = arguments.map_err(|_| Error::Config("a name holds a NUL byte".into()))?;
    Ok(Inside { options, program, arguments, handed, folders, log })
}

/// Taps are looked for where this process is. The monitor will be elsewhere, alone.
fn enter_network(path: &Path) -> Result<()> {
    let failed = || Error::io(format!("entering the network namespace {}", path.display()));
    let namespace = File::open(path).map_err(failed())?;
    // SAFETY: plain call on an open descriptor.
    if unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) } < 0 {
        return Err(failed()(io::Error::last_os_error()));
    }
    Ok(())
}

/// A file without a name: a configuration may have come through a pipe.
fn memory_file(text: &str) -> io::Result<File> {
    // SAFETY: the name is null-terminated.
    let descriptor = unsafe { libc::memfd_create(c"config".as_ptr(), libc::MFD_CLOEXEC) };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: memfd_create has just made it.
    let mut file = unsafe { File::from_raw_fd(descriptor) };
    file.write_all(text.as_bytes())?;
    file.rewind()?;
    Ok(file)
}

/// Does for the child what it cannot do from where it is, until it has executed its program.
fn accompany(mut talk: &UnixStream, pid: libc::pid_t, inside: &Inside) -> Result<()> {
    let options = &inside.options;
    let mut last = 0;
    loop {
        let mut word = [0];
        let count = talk.read(&mut word).map_err(Error::io("listening to the process inside"))?;
        if count == 0 {
            // The socket is closed by the execution, or by the child's end.
            return if last == EXECUTE {
                Ok(())
            } else {
                Err(Error::Jail("the process inside was killed before it could execute the monitor".into()))
            };
        }
        [last] = word;
        match last {
            JOIN => join(pid, options)?,
            MAP => map(pid, options).map_err(Error::io("mapping ids in the user namespace"))?,
            LIMIT => limit(pid, inside)?,
            EXECUTE => continue,
            _ => {
                let mut why = String::new();
                talk.take(64 * 1024)
                    .read_to_string(&mut why)
                    .map_err(Error::io("listening to the process inside"))?;
                return Err(Error::Jail(why));
            }
        }
        talk.write_all(&[DONE]).map_err(Error::io("answering the process inside"))?;
    }
}

fn join(pid: libc::pid_t, options: &Options) -> Result<()> {
    let Some(folder) = &options.cgroup else { return Ok(()) };
    let joined = std::fs::OpenOptions::new().write(true).open(folder.join("cgroup.procs"));
    joined.and_then(|mut file| file.write_all(pid.to_string().as_bytes())).map_err(Error::io(format!(
        "joining the cgroup {} (it must be there, and of cgroup v2)",
        folder.display()
    )))
}

/// One id of each kind, which is the host's. Nobody in there can change groups any more (user_namespaces(7)).
fn map(pid: libc::pid_t, options: &Options) -> io::Result<()> {
    let Options { uid, gid, .. } = options;
    let write = |name: &str, text: String| std::fs::write(format!("/proc/{pid}/{name}"), text);
    write("setgroups", "deny".into())?;
    write("gid_map", format!("{gid} {gid} 1\n"))?;
    write("uid_map", format!("{uid} {uid} 1\n"))
}

/// Descriptors that the monitor opens itself: devices' events, timers, queues.
const OWN_FILES: u64 = 512;

/// What the monitor's process may have at most.
fn limits(inside: &Inside) -> impl Iterator<Item = (&'static str, libc::__rlimit_resource_t, u64)> {
    let limits = inside.options.limits;
    let handed = u64::try_from(inside.handed.len()).unwrap_or(0);
    let all = [
        // Not 0, with which a program that takes core dumps is still started (core(5)).
        ("core", libc::RLIMIT_CORE, Some(1)),
        ("no-file", libc::RLIMIT_NOFILE, Some(limits.no_file.unwrap_or(handed + OWN_FILES))),
        ("nproc", libc::RLIMIT_NPROC, Some(limits.nproc)),
        ("memlock", libc::RLIMIT_MEMLOCK, Some(limits.memlock)),
        ("fsize", libc::RLIMIT_FSIZE, limits.fsize),
    ];
    all.into_iter().filter_map(|(name, resource, value)| Some((name, resource, value?)))
}

/// Sets them from outside, as only root there may raise one, and after the user namespace was made: the kernel counts threads and locked
/// memory per namespace, and the limits that its maker had then would be held against all that root has.
fn limit(pid: libc::pid_t, inside: &Inside) -> Result<()> {
    for (name, resource, value) in limits(inside) {
        let limit = libc::rlimit { rlim_cur: value, rlim_max: value };
        // SAFETY: reads the struct that it is given; the old limit is not asked for.
        check(unsafe { libc::prlimit(pid, resource, &raw const limit, std::ptr::null_mut()) })
            .map_err(Error::io(format!("setting the limit {name} to {value}")))?;
    }
    Ok(())
}

fn unshare(flags: libc::c_int, what: &str) -> Result<()> {
    // SAFETY: no memory is concerned; this process has one thread.
    check(unsafe { libc::unshare(flags) }).map_err(Error::io(what))
}

/// The host's error of a call that says −1 for it.
fn check(result: impl Into<i64>) -> io::Result<()> {
    if result.into() < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Says what walls stand, where the monitor's output goes.
fn announce(options: &Options, landlock: Option<u32>, cores: &str) {
    let user = if options.no_user_namespace { "no user namespace (as asked)" } else { "a user namespace" };
    let landlock = match landlock {
        Some(abi) => format!("landlock ABI {abi}"),
        None => "no landlock in this kernel: the empty root stands without it".to_owned(),
    };
    log::line(&format!("jailed: user {}, group {}, {user}, {landlock}, {cores}", options.uid, options.gid));
}
