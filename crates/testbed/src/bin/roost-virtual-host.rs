//! `scripts/virtual-host`, which see for how it is used (`--help`).

#![forbid(unsafe_code)]

use roost_testbed::{Data, Error, HostOptions, Share, VirtualHost, repository_root, workspace_shares};
use std::io::IsTerminal;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

const HELP: &str = "\
A small Debian with KVM of its own, for tests and for boxes whose KVM cannot boot Linux guests.

usage: scripts/virtual-host [OPTIONS] COMMAND

  up              start it, or find the one that runs and bring its programs up to date
  ssh [CMD...]    a shell in it, or one command (words are joined by spaces, as ssh does)
  port [INSIDE]   the port of 127.0.0.1 that reaches the controller's API (7443), or INSIDE
  copy SRC... DIR copy files and folders into DIR inside
  status          what runs; exit code 3 when it does not
  ls              all virtual hosts, running or with kept data
  down            power it off; instances, images and bills below /var/lib/roost stay
  run CMD...      a fresh one for one command; it ends with its caller, however that dies
  with CMD...     the same, but CMD runs outside, with ROOST_VIRTUAL_HOST naming it

  --name NAME         which one (default: main; run and with make their own)
  --cpus N            virtual CPUs (2)           --memory-mib N   memory (6144)
  --lacks FEATURE,... its CPUs lack these features of a CPU (avx2,bmi2): an older host, to move guests to
  --data-gib N        capacity of its data disk when that is made (40; the file is sparse)
  --share SRC[=NAME]  also put the folder SRC at /opt/roost/NAME; bin (release programs) and scripts are there
  --no-default-shares leave those two out
  --forward [OUT:]IN  also forward a port of 127.0.0.1 to port IN
  --end-with PID      (up) end it when process PID ends; its data is thrown away
  --discard           (down) kill it and throw its data away
  --image NAME        also put the guest image NAME at /opt/roost/images/NAME (built when missing)

Exit codes: that of CMD; 1 an error; 2 wrong usage; 3 it does not run; 255 the connection failed.";

struct Arguments {
    options: HostOptions,
    named: bool,
    shares: Vec<String>,
    images: Vec<String>,
    default_shares: bool,
    end_with: Option<u32>,
    discard: bool,
    command: String,
    words: Vec<String>,
}

fn main() -> ExitCode {
    let arguments = match parse(std::env::args().skip(1)) {
        Ok(arguments) => arguments,
        Err(problem) if problem.is_empty() => {
            println!("{HELP}");
            return ExitCode::SUCCESS;
        }
        Err(problem) => {
            eprintln!("error: {problem}; see scripts/virtual-host --help");
            return ExitCode::from(2);
        }
    };
    match act(arguments) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprint!("error: {error}");
            let mut cause = std::error::Error::source(&error);
            while let Some(inner) = cause {
                eprint!(": {inner}");
                cause = inner.source();
            }
            eprintln!();
            ExitCode::from(if matches!(error, Error::NotRunning(_)) { 3 } else { 1 })
        }
    }
}

/// An empty problem asks for help.
fn parse(mut args: impl Iterator<Item = String>) -> Result<Arguments, String> {
    let mut parsed = Arguments {
        options: HostOptions { data: Data::Kept, ..HostOptions::default() },
        named: false,
        shares: Vec::new(),
        images: Vec::new(),
        default_shares: true,
        end_with: None,
        discard: false,
        command: String::new(),
        words: Vec::new(),
    };
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or(format!("{arg} needs a value"));
        match arg.as_str() {
            "-h" | "--help" => return Err(String::new()),
            "--name" => (parsed.options.name, parsed.named) = (value()?, true),
            "--cpus" => parsed.options.cpus = number(&arg, &value()?, 1, 64)?,
            "--lacks" => parsed.options.lacks = features(&value()?)?,
            "--memory-mib" => parsed.options.memory_mib = number(&arg, &value()?, 1024, 1 << 20)?,
            "--data-gib" => parsed.options.data_gib = number(&arg, &value()?, 1, 1 << 14)?,
            "--share" => parsed.shares.push(value()?),
            "--image" => parsed.images.push(value()?),
            "--no-default-shares" => parsed.default_shares = false,
            "--forward" => parsed.options.forwards.push(forward(&value()?)?),
            "--end-with" => parsed.end_with = Some(number(&arg, &value()?, 1, u32::MAX)?),
            "--discard" => parsed.discard = true,
            other if other.starts_with('-') => return Err(format!("unknown option {other}")),
            _ if parsed.command.is_empty() => parsed.command = arg,
            _ => parsed.words.push(arg),
        }
        // From the first word of a command on, every word is the command's own.
        if matches!(parsed.command.as_str(), "run" | "ssh" | "with") && !parsed.words.is_empty() {
            parsed.words.extend(args.by_ref());
        }
    }
    if parsed.command.is_empty() { Err("no command".to_owned()) } else { Ok(parsed) }
}

