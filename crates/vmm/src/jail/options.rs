//! The command line of `roost-vmm jail`, in the shape of Firecracker's jailer.

use std::path::PathBuf;

use crate::cli::{self, Run};

/// How a monitor is jailed.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// The instance: the host name inside, and the monitor's `--id`.
    pub id: Option<String>,
    /// User id inside and outside.
    pub uid: u32,
    /// Group id inside and outside.
    pub gid: u32,
    /// An existing folder of cgroup v2.
    pub cgroup: Option<PathBuf>,
    /// The network namespace that taps are opened in.
    pub netns: Option<PathBuf>,
    /// Limits that are not left as they are by default.
    pub limits: Limits,
    /// A program in place of this one.
    pub exec_file: Option<PathBuf>,
    /// End as soon as the monitor is there.
    pub daemonize: bool,
    /// Where the monitor's output goes.
    pub log: Option<PathBuf>,
    /// Do without a user namespace.
    pub no_user_namespace: bool,
    /// What is run.
    pub run: Run,
}

/// What `setrlimit` is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Descriptors; none: as many as are handed over, and 512.
    pub no_file: Option<u64>,
    /// Threads.
    pub nproc: u64,
    /// Bytes of the longest file; none: no limit, as a disk may be of any size.
    pub fsize: Option<u64>,
    /// Bytes of locked memory.
    pub memlock: u64,
}

impl Default for Limits {
    /// Threads: 32 vCPUs, one per disk, KVM's and io_uring's workers. Locked memory: nothing in the monitor locks any.
    fn default() -> Self {
        Self { no_file: None, nproc: 256, fsize: None, memlock: 0 }
    }
}

/// Longest host name (`__NEW_UTS_LEN`).
const MAX_ID: usize = 64;
/// "no id" of `setresuid`, and of nobody.
const NO_ID: u32 = u32::MAX;

/// What `roost-vmm jail --help` says.
pub const HELP: &str = "\
Runs one virtual machine in a jail: without root, without capabilities, in an empty read-only root folder.

Usage: roost-vmm jail --uid N --gid N [OPTIONS] -- run [OPTIONS OF RUN]

