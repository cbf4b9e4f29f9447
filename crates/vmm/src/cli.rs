//! The command line. By hand: a parser for every taste costs each instance's process more memory than its devices do.

use std::path::PathBuf;

use crate::jail;
use crate::log::{Level, LoggerConfig};
use crate::page_server;

/// What is to be done.
#[derive(Debug, PartialEq, Eq)]
pub enum Command {
    /// Run a machine.
    Run(Run),
    /// Run a machine in a jail.
    Jail(Box<jail::Options>),
    /// Measure what KVM can do.
    Probe {
        /// Print JSON.
        json: bool,
    },
    /// Put a diff snapshot's memory file on top of the one before it.
    Rebase {
        /// The memory file that is changed.
        base: PathBuf,
        /// What is put on top.
        diff: PathBuf,
    },
    /// Bring the memory of clones page by page.
    ServeMemory(page_server::Options),
    /// Print this host's CPU as a CPU template.
    DumpCpu,
    /// Print the CPU template that makes the hosts of these dumps alike.
    CommonCpu(Vec<PathBuf>),
    /// Print this text and do nothing.
    Say(String),
}

/// How a machine is run.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Run {
    /// The configuration file.
    pub config: Option<PathBuf>,
    /// The configuration's descriptor.
    pub config_fd: Option<i32>,
    /// `NAME=N` of each handed descriptor.
    pub fds: Vec<String>,
    /// Where the API's socket is made.
    pub api_sock: Option<PathBuf>,
    /// The API's listening socket.
    pub api_fd: Option<i32>,
    /// Wait for InstanceStart.
    pub hold: bool,
    /// Open paths that requests name after the lock-down, in a process of its own.
    pub open_paths: bool,
    /// The instance's name.
    pub id: Option<String>,
    /// The log; what the configuration says of it counts more.
    pub logger: LoggerConfig,
    /// Where metrics go, if the configuration does not say so.
    pub metrics_path: Option<String>,
}

const HELP: &str = "\
Runs one virtual machine with KVM.

Usage: roost-vmm run [OPTIONS]     Runs one virtual machine until its guest ends
       roost-vmm jail [OPTIONS] -- run [OPTIONS]
                                   The same without root and in an empty root folder: see roost-vmm jail --help
       roost-vmm probe [--json]    Measures what this host's KVM can do with small guests, for `roost doctor`:
                                   exit code 0 when Linux guests run here, 3 when they do not
       roost-vmm rebase --base FILE --diff FILE
                                   Puts the memory file of a diff snapshot on top of the memory file of the snapshot
                                   before it, which then is a full memory file of the diff's snapshot
       roost-vmm serve-memory --memory FILE --socket PATH [--working-set FILE [--seconds N]]
                                   Brings memory from a full snapshot's memory file to machines that load the snapshot with
                                   the \"Uffd\" backend at that socket, page by page, until it gets SIGTERM or SIGINT. Which
                                   pages the first machine touches within N seconds [default: 10] is kept in the working
                                   set: the next ones get these at once, before they ask
       roost-vmm cpu-template dump Prints this host's CPU, as a guest would have it, in the shape of a CPU template
       roost-vmm cpu-template common FILE FILE…
                                   Prints the CPU template of what the hosts of these dumps all have: a guest started with it
                                   on one of them goes on from its snapshot on any other
       roost-vmm [--api-sock PATH | --no-api] [--config-file PATH] [--id TEXT]
                                   The same as run with --open-paths, by Firecracker's options, for programs that start
                                   a program named firecracker [default of --api-sock: /run/firecracker.socket]
       roost-vmm --help | --version