fn number(what: &str, text: &str, least: u32, most: u32) -> Result<u32, String> {
    text.parse()
        .ok()
        .filter(|n| (least..=most).contains(n))
        .ok_or(format!("{what} takes a whole number from {least} to {most}, not '{text}'"))
}

/// They become a part of one of QEMU's words.
fn features(text: &str) -> Result<Vec<String>, String> {
    let is_name = |word: &str| {
        !word.is_empty() && word.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
    };
    let words: Vec<String> = text.split(',').map(str::to_owned).collect();
    if words.iter().all(|word| is_name(word)) {
        Ok(words)
    } else {
        Err(format!("--lacks takes names of features with commas between them, not '{text}'"))
    }
}

fn forward(text: &str) -> Result<(Option<u16>, u16), String> {
    let port = |t: &str| {
        t.parse().ok().filter(|&p: &u16| p > 0).ok_or(format!("--forward takes [OUT:]IN, not '{text}'"))
    };
    match text.split_once(':') {
        Some((outside, inside)) => Ok((Some(port(outside)?), port(inside)?)),
        None => port(text).map(|inside| (Some(inside), inside)),
    }
}

fn act(mut args: Arguments) -> Result<u8, Error> {
    let name = args.options.name.clone();
    let running = || VirtualHost::find(&name)?.ok_or_else(|| Error::NotRunning(name.clone()));
    match args.command.as_str() {
        "up" => {
            prepare(&mut args)?;
            if args.end_with.is_some() {
                args.options.data = Data::ThrowAway;
            }
            let began = Instant::now();
            let host = VirtualHost::up(&args.options)?;
            if let Some(pid) = args.end_with {
                watch(&name, pid)?;
            }
            eprintln!("virtual host '{name}' is up ({:.1} s)", began.elapsed().as_secs_f32());
            describe(&host);
            Ok(0)
        }
        "ssh" => {
            let host = running()?;
            let mut ssh = host.ssh_command()?;
            if args.words.is_empty() && std::io::stdin().is_terminal() {
                ssh.arg("-t");
            }
            // Becomes ssh: its exit code and its signals are ours.
            let error = ssh.args(args.words).exec();
            Err(Error::Program { program: "ssh".to_owned(), problem: error.to_string() })
        }
        "port" => {
            let inside = args.words.first().map_or(Ok(7443), |text| text.parse()).unwrap_or(0);
            let host = running()?;
            let port = host.port(inside);
            let problem = || format!("port {} is not forwarded", args.words.join(" "));
            println!(
                "{}",
                port.ok_or_else(|| Error::Program { program: "port".to_owned(), problem: problem() })?
            );
            Ok(0)
        }
        "copy" => {
            let (folder, sources) = match args.words.split_last() {
                Some((folder, sources)) if !sources.is_empty() => (folder, sources),
                _ => return Ok(usage("copy takes SRC... DIR")),
            };
            running()?.copy_in(sources, folder)?;
            Ok(0)
        }
        "status" => {
            describe(&running()?);
            Ok(0)
        }
        "ls" => {
            for name in VirtualHost::names() {
                match VirtualHost::find(&name)? {
                    Some(host) => describe(&host),
                    None => println!("{name}: stopped, its data is kept"),
                }
            }
            Ok(0)
        }
        "down" => {
            if args.discard {
                VirtualHost::discard(&name)?;
            } else if let Some(host) = VirtualHost::find(&name)? {
                host.stop()?;
            }
            Ok(0)
        }
        "run" | "with" if args.words.is_empty() => Ok(usage("no command to run")),
        "run" | "with" => {
            follow_caller();
            VirtualHost::sweep();
            if !args.named {
                args.options.name = format!("run-{}", std::process::id());
            }
            prepare(&mut args)?;
            args.options.data = Data::ThrowAway;
            let host = VirtualHost::start(&args.options)?;
            let mut command = if args.command == "run" {
                let mut ssh = host.ssh_command()?;
                ssh.args(&args.words);
                ssh
            } else {
                let mut command = Command::new(&args.words[0]);
                command.args(&args.words[1..]).env("ROOST_VIRTUAL_HOST", host.name());
                command
            };
            let status = command
                .status()
                .map_err(|e| Error::Program { program: args.words[0].clone(), problem: e.to_string() })?;
            use std::os::unix::process::ExitStatusExt;
            let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(1);
            Ok(u8::try_from(code).unwrap_or(1))
        }
        "watch" => {
            let pid: u32 = args.words.first().and_then(|word| word.parse().ok()).unwrap_or(0);
            wait_for_end(pid);
            if let Some(host) = VirtualHost::find(&name)? {
                host.stop()?;
            }
            Ok(0)
        }
        other => Ok(usage(&format!("unknown command '{other}'"))),
    }
}