What stands behind `--` is what would run the machine without a jail. Its configuration and all that this names (kernel, disks,
taps, console, folder of vsock's sockets), the API's socket and /dev/kvm are opened first, by root, and handed over.

Options:
  --uid N                  The user that the monitor becomes, not root; best one of its own per machine
  --gid N                  Its group
  --id TEXT                The machine's name, 1-64 of A-Z a-z 0-9 - _: its host name inside, and --id of run
  --cgroup FOLDER          Joins this cgroup (v2), which is there already with its limits
  --netns FILE             The network namespace whose taps the configuration names, for example /run/netns/web1. The monitor
                           itself is always alone in a fresh one
  --resource-limit NAME=N  no-file [what is handed over, and 512], nproc (threads) [256], fsize (bytes of a file) [no limit],
                           memlock (bytes) [0]; may be given several times. Core dumps are always off
  --log FILE               Appends the monitor's output to this file
  --daemonize              Ends as soon as the monitor runs, and prints its process id. Its stdin is /dev/null, its output goes
                           to --log. Without it this process stays until the monitor ends, passes signals on, takes the
                           monitor with it when it is killed, and ends with the monitor's exit code
  --exec-file FILE         Executes this static program instead of this one
  --no-user-namespace      Does without a user namespace, for hosts where there are none
  -h, --help

Must be started as root. Exit codes before the monitor runs: 2 wrong command line or configuration, 3 no KVM, 5 the jail could not be built.
";

/// Parses what stands behind `jail`. Nothing: help is asked for.
///
/// # Errors
/// A sentence that names the argument.
pub fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Option<Options>, String> {
    let mut options = Options::default();
    let (mut uid, mut gid) = (None, None);
    let mut limits = Vec::new();
    loop {
        let Some(argument) = arguments.next() else {
            return Err("jail needs `-- run` and run's options at its end".to_owned());
        };
        if argument == "--" {
            break;
        }
        let (name, attached) = cli::split(&argument);
        match name {
            "-h" | "--help" => return Ok(None),
            "--daemonize" if attached.is_none() => {
                options.daemonize = true;
                continue;
            }
            "--no-user-namespace" if attached.is_none() => {
                options.no_user_namespace = true;
                continue;
            }
            "--id" | "--uid" | "--gid" | "--cgroup" | "--netns" | "--resource-limit" | "--exec-file"
            | "--log" => {}
            _ => return Err(format!("jail has no option {argument:?}; see roost-vmm jail --help")),
        }
        let value = attached.or_else(|| arguments.next()).ok_or_else(|| format!("{name} needs a value"))?;
        match name {
            "--id" => cli::once(name, &mut options.id, value)?,
            "--uid" => cli::once(name, &mut uid, id(name, &value)?)?,
            "--gid" => cli::once(name, &mut gid, id(name, &value)?)?,
            "--cgroup" => cli::once(name, &mut options.cgroup, value.into())?,
            "--netns" => cli::once(name, &mut options.netns, value.into())?,
            "--exec-file" => cli::once(name, &mut options.exec_file, value.into())?,
            "--log" => cli::once(name, &mut options.log, value.into())?,
            _ => limits.push(value),
        }
    }
    options.uid = uid.ok_or("jail needs --uid N, the user that the monitor becomes")?;
    options.gid = gid.ok_or("jail needs --gid N, the group that the monitor becomes")?;
    options.limits = parse_limits(&limits)?;
    options.run = match cli::parse(arguments)? {
        cli::Command::Run(run) => run,
        cli::Command::Say(_) => return Ok(None),
        _ => return Err("jail: behind `--` stands run and its options, and no other command".to_owned()),
    };
    if options.run.open_paths {
        return Err(
            "jail: a jailed monitor has no paths that --open-paths could open; hand files over with \
                    --fd NAME=N or PUT /descriptors/NAME"
                .to_owned(),
        );
    }
    let name = options.id.take().or_else(|| options.run.id.clone());
    options.id = name.map(check_name).transpose()?;
    if options.run.id.is_none() {
        options.run.id.clone_from(&options.id);
    }
    Ok(Some(options))
}

/// What becomes a host name.
fn check_name(name: String) -> Result<String, String> {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    if (1..=MAX_ID).contains(&name.len()) && name.bytes().all(fits) {
        Ok(name)
    } else {
        Err(format!("--id {name:?} is not 1–{MAX_ID} of A-Z a-z 0-9 - _, as a jail's host name must be"))
    }
}

fn id(name: &str, value: &str) -> Result<u32, String> {
    match value.parse() {
        Ok(0) => Err(format!("{name} 0 is root, which a jailed monitor must not be")),
        Ok(number) if number != NO_ID => Ok(number),
        _ => Err(format!("{name} {value:?} is no id of 1–{}", NO_ID - 1)),
    }
}

fn parse_limits(texts: &[String]) -> Result<Limits, String> {
    let mut limits = Limits::default();
    for text in texts {
        let parsed = text.split_once('=').and_then(|(name, n)| Some((name, n.parse::<u64>().ok()?)));
        match parsed {
            Some(("no-file", number)) => limits.no_file = Some(number),
            Some(("nproc", number)) => limits.nproc = number,
            Some(("fsize", number)) => limits.fsize = Some(number),
            Some(("memlock", number)) => limits.memlock = number,
            _ => {
                return Err(format!(
                    "--resource-limit {text:?} is not of the form NAME=N with no-file, nproc, fsize or memlock"
                ));
            }
        }
    }
    Ok(limits)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Option<Options>, String> {
        parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn a_whole_line_is_taken() {
        let line = "--id web-1 --uid 5001 --gid=5002 --cgroup /c --netns n --resource-limit nproc=9 \
                    --resource-limit=fsize=10 --log l --daemonize -- run --config a --api-sock b";
        let options = parsed(line).unwrap().unwrap();
        let run = Run {
            config: Some("a".into()),
            api_sock: Some("b".into()),
            id: Some("web-1".into()),
            ..Run::default()
        };
        let expected = Options {
            id: Some("web-1".into()),
            uid: 5001,
            gid: 5002,
            cgroup: Some("/c".into()),
            netns: Some("n".into()),
            limits: Limits { nproc: 9, fsize: Some(10), ..Limits::default() },
            log: Some("l".into()),
            daemonize: true,
            run,
            ..Options::default()
        };
        assert_eq!(options, expected);
        let options = parsed("--uid 1 --gid 1 -- run --id own").unwrap().unwrap();
        assert_eq!(options.id.as_deref(), Some("own"));
        for line in ["--help", "--uid 1 -h", "--uid 1 --gid 1 -- run --help"] {
            assert_eq!(parsed(line), Ok(None), "{line}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        let long = "a".repeat(MAX_ID + 1);
        for (line, word) in [
            ("", "-- run"),
            ("--uid 1 --gid 1", "-- run"),
            ("--gid 1 -- run", "--uid"),
            ("--uid 1 -- run", "--gid"),
            ("--uid 0 --gid 1 -- run", "--uid 0 is root"),
            ("--uid 1 --gid 0 -- run", "--gid 0 is root"),
            ("--uid 4294967295 --gid 1 -- run", "4294967295"),
            ("--uid me --gid 1 -- run", "\"me\""),
            ("--uid 1 --uid 2 --gid 1 -- run", "twice"),
            ("--uid 1 --gid 1 --fast -- run", "--fast"),
            ("--uid 1 --gid 1 --daemonize=yes -- run", "--daemonize=yes"),
            ("--uid 1 --gid 1 --resource-limit cpu=1 -- run", "cpu=1"),
            ("--uid 1 --gid 1 --resource-limit nproc=many -- run", "nproc=many"),
            ("--uid 1 --gid 1 -- probe", "no other command"),
            ("--uid 1 --gid 1 -- run --fast", "--fast"),
            ("--uid 1 --gid 1 -- run --open-paths", "--open-paths"),
            ("--uid 1 --gid 1 --id a/b -- run", "a/b"),
            (&format!("--uid 1 --gid 1 --id {long} -- run"), "1–64"),
        ] {
            let why = parsed(line).unwrap_err();
            assert!(why.contains(word), "{line:?} gave {why:?}");
        }
    }

    #[test]
    fn help_names_every_option() {
        for name in [
            "--id",
            "--uid",
            "--gid",
            "--cgroup",
            "--netns",
            "--resource-limit",
            "--exec-file",
            "--log",
            "--daemonize",
            "--no-user-namespace",
        ] {
            assert!(HELP.contains(&format!("\n  {name} ")), "{name}");
        }
    }
}