Options of run:
  --config PATH     The configuration, a JSON file in the shape of Firecracker's
  --config-fd N     The configuration, from an open descriptor
  --fd NAME=N       Hands over an open descriptor under a name that the configuration uses. `kvm` is /dev/kvm
  --api-sock PATH   Serves the API on a unix socket made at this path
  --api-fd N        Serves the API on an open, listening unix socket
  --hold            Builds everything and locks down, then waits for InstanceStart instead of starting at once
  --open-paths      Lets requests name paths also after the start (a snapshot's files, another disk): a second process opens
                    them. Without it they can name handed descriptors alone
  --id TEXT         Names the instance in messages and in `GET /` [default: anonymous]
  --log-path PATH   Appends messages to this file or named pipe instead of stderr
  --level LEVEL     Which messages: Off, Error, Warning, Info, Debug, Trace [default: Info]
  --module MODULE   Only messages of this module of the program
  --show-level      Each message has its level
  --show-log-origin Each message has the place in the program that wrote it
  --metrics-path PATH
                    Appends metrics to this file or named pipe: a line of JSON at the start, each minute, and at the end

Exit codes of run:
  0  the guest powered itself off
  1  a fault in the monitor itself
  2  wrong command line or configuration; nothing was started
  3  KVM is missing, forbidden, or refused a call
  4  the guest crashed (registers and instruction bytes are on stderr)
  5  a file, tap, socket or other host object failed
  6  a thread made a forbidden system call
  7  ended by ForceStop, SIGTERM or SIGINT
  8  the guest reset itself and \"on_reset\" is \"exit\"
";

/// Parses the arguments behind the program's name.
///
/// # Errors
/// A sentence that names the argument.
pub fn parse(arguments: impl IntoIterator<Item = String>) -> Result<Command, String> {
    let mut arguments = arguments.into_iter();
    match arguments.next().as_deref() {
        Some("run") => parse_run(arguments, Names::Ours),
        Some("jail") => {
            let options = jail::options::parse(arguments)?;
            Ok(options
                .map_or_else(|| Command::Say(jail::options::HELP.to_owned()), |o| Command::Jail(Box::new(o))))
        }
        Some("probe") => match (arguments.next().as_deref(), arguments.next()) {
            (None, _) => Ok(Command::Probe { json: false }),
            (Some("--json"), None) => Ok(Command::Probe { json: true }),
            (Some("-h" | "--help"), _) => Ok(Command::Say(HELP.to_owned())),
            (Some(other), _) => Err(format!("probe takes --json, not {other:?}")),
        },
        Some("rebase") => parse_rebase(arguments),
        Some("serve-memory") => parse_serve_memory(arguments),
        Some("cpu-template") => parse_cpu_template(arguments),
        Some("-h" | "--help" | "help") => Ok(Command::Say(HELP.to_owned())),
        Some("-V" | "--version") => {
            Ok(Command::Say(concat!("roost-vmm ", env!("CARGO_PKG_VERSION"), "\n").to_owned()))
        }
        Some(option) if option.starts_with("--") => {
            let all = std::iter::once(option.to_owned()).chain(arguments);
            parse_run(all, Names::Firecracker)
        }
        Some(other) => Err(format!(
            "there is no command {other:?}; run, jail, probe, rebase, serve-memory, cpu-template and --help are there"
        )),
        None => Err(
            "what should be done? run, jail, probe, rebase, serve-memory, cpu-template and --help are there"
                .to_owned(),
        ),
    }
}

fn parse_cpu_template(mut arguments: impl Iterator<Item = String>) -> Result<Command, String> {
    let what = arguments.next();
    let rest: Vec<String> = arguments.collect();
    if what.iter().chain(&rest).any(|argument| matches!(argument.as_str(), "-h" | "--help")) {
        return Ok(Command::Say(HELP.to_owned()));
    }
    match (what.as_deref(), rest.as_slice()) {
        (Some("dump"), []) => Ok(Command::DumpCpu),
        (Some("dump"), [other, ..]) => Err(format!("cpu-template dump takes nothing, not {other:?}")),
        (Some("common"), [_, _, ..]) => Ok(Command::CommonCpu(rest.into_iter().map(PathBuf::from).collect())),
        (Some("common"), _) => Err("cpu-template common needs the dumps of two hosts or more".to_owned()),
        _ => Err("cpu-template needs dump, or common FILE FILE…".to_owned()),
    }
}

fn parse_rebase(mut arguments: impl Iterator<Item = String>) -> Result<Command, String> {
    let (mut base, mut diff) = (None, None);
    while let Some(argument) = arguments.next() {
        let (name, attached) = split(&argument);
        let target = match name {
            "-h" | "--help" => return Ok(Command::Say(HELP.to_owned())),
            "--base" => &mut base,
            "--diff" => &mut diff,
            _ => return Err(format!("rebase has no option {argument:?}; see roost-vmm --help")),
        };
        let value = attached.or_else(|| arguments.next()).ok_or_else(|| format!("{name} needs a value"))?;
        once(name, target, value.into())?;
    }
    match (base, diff) {
        (Some(base), Some(diff)) => Ok(Command::Rebase { base, diff }),
        _ => Err("rebase needs --base FILE and --diff FILE".to_owned()),
    }
}

fn parse_serve_memory(mut arguments: impl Iterator<Item = String>) -> Result<Command, String> {
    let (mut memory, mut socket, mut working_set, mut seconds) = (None, None, None, None);
    while let Some(argument) = arguments.next() {
        let (name, attached) = split(&argument);
        let place = match name {
            "-h" | "--help" => return Ok(Command::Say(HELP.to_owned())),
            "--memory" => Some(&mut memory),
            "--socket" => Some(&mut socket),
            "--working-set" => Some(&mut working_set),
            "--seconds" => None,
            _ => return Err(format!("serve-memory has no option {argument:?}; see roost-vmm --help")),
        };
        let value = attached.or_else(|| arguments.next()).ok_or_else(|| format!("{name} needs a value"))?;
        match place {
            Some(place) => once(name, place, PathBuf::from(value))?,
            None => {
                let number = value.parse().ok().filter(|seconds| (1..=3600).contains(seconds));
                let number = number.ok_or_else(|| format!("{name} {value:?}: 1 to 3600 are taken"))?;
                once(name, &mut seconds, number)?;
            }
        }
    }
    if seconds.is_some() && working_set.is_none() {
        return Err("--seconds says how long a working set is made: it needs --working-set FILE".to_owned());
    }
    let (Some(memory), Some(socket)) = (memory, socket) else {
        return Err("serve-memory needs --memory FILE and --socket PATH".to_owned());
    };
    let seconds = seconds.unwrap_or(10);
    Ok(Command::ServeMemory(page_server::Options { memory, socket, working_set, seconds }))
}

/// Whose options are taken beside those that both have.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Names {
    Ours,
    Firecracker,
}