fn usage(problem: &str) -> u8 {
    eprintln!("error: {problem}; see scripts/virtual-host --help");
    2
}

/// One line for people, the rest for scripts.
fn describe(host: &VirtualHost) {
    let api = host.api_port().map_or_else(String::new, |port| format!(", API at https://127.0.0.1:{port}"));
    println!(
        "{}: running as process {}, ssh at 127.0.0.1:{}{api}",
        host.name(),
        host.pid(),
        host.port(22).unwrap_or(0)
    );
}

/// Turns `--share` and `--image` into shares.
fn prepare(args: &mut Arguments) -> Result<(), Error> {
    let root = repository_root();
    if args.default_shares {
        args.options.shares = workspace_shares(&root)?;
    }
    for share in &args.shares {
        let (source, name) = match share.split_once('=') {
            Some((source, name)) => (PathBuf::from(source), name.to_owned()),
            None => {
                let source = PathBuf::from(share);
                let name = source
                    .file_name()
                    .map_or_else(|| "share".to_owned(), |n| n.to_string_lossy().into_owned());
                (source, name)
            }
        };
        args.options.shares.push(Share::folder(&source, &name)?);
    }
    if !args.images.is_empty() {
        let entries =
            args.images.iter().map(|image| built_image(&root, image)).collect::<Result<Vec<_>, _>>()?;
        for (name, folder) in args.images.iter().zip(entries) {
            args.options.shares.push(Share::folder(&folder, &format!("images/{name}"))?);
        }
    }
    Ok(())
}

fn built_image(root: &Path, name: &str) -> Result<PathBuf, Error> {
    let output = Command::new(root.join("guest-images/build")).arg(name).stderr(Stdio::inherit()).output();
    match output {
        Ok(output) if output.status.success() => {
            Ok(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()))
        }
        Ok(output) => Err(Error::Program {
            program: "guest-images/build".to_owned(),
            problem: output.status.to_string(),
        }),
        Err(error) => {
            Err(Error::Program { program: "guest-images/build".to_owned(), problem: error.to_string() })
        }
    }
}

/// The wrapper script has asked the kernel to kill this process when its caller ends; a caller that ended before
/// it could ask is noticed here.
fn follow_caller() {
    let caller = std::env::var("ROOST_CALLER").ok().and_then(|pid| pid.parse::<u32>().ok());
    if caller.is_some_and(|pid| pid != std::os::unix::process::parent_id()) {
        std::process::exit(1);
    }
}

/// Leaves a process behind that ends the virtual host with `pid`.
fn watch(name: &str, pid: u32) -> Result<(), Error> {
    let failed =
        |error: std::io::Error| Error::Program { program: "setsid".to_owned(), problem: error.to_string() };
    let me = std::env::current_exe().map_err(failed)?;
    Command::new("setsid")
        .arg(me)
        .args(["--name", name, "watch", &pid.to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(failed)?;
    Ok(())
}

/// Returns when the process has ended, or has become another one of the same number.
fn wait_for_end(pid: u32) {
    let identity = || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        (fields.first() != Some(&"Z")).then(|| fields.get(19).map(|&start| start.to_owned()))?
    };
    let first = identity();
    while first.is_some() && identity() == first {
        std::thread::sleep(Duration::from_millis(200));
    }
}
