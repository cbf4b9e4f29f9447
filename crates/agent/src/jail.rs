//! A monitor's start in its jail: `roost-vmm jail`, which the monitor's program does by itself
//! (`docs/decisions/0015-the-jail-is-the-monitors.md`). All that the monitor needs is handed over; the step opens KVM at most.
//!
//! No parent-death signal: the monitor outlives the agent.

use crate::error::{Error, Result};
use nix::libc;
use std::ffi::OsString;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What the jail step is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JailSpec {
    /// The instance; also the host name inside.
    pub id: String,
    /// The folder of its cgroup, unless that is pretended.
    pub cgroup: Option<PathBuf>,
    /// User and group id.
    pub uid: u32,
    /// Threads that the monitor may have.
    pub threads: u64,
    /// Bytes of the longest file that it may make.
    pub longest_file: u64,
    /// Where its output goes.
    pub log: PathBuf,
    /// What stands behind `run`.
    pub options: Vec<String>,
}

impl JailSpec {
    /// The words behind the program's name.
    fn arguments(&self) -> Vec<OsString> {
        let mut words: Vec<OsString> = vec!["jail".into(), "--daemonize".into()];
        let mut option = |name: &str, value: OsString| words.extend([name.into(), value]);
        option("--id", self.id.clone().into());
        option("--uid", self.uid.to_string().into());
        option("--gid", self.uid.to_string().into());
        if let Some(folder) = &self.cgroup {
            option("--cgroup", folder.clone().into());
        }
        option("--resource-limit", format!("nproc={}", self.threads).into());
        option("--resource-limit", format!("fsize={}", self.longest_file).into());
        option("--log", self.log.clone().into());
        words.extend(["--", "run"].map(OsString::from));
        words.extend(self.options.iter().map(OsString::from));
        words
    }
}

/// Starts a jailed monitor and gives its process id. Blocks until it was executed.
///
/// # Errors
/// What the step says.
pub fn start(program: &Path, spec: &JailSpec, handed: &[&OwnedFd]) -> Result<i32> {
    let inherited: Vec<RawFd> = handed.iter().map(|fd| fd.as_raw_fd()).collect();
    let mut command = Command::new(program);
    command.args(spec.arguments()).env_clear().stdin(Stdio::null());
    let is_spared = is_spared_by_the_oom_killer();
    // SAFETY: only fcntl on descriptors that live until the step is over, open, write and close: all are
    // async-signal-safe, and nothing is allocated.
    unsafe {
        command.pre_exec(move || {
            inherited.iter().try_for_each(|fd| inherit(*fd))?;
            if is_spared { be_as_likely_as_others() } else { Ok(()) }
        });
    }
    let output = command.output().map_err(Error::file("start the jail step of", program))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let said = if said.trim().is_empty() { "without a word" } else { said.trim() };
        return Err(Error::NotNow(format!("the jail step ended ({}): {said}", output.status)));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    text.trim().parse().map_err(|_| Error::NotNow(format!("the jail step gave no process id, but {text:?}")))
}

const OOM_SCORE: &std::ffi::CStr = c"/proc/self/oom_score_adj";

/// Returns true if the kernel's OOM killer prefers other processes to this one (`OOMScoreAdjust=`
/// of the agent's unit).
fn is_spared_by_the_oom_killer() -> bool {
    let score = std::fs::read_to_string("/proc/self/oom_score_adj");
    score.is_ok_and(|score| score.trim().parse::<i32>().is_ok_and(|score| score < 0))
}

/// Resets a monitor's OOM score, which it inherits from the agent.
fn be_as_likely_as_others() -> std::io::Result<()> {
    // SAFETY: the path is a null-terminated string.
    let file = unsafe { libc::open(OOM_SCORE.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC) };
    if file < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: one byte of a string that lives; the descriptor was opened above.
    let written = unsafe { libc::write(file, c"0".as_ptr().cast(), 1) };
    let result = if written == 1 { Ok(()) } else { Err(std::io::Error::last_os_error()) };
    // SAFETY: the descriptor is ours and is used no more.
    unsafe { libc::close(file) };
    result
}

fn inherit(fd: RawFd) -> std::io::Result<()> {
    // SAFETY: clears the close-on-exec flag of a number; a bad one is an error.
    let result = unsafe { libc::fcntl(fd, libc::F_SETFD, 0) };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use roost_vmm::cli::{self, Run};
    use roost_vmm::jail::{Limits, Options};

    fn spec() -> JailSpec {
        JailSpec {
            id: "i-05050505050505050".into(),
            cgroup: Some("/sys/fs/cgroup/roost/m/i-05".into()),
            uid: 0x7000_0007,
            threads: 18,
            longest_file: 1 << 30,
            log: "/var/log/monitor".into(),
            options: ["--hold", "--config-fd", "7", "--fd", "kvm=8"].map(str::to_owned).to_vec(),
        }
    }

    /// The program on the other side takes the very line that is made here.
    #[test]
    fn the_monitor_understands_the_agent() {
        let words = spec().arguments().into_iter().map(|word| word.into_string().unwrap());
        let Ok(cli::Command::Jail(options)) = cli::parse(words) else { panic!("not taken") };
        let run = Run {
            id: Some(spec().id),
            hold: true,
            config_fd: Some(7),
            fds: vec!["kvm=8".into()],
            ..Run::default()
        };
        let expected = Options {
            id: Some(spec().id),
            uid: 0x7000_0007,
            gid: 0x7000_0007,
            cgroup: spec().cgroup,
            limits: Limits { nproc: 18, fsize: Some(1 << 30), ..Limits::default() },
            log: Some(spec().log),
            daemonize: true,
            run,
            ..Options::default()
        };
        assert_eq!(*options, expected);
    }

    #[test]
    fn what_the_step_says_is_the_error() {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("step");
        let start_of = |script: &str| {
            std::fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
            std::fs::set_permissions(&program, mode).unwrap();
            start(&program, &spec(), &[])
        };
        assert_eq!(start_of("echo 4711").unwrap(), 4711);
        for (script, words) in [
            ("echo roost-vmm: jail: no cgroup >&2; exit 5", "no cgroup"),
            ("exit 3", "without a word"),
            ("echo soon", "soon"),
        ] {
            let why = start_of(script).unwrap_err();
            assert!(why.to_string().contains(words) && !why.is_permanent(), "{why}");
        }
    }
}