/// Where Firecracker serves its API when nobody says where.
const FIRECRACKER_SOCKET: &str = "/run/firecracker.socket";

fn parse_run(mut arguments: impl Iterator<Item = String>, names: Names) -> Result<Command, String> {
    let (mut run, mut no_api) = (Run::default(), false);
    while let Some(argument) = arguments.next() {
        let (name, attached) = split(&argument);
        match name {
            "-h" | "--help" => return Ok(Command::Say(HELP.to_owned())),
            "--hold" if attached.is_none() => {
                run.hold = true;
                continue;
            }
            "--open-paths" if attached.is_none() => {
                run.open_paths = true;
                continue;
            }
            "--no-api" if attached.is_none() && names == Names::Firecracker => {
                no_api = true;
                continue;
            }
            "--config-file" if names == Names::Firecracker => {}
            "--no-seccomp" | "--seccomp-filter" => {
                return Err(format!("{name} is not there: every thread has the filter that belongs to it"));
            }
            "--show-level" if attached.is_none() => {
                run.logger.show_level = Some(true);
                continue;
            }
            "--show-log-origin" if attached.is_none() => {
                run.logger.show_log_origin = Some(true);
                continue;
            }
            "--config" | "--config-fd" | "--fd" | "--api-sock" | "--api-fd" | "--id" | "--log-path"
            | "--level" | "--module" | "--metrics-path" => {}
            _ => return Err(format!("run has no option {argument:?}; see roost-vmm --help")),
        }
        let value = attached.or_else(|| arguments.next()).ok_or_else(|| format!("{name} needs a value"))?;
        match name {
            "--config" | "--config-file" => once(name, &mut run.config, value.into())?,
            "--config-fd" => once(name, &mut run.config_fd, number(name, &value)?)?,
            "--api-sock" => once(name, &mut run.api_sock, value.into())?,
            "--api-fd" => once(name, &mut run.api_fd, number(name, &value)?)?,
            "--id" => once(name, &mut run.id, value)?,
            "--log-path" => once(name, &mut run.logger.log_path, value)?,
            "--level" => once(name, &mut run.logger.level, Level::parse(&value)?)?,
            "--module" => once(name, &mut run.logger.module, value)?,
            "--metrics-path" => once(name, &mut run.metrics_path, value)?,
            _ => run.fds.push(value),
        }
    }
    if run.config.is_some() && run.config_fd.is_some() {
        return Err("--config and --config-fd are both there".to_owned());
    }
    if run.api_sock.is_some() && run.api_fd.is_some() {
        return Err("--api-sock and --api-fd are both there".to_owned());
    }
    let served = run.api_sock.is_some() || run.api_fd.is_some();
    if no_api && served {
        return Err("--no-api and the API's socket are both there".to_owned());
    }
    if names == Names::Firecracker && !no_api {
        run.open_paths = true;
        if !served {
            run.api_sock = Some(FIRECRACKER_SOCKET.into());
        }
    }
    Ok(Command::Run(run))
}

/// An option's name, and its value if that is behind a `=`.
pub(crate) fn split(argument: &str) -> (&str, Option<String>) {
    match argument.split_once('=') {
        Some((name, value)) => (name, Some(value.to_owned())),
        None => (argument, None),
    }
}

/// Takes an option's value, once.
pub(crate) fn once<T>(name: &str, place: &mut Option<T>, value: T) -> Result<(), String> {
    if place.replace(value).is_some() { Err(format!("{name} is there twice")) } else { Ok(()) }
}

fn number(name: &str, value: &str) -> Result<i32, String> {
    value.parse().map_err(|_| format!("{name} {value:?} is no number of a descriptor"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Command, String> {
        parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn options_are_taken_in_both_forms() {
        let Ok(Command::Run(run)) = parsed("run --config=a --fd kvm=5 --fd=tap=6 --api-fd 7 --hold --id x=y")
        else {
            panic!("not taken")
        };
        let expected = Run {
            config: Some("a".into()),
            fds: vec!["kvm=5".into(), "tap=6".into()],
            api_fd: Some(7),
            hold: true,
            id: Some("x=y".into()),
            ..Run::default()
        };
        assert_eq!(run, expected);
        assert_eq!(parsed("probe --json"), Ok(Command::Probe { json: true }));
        assert_eq!(parsed("cpu-template dump"), Ok(Command::DumpCpu));
        let (memory, socket, working_set) = ("a".into(), "b".into(), Some("c".into()));
        let serves = page_server::Options { memory, socket, working_set, seconds: 10 };
        let line = "serve-memory --memory a --socket=b --working-set c";
        assert_eq!(parsed(line), Ok(Command::ServeMemory(serves)));
        let files = vec!["a".into(), "b".into()];
        assert_eq!(parsed("cpu-template common a b"), Ok(Command::CommonCpu(files)));
        assert_eq!(parsed("run"), Ok(Command::Run(Run::default())));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (line, word) in [
            ("", "what"),
            ("walk", "walk"),
            ("run --fast", "--fast"),
            ("run kernel", "kernel"),
            ("run --hold=yes", "--hold=yes"),
            ("run --config", "--config needs"),
            ("run --config a --config b", "twice"),
            ("run --config a --config-fd 3", "both"),
            ("run --api-sock a --api-fd 3", "both"),
            ("run --api-fd three", "three"),
            ("run --level loud", "loud"),
            ("run --log-path a --log-path b", "twice"),
            ("run --show-level=no", "--show-level=no"),
            ("probe --yaml", "--yaml"),
            ("serve-memory --memory a", "--socket PATH"),
            ("serve-memory --memory a --memory b", "twice"),
            ("serve-memory --memory a --socket b --seconds 5", "needs --working-set"),
            ("serve-memory --memory a --socket b --working-set c --seconds 0", "1 to 3600"),
            ("serve-memory --fast", "--fast"),
            ("cpu-template", "dump, or common"),
            ("cpu-template strip", "dump, or common"),
            ("cpu-template dump a", "\"a\""),
            ("cpu-template common a", "two hosts"),
        ] {
            let why = parsed(line).unwrap_err();
            assert!(why.contains(word), "{line:?} gave {why:?}");
        }
    }

    #[test]
    fn help_names_every_exit_code() {
        for line in ["--help", "run --help", "probe -h", "run --hold -h"] {
            let Ok(Command::Say(text)) = parsed(line) else { panic!("{line}") };
            for code in crate::exit::ExitCode::ALL {
                assert!(text.contains(&format!("\n  {}  ", code.code())), "{code:?}");
            }
        }
    }

    #[test]
    fn what_starts_firecracker_can_start_this() {
        let Ok(Command::Run(run)) = parsed("--api-sock /a --id=x --config-file c") else { panic!() };
        assert_eq!((run.api_sock, run.config), (Some("/a".into()), Some("c".into())));
        assert!(run.open_paths);
        let Ok(Command::Run(run)) = parsed("--id x") else { panic!() };
        assert_eq!(run.api_sock, Some(FIRECRACKER_SOCKET.into()));
        let Ok(Command::Run(run)) = parsed("--no-api --config-file c") else { panic!() };
        assert_eq!((run.api_sock, run.open_paths), (None, false));
        for (line, word) in [
            ("--no-api --api-sock a", "--no-api"),
            ("--no-seccomp", "every thread"),
            ("run --config-file c", "no option"),
            ("--frobnicate", "no option"),
        ] {
            assert!(parsed(line).unwrap_err().contains(word), "{line}");
        }
    }
}
