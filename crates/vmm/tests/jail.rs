//! `roost-vmm jail`: what a jailed monitor has and what it has not. Every test needs root, which makes namespaces;
//! `scripts/test` runs them (`scripts/lib/root-tests.sh`).

// Tests build bytes out of numbers whose size they know.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use common::calls::{Argument, Calls, results};
use common::virtio::Device;
use common::vsock::{GUEST_CID, ping};
use common::{Code, DEADLINE, Machine, hand_over, machines, notify, says, tap, wait_for};
use roost_vmm::client::Client;
use roost_vmm::exit::ExitCode;
use serde_json::json;

const UID: u32 = 70_001;
const GID: u32 = 70_002;

/// The jail's command; the words behind `jail` and behind `run` are more options.
fn command(machine: &Machine, jail: &[&str], run: &[&str]) -> Command {
    fs::write(machine.path("config"), machine.config.to_string()).unwrap();
    let mut command = Command::new(&machine.program);
    command.args(["jail", "--uid", &UID.to_string(), "--gid", &GID.to_string(), "--id", "test"]).args(jail);
    command
        .args(["--", "run", "--config", &machine.text("config"), "--api-sock", &machine.text("api")])
        .args(run);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(machine.path("stderr")).unwrap());
    command
}

/// Starts it, and gives the monitor's process id.
fn start(machine: &mut Machine, jail: &[&str], run: &[&str]) -> u32 {
    let child = command(machine, jail, run).spawn().unwrap();
    let step = child.id();
    machine.adopt(child);
    machine.client();
    child_of(step).unwrap()
}

fn status(pid: u32, field: &str) -> Vec<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    line.unwrap_or_default().split_whitespace().map(str::to_owned).collect()
}

fn child_of(parent: u32) -> Option<u32> {
    let all =
        fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    all.into_iter().find(|pid| status(*pid, "PPid") == [parent.to_string()])
}

/// Whether a process is there and no zombie.
fn lives(pid: u32) -> bool {
    status(pid, "State").first().is_some_and(|state| state != "Z" && state != "X")
}

fn read(pid: u32, name: &str) -> String {
    fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap()
}

/// Everything that the kernel says of a process with nothing.
fn assert_jailed(pid: u32, user_namespace: bool) {
    assert_eq!(status(pid, "Uid"), vec![UID.to_string(); 4]);
    assert_eq!(status(pid, "Gid"), vec![GID.to_string(); 4]);
    assert_eq!(status(pid, "Groups"), Vec::<String>::new());
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status(pid, set), ["0000000000000000"], "{set}");
    }
    assert_eq!(status(pid, "NoNewPrivs"), ["1"]);
    assert_eq!(status(pid, "Seccomp"), ["2"]);
    assert_eq!(status(pid, "NSpid"), [pid.to_string(), "1".to_owned()], "the first of its pid namespace");
    assert_eq!(status(pid, "NSsid"), [pid.to_string(), "1".to_owned()], "a session of its own");

    let own = |name: &str| fs::read_link(format!("/proc/self/ns/{name}")).unwrap();
    let mut namespaces = vec!["mnt", "pid", "ipc", "uts", "net", "cgroup"];
    if user_namespace {
        namespaces.push("user");
        let words = |name| read(pid, name).split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(words("uid_map"), [UID.to_string(), UID.to_string(), "1".into()]);
        assert_eq!(words("gid_map"), [GID.to_string(), GID.to_string(), "1".into()]);
        assert_eq!(words("setgroups"), ["deny"]);
    }
    for name in namespaces {
        assert_ne!(fs::read_link(format!("/proc/{pid}/ns/{name}")).unwrap(), own(name), "{name} namespace");
    }

    assert_eq!(fs::read_dir(format!("/proc/{pid}/root")).unwrap().count(), 0, "an empty root folder");
    let mounts = read(pid, "mountinfo");
    assert_eq!(mounts.lines().count(), 1, "one mount: {mounts}");
    assert!(mounts.contains(" / / ro,nosuid,nodev,noexec"), "read-only: {mounts}");

    let limits = read(pid, "limits");
    for (name, limit) in [("Max core file size", "1"), ("Max processes", "256"), ("Max locked memory", "0")] {
        let line = limits.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        assert_eq!(line.split_whitespace().take(2).collect::<Vec<_>>(), [limit, limit], "{name}");
    }
    assert_eq!(read(pid, "environ"), "");
}

#[test]
#[ignore = "needs root: scripts/test runs it"]
fn a_machine_from_an_ordinary_file_runs_and_has_nothing() {
    let tap = tap::create().unwrap();
    let mut machine = machines::with_disk_and_interface();
    machine.config["machine-config"]["vcpu_count"] = json!(2);
    let tap = machines::tap_argument(&tap);
    let run: Vec<&str> = tap.iter().map(String::as_str).collect();
    let pid = start(&mut machine, &[], &run);
    says(&machine, machines::UP);
    assert_jailed(pid, true);
    let metrics = machine.client().metrics().unwrap();
    assert_eq!(metrics["devices"]["root"]["failed"].as_u64().unwrap_or(0), 0, "{metrics}");
    // The step beside it is no root either, and holds nothing.
    let step = status(pid, "PPid")[0].parse().unwrap();
    assert_eq!(status(step, "Uid"), vec![UID.to_string(); 4]);
    assert_eq!(status(step, "CapEff"), ["0000000000000000"]);
    assert_eq!(fs::read_dir(format!("/proc/{step}/fd")).unwrap().count(), 3);
    let open: Vec<PathBuf> = fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .filter_map(|entry| fs::read_link(entry.unwrap().path()).ok())
        .collect();
    assert!(open.iter().all(|path| !path.ends_with("config") && !path.starts_with("/proc")), "{open:?}");

    machine.client().force_stop().unwrap();
    let ended = machine.wait();
    assert_eq!(ended.code, ExitCode::Killed.code(), "the monitor's own code: {}", ended.stderr);
    assert!(ended.stderr.contains("jailed: user 70001, group 70002, a user namespace"), "{}", ended.stderr);
    assert!(!lives(pid));
}

#[test]
#[ignore = "needs root: scripts/test runs it"]
fn the_parent_gives_back_the_end_and_passes_signals_on() {
    let mut machine = Machine::new(&Code::default().print("hi").power_off());
    machine.adopt(command(&machine, &[], &[]).spawn().unwrap());
    let ended = machine.wait();
    assert_eq!((ended.code, ended.console.as_str()), (0, "hi"), "{}", ended.stderr);

    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
        let mut machine = Machine::new(&Code::default().print("hi").stop());
        let pid = start(&mut machine, &["--no-user-namespace"], &[]);
        says(&machine, "hi");
        assert_jailed(pid, false);
        // SAFETY: signals the child that this test started.
        unsafe { libc::kill(machine.pid().cast_signed(), signal) };
        let ended = machine.wait();
        assert_eq!(ended.code, ExitCode::Killed.code(), "{signal}: {}", ended.stderr);
        assert!(!lives(pid));
    }

    let mut machine = Machine::new(&Code::default().print("hi").stop());
    let pid = start(&mut machine, &[], &[]);
    // SAFETY: as above.
    unsafe { libc::kill(machine.pid().cast_signed(), libc::SIGKILL) };
    machine.wait();
    wait_for("the monitor's end with its parent", || (!lives(pid)).then_some(()));

    let mut machine = Machine::new(&Code::default().print("hi").stop());
    let pid = start(&mut machine, &[], &[]);
    // SAFETY: as above: the monitor of this test.
    unsafe { libc::kill(pid.cast_signed(), libc::SIGKILL) };
    assert_eq!(machine.wait().code, 128 + libc::SIGKILL);
}

/// A process that nobody waits for must not outlive a test that fails.
struct Daemon(u32);

impl Drop for Daemon {
    fn drop(&mut self) {
        // SAFETY: the process of this test; a number that is free again is nobody's so soon.
        unsafe { libc::kill(self.0.cast_signed(), libc::SIGKILL) };
    }
}

/// What a monitor says about itself, and its limits.
#[test]
#[ignore = "needs root: scripts/test runs it"]
fn log_metrics_and_limits_are_as_asked_for() {
    let mut machine = Machine::new(&Code::default().print("hi").stop());
    let (log, metrics) = (machine.text("log"), machine.text("metrics"));
    let options = ["--log-path", &log, "--level", "Debug", "--show-level", "--metrics-path", &metrics];
    let limit = 4 << 20;
    let mut command = command(&machine, &["--resource-limit", &format!("memlock={limit}")], &options);
    let deaf = || {
        // SAFETY: as a daemon that never asks for its children's ends.
        unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
        Ok(())
    };
    // SAFETY: a call that a forked child may make.
    unsafe { command.pre_exec(deaf) };
    let child = command.spawn().unwrap();
    let step = child.id();
    machine.adopt(child);
    let client = machine.client();
    let limits = read(child_of(step).unwrap(), "limits");
    let line = limits.lines().find(|line| line.starts_with("Max locked memory")).unwrap();
    assert!(line.contains(&limit.to_string()), "{line}");
    client.put("PUT", "/actions", &json!({ "action_type": "FlushMetrics" })).unwrap();
    let line = fs::read_to_string(&metrics).unwrap();
    assert!(serde_json::from_str::<serde_json::Value>(line.lines().next().unwrap()).is_ok(), "{line}");
    client.force_stop().unwrap();
    let ended = machine.wait();
    assert_eq!(ended.code, ExitCode::Killed.code(), "{}", ended.stderr);
    assert!(fs::read_to_string(&log).unwrap().contains("ForceStop"));
}

#[test]
#[ignore = "needs root: scripts/test runs it"]
fn a_daemon_outlives_the_step() {
    let machine = Machine::new(&Code::default().print("hi").stop());
    let log = machine.text("log");
    let output =
        command(&machine, &["--daemonize", "--log", &log], &[]).stdout(Stdio::piped()).output().unwrap();
    assert!(output.status.success());
    let pid: u32 = String::from_utf8(output.stdout).unwrap().trim().parse().unwrap();
    let _daemon = Daemon(pid);
    says(&machine, "hi");
    assert_jailed(pid, true);
    for (number, name) in [(0, Path::new("/dev/null")), (1, Path::new(&log)), (2, Path::new(&log))] {
        assert_eq!(fs::read_link(format!("/proc/{pid}/fd/{number}")).unwrap(), name);
    }
    Client::new(machine.path("api")).force_stop().unwrap();
    wait_for("its end", || (!lives(pid)).then_some(()));
    let log = fs::read_to_string(log).unwrap();
    assert!(log.contains("roost-vmm[test]: jailed") && log.contains("ForceStop"), "{log}");
    assert_eq!(fs::read_to_string(machine.path("stderr")).unwrap(), "");
}

/// The version 2 hierarchy, if there is one here.
fn cgroups() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    let line = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2"))?;
    Some(line.split(' ').nth(1)?.into())
}

#[test]
#[ignore = "needs root: scripts/test runs it"]
fn a_jailed_monitor_stands_in_its_cgroup_and_sees_no_other() {
    let Some(root) = cgroups() else { return eprintln!("NOT RUN: no cgroup v2 is mounted here") };
    let folder = root.join(format!("roost-test-jail-{}", std::process::id()));
    fs::create_dir(&folder).unwrap();
    let mut machine = Machine::new(&Code::default().print("hi").stop());
    let pid = start(&mut machine, &["--cgroup", folder.to_str().unwrap()], &[]);
    let inside = fs::read_to_string(folder.join("cgroup.procs")).unwrap();
    machine.client().force_stop().unwrap();
    machine.wait();
    wait_for("the cgroup to be empty", || fs::remove_dir(&folder).ok());
    assert_eq!(inside.trim(), pid.to_string(), "the monitor and nobody else");

    let why = refused(&Machine::new(&Code::default()), &["--cgroup", "/no/such"], &[], ExitCode::HostIo);
    assert!(why.contains("/no/such") && why.contains("cgroup v2"), "{why}");
}

#[test]
#[ignore = "needs root: scripts/test runs it"]
fn vsock_works_in_the_folder_and_the_folder_must_be_the_users() {
    let mut machine = Machine::new(&ping(Code::default(), Device(0)).print("done").power_off());
    fs::create_dir(machine.path("sockets")).unwrap();
    machine.config["vsock"] = json!({ "guest_cid": GUEST_CID, "uds_path": machine.text("sockets/v") });
    let why = refused(&machine, &[], &[], ExitCode::HostIo);
    assert!(why.contains("sockets") && why.contains("chown 70001"), "{why}");

    std::os::unix::fs::chown(machine.path("sockets"), Some(UID), None).unwrap();
    let listener = UnixListener::bind(machine.path("sockets/v_52")).unwrap();
    std::os::unix::fs::chown(machine.path("sockets/v_52"), Some(UID), None).unwrap();
    // What a dead monitor of the same user left is replaced.
    drop(UnixListener::bind(machine.path("sockets/v")).unwrap());
    std::os::unix::fs::chown(machine.path("sockets/v"), Some(UID), None).unwrap();
    let pid = start(&mut machine, &[], &[]);
    listener.set_nonblocking(true).unwrap();
    let (mut stream, _) = wait_for("the guest", || listener.accept().ok());
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    let mut word = [0; 4];
    stream.read_exact(&mut word).unwrap();
    assert_eq!(&word, b"ping");
    // The thread that makes the sockets stands in the folder, above which there is nothing.
    let task = fs::read_dir(format!("/proc/{pid}/task")).unwrap().map(|task| task.unwrap().path());
    let devices =
        task.into_iter().find(|task| fs::read_to_string(task.join("comm")).unwrap().trim() == "vmm-dev");
    let working = devices.unwrap().join("cwd");
    let (inside, above) = (fs::metadata(&working).unwrap(), fs::metadata(working.join("..")).unwrap());
    assert_eq!(inside.ino(), fs::metadata(machine.path("sockets")).unwrap().ino());
    assert_eq!((inside.dev(), inside.ino()), (above.dev(), above.ino()), "its own mount's root");
    let socket = fs::metadata(machine.path("sockets/v")).unwrap();
    assert_eq!((socket.uid(), socket.permissions().mode() & 0o077), (UID, 0));
    std::io::Write::write_all(&mut stream, b"pong").unwrap();
    assert_eq!(stream.read(&mut word).unwrap(), 0, "the guest has said all");
    drop(stream);
    let ended = machine.wait();
    assert_eq!((ended.code, ended.console.as_str()), (0, "done"), "{}", ended.stderr);
}

/// Without a configuration nobody knows beforehand what a folder is for.
#[test]
#[ignore = "needs root: scripts/test runs it"]
fn a_machine_that_is_configured_through_the_api_has_vsock_in_a_handed_folder() {
    let mut machine = Machine::new(&Code::default().print("hi").stop());
    fs::create_dir(machine.path("sockets")).unwrap();
    std::os::unix::fs::chown(machine.path("sockets"), Some(UID), None).unwrap();
    let (kernel, folder) =
        (File::open(machine.path("kernel")).unwrap(), File::open(machine.path("sockets")).unwrap());
    let mut command = Command::new(&machine.program);
    command.args(["jail", "--uid", &UID.to_string(), "--gid", &GID.to_string(), "--", "run", "--api-sock"]);
    command.arg(machine.path("api")).args(hand_over("kernel", &kernel)).args(hand_over("sockets", &folder));
    machine.adopt(command.stderr(File::create(machine.path("stderr")).unwrap()).spawn().unwrap());
    let client = machine.client();
    client.put("PUT", "/boot-source", &json!({ "kernel_image_path": "kernel" })).unwrap();
    client.put("PUT", "/vsock", &json!({ "guest_cid": 3, "uds_path": "sockets/v" })).unwrap();
    client.start().unwrap();
    assert_eq!(fs::metadata(machine.path("sockets/v")).unwrap().uid(), UID);
    client.force_stop().unwrap();
    machine.wait();
}

/// Returns the core scheduling cookie of a process, or the error number of the kernel's refusal.
fn core_cookie(pid: u32) -> Result<u64, i32> {
    const PR_SCHED_CORE: libc::c_int = 62;
    let mut cookie = 0_u64;
    // SAFETY: command 0 (get) of scope 0 (thread) writes one u64, which lives.
    let got = unsafe { libc::prctl(PR_SCHED_CORE, 0_usize, pid as usize, 0_usize, &raw mut cookie) };
    if got == 0 { Ok(cookie) } else { Err(std::io::Error::last_os_error().raw_os_error().unwrap()) }
}

#[test]
#[ignore = "needs root: scripts/test runs it"]
fn two_machines_never_share_a_core_or_the_log_says_why_they_may() {
    let mut one = Machine::new(&Code::default().bytes(&[0xeb, 0xfe]));
    let mut other = Machine::new(&Code::default().bytes(&[0xeb, 0xfe]));
    let cookies = [start(&mut one, &[], &[]), start(&mut other, &[], &[])].map(core_cookie);
    let said = fs::read_to_string(one.path("stderr")).unwrap();
    match cookies {
        [Ok(one), Ok(other)] => {
            assert!(one != 0 && other != 0 && one != other, "{one} {other}");
            assert!(said.contains("cores shared with no other machine"), "{said}");
        }
        [Err(libc::ENODEV), Err(libc::ENODEV)] => assert!(said.contains("no SMT"), "{said}"),
        [Err(libc::EINVAL), Err(libc::EINVAL)] => {
            assert!(said.contains("no core scheduling in this kernel"), "{said}");
        }
        other => panic!("{other:?}"),
    }
}

/// The kernel's version of landlock, 0 if there is none.
fn landlock_abi() -> i64 {
    // SAFETY: with the flag 1 there is no struct to read.
    unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0_usize, 1_u32) }.max(0)
}

/// A program without filters of its own is put into the jail and tries.
#[test]
#[ignore = "needs root: scripts/test runs it"]
fn landlock_refuses_what_the_empty_root_and_the_user_would_allow() {
    let mut machine = Machine::new(&Code::default());
    fs::create_dir(machine.path("sockets")).unwrap();
    std::os::unix::fs::chown(machine.path("sockets"), Some(UID), Some(GID)).unwrap();
    fs::write(machine.path("sockets/file"), "content").unwrap();
    fs::set_permissions(machine.path("sockets/file"), PermissionsExt::from_mode(0o666)).unwrap();
    machine.config["vsock"] = json!({ "guest_cid": 3, "uds_path": machine.text("sockets/v") });

    let mut calls = Calls::default();
    let folder = libc::O_RDONLY | libc::O_DIRECTORY;
    let root = calls.call(libc::SYS_open, ["/".into(), folder.into()]);
    let tcp = calls.call(libc::SYS_socket, [libc::AF_INET.into(), libc::SOCK_STREAM.into(), 0.into()]);
    let address = [&2_u16.to_ne_bytes()[..], &80_u16.to_be_bytes(), &[127, 0, 0, 1], &[0; 8]].concat();
    let address = || Argument::Bytes(address.clone());
    let connect = calls.call(libc::SYS_connect, [Argument::Result(tcp), address(), 16.into()]);
    let bind = calls.call(libc::SYS_bind, [Argument::Result(tcp), address(), 16.into()]);
    // The folder of sockets has a number that only the jail knows: in it, and in nothing else, a socket can be made and removed.
    let socket = libc::S_IFSOCK.cast_signed() | 0o600;
    let sweep: Vec<[usize; 8]> = (3..40)
        .map(|n: i32| {
            let mut open = |name: &str, flags: i32| {
                calls.call(libc::SYS_openat, [n.into(), name.into(), flags.into(), 0o600.into()])
            };
            let opened = [
                open(".", folder),
                open("file", libc::O_RDONLY),
                open("file", libc::O_WRONLY),
                open("new", libc::O_WRONLY | libc::O_CREAT),
            ];
            let [list, read, write, make] = opened;
            let made = [n.into(), "s".into(), socket.into(), 0.into()];
            [
                calls.call(libc::SYS_mknodat, made),
                calls.call(libc::SYS_unlinkat, [n.into(), "s".into(), 0.into()]),
                list,
                read,
                write,
                make,
                calls.call(libc::SYS_mkdirat, [n.into(), "d".into(), 0o700.into()]),
                calls.call(libc::SYS_symlinkat, ["file".into(), n.into(), "l".into()]),
            ]
        })
        .collect();
    let unmapped = calls.call(libc::SYS_setuid, [0.into()]);
    let mounted = calls.call(libc::SYS_mount, ["none".into(), "/".into(), "tmpfs".into(), 0.into()]);
    calls.write(&machine.path("probe"));

    let mut command = command(&machine, &["--exec-file", &machine.text("probe")], &[]);
    let output = command.stdout(Stdio::piped()).spawn().unwrap().wait_with_output().unwrap();
    let why = fs::read_to_string(machine.path("stderr")).unwrap();
    assert!(output.status.success(), "{why}");
    let gave = results(&output.stdout);
    let denied = -i64::from(libc::EACCES);

    // What needs no landlock: it can become nobody else, and mount nothing.
    assert_eq!(gave[unmapped], -i64::from(libc::EINVAL), "id 0 is nobody's here");
    assert_eq!(gave[mounted], -i64::from(libc::EPERM));
    let abi = landlock_abi();
    if abi == 0 {
        return eprintln!("NOT RUN: this kernel has no landlock");
    }
    assert!(why.contains(&format!("landlock ABI {abi}")), "{why}");
    assert_eq!(gave[root], denied, "even what is empty");
    if abi >= 4 {
        assert_eq!((gave[connect], gave[bind]), (denied, denied), "TCP; socket {}", gave[tcp]);
    }
    let folders = sweep.iter().map(|calls| calls.map(|call| gave[call])).filter(|gave| gave[0] == 0);
    let expected = [0, 0, denied, denied, denied, denied, denied, denied];
    assert_eq!(folders.collect::<Vec<_>>(), [expected], "one folder, and in it sockets alone");
}

/// What was said when nothing was started.
fn refused(machine: &Machine, jail: &[&str], run: &[&str], code: ExitCode) -> String {
    let status = command(machine, jail, run).status().unwrap();
    let why = fs::read_to_string(machine.path("stderr")).unwrap();
    assert_eq!(status.code(), Some(code.code()), "{why}");
    why
}

#[test]
#[ignore = "needs root: scripts/test runs it"]
fn what_is_missing_is_said_with_the_way_out() {
    let mut machine = Machine::new(&Code::default());
    for (jail, run, code, words) in [
        (&["--netns", "/no/such/netns"][..], &[][..], ExitCode::HostIo, ["/no/such/netns", ""]),
        (&["--log", "/no/such/log"], &[], ExitCode::HostIo, ["/no/such/log", ""]),
        (&["--exec-file", "/bin/sh"], &[], ExitCode::HostIo, ["is it static", "No such file"]),
        (&[], &["--fd", "disk=99"], ExitCode::Config, ["--fd", "99"]),
    ] {
        let why = refused(&machine, jail, run, code);
        assert!(words.iter().all(|word| why.contains(word)), "{jail:?} {run:?}: {why}");
    }
    machine.config["drives"] = json!([{ "drive_id": "root", "path_on_host": "/no/such/disk" }]);
    let why = refused(&machine, &[], &[], ExitCode::HostIo);
    assert!(why.contains("/no/such/disk"), "{why}");

    // Somebody else than root. The program is where they may not look, so it is handed over.
    let program = File::open(&machine.program).unwrap();
    let mut command = Command::new(format!("/proc/self/fd/{}", program.as_raw_fd()));
    hand_over("program", &program);
    let output = command.args(["jail", "--uid", "1", "--gid", "1", "--", "run"]).uid(65534).output().unwrap();
    let why = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(ExitCode::HostIo.code()), "{why}");
    assert!(why.contains("must be started as root"), "{why}");
}

/// A namespace whose own limit is 0 stands for a host whose limit is: the host's is everybody's, and stays.
#[test]
#[ignore = "needs root: scripts/test runs it"]
fn a_host_without_user_namespaces_is_refused_with_the_way_out() {
    let machine = Machine::new(&Code::default().power_off());
    let jail = command(&machine, &[], &[]);
    let script = "echo 0 > /proc/sys/user/max_user_namespaces && exec \"$0\" \"$@\"";
    let mut command = Command::new("setpriv");
    command
        .args(["--clear-groups", "unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script])
        .arg(jail.get_program());
    let Output { status, stderr, .. } = command.args(jail.get_args()).output().unwrap();
    let why = String::from_utf8(stderr).unwrap();
    assert_eq!(status.code(), Some(ExitCode::HostIo.code()), "{why}");
    assert!(why.contains("user.max_user_namespaces") && why.contains("--no-user-namespace"), "{why}");
}

/// A state file names disks too, and a monitor wrote it: root opens none of them.
#[test]
#[ignore = "needs root: scripts/test runs it"]
fn what_only_a_state_file_names_must_be_handed_over() {
    let mut machine = machines::with_disk();
    machine.start(&["--hold", "--open-paths"]);
    let client = machine.client();
    let (state, memory) = (machine.text("state"), machine.text("memory"));
    let files = json!({ "snapshot_path": state, "mem_file_path": memory });
    client.put("PUT", "/snapshot/create", &files).unwrap();
    client.force_stop().unwrap();
    machine.wait();

    let (serial, disk) = (machine.config["serial"].clone(), machine.text("disk"));
    machine.config = json!({ "snapshot": files, "serial": serial });
    let why = refused(&machine, &[], &[], ExitCode::HostIo);
    assert!(why.contains(&disk) && why.contains("no handed descriptor"), "{why}");

    let file = File::options().read(true).write(true).open(&disk).unwrap();
    let handed = hand_over(&disk, &file);
    let pid = start(&mut machine, &[], &[&handed[0], &handed[1]]);
    says(&machine, machines::UP);
    assert_jailed(pid, true);
    machine.client().force_stop().unwrap();
    machine.wait();

    machine.config["snapshot"]["drive_overrides"] = json!([{ "drive_id": "root", "path_on_host": disk }]);
    start(&mut machine, &[], &[]);
    machine.client().force_stop().unwrap();
    machine.wait();
}

/// Who is killed.
#[derive(Clone, Copy, Debug)]
enum Victim {
    Step,
    Child,
}

/// Stops step and child before each of their system calls, and kills one of them at the call of this number. Gives how many
/// calls there were until the monitor was executed, if nobody was killed. When it comes back, no process of the jail is left.
fn kill_at(number: usize, victim: Victim) -> Option<usize> {
    let mut machine = Machine::new(&Code::default().stop());
    let mut command = command(&machine, &[], &[]);
    let (child, listener) = notify::spawn(&mut command, notify::Calls::All).unwrap();
    let step = child.id();
    machine.adopt(child);
    let (mut count, mut inside, mut done) = (0, None, None);
    while let Some(call) = notify::next(&listener, DEADLINE).unwrap() {
        if call.pid != step && inside.is_none() {
            inside = Some(call.pid);
        }
        if Some(call.pid) == inside && i64::from(call.data.nr) == libc::SYS_execveat && done.is_none() {
            done = Some(count);
        }
        let target = match victim {
            Victim::Step => Some(step),
            Victim::Child => inside,
        };
        // Without a victim everything ends where the monitor begins.
        if let Some(target) = target
            && (count == number || done.is_some())
        {
            // SAFETY: a process of this test, which stands in a call or waits for one that does.
            unsafe { libc::kill(target.cast_signed(), libc::SIGKILL) };
        }
        count += 1;
        notify::go_on(&listener, &call);
    }
    let ended = machine.wait();
    assert_ne!(ended.code, 0, "{victim:?} at {number}");
    done
}

#[test]
#[ignore = "needs root: scripts/test runs it"]
fn a_kill_at_any_call_leaves_nothing() {
    let calls = kill_at(usize::MAX, Victim::Step).unwrap();
    assert!(calls > 100, "{calls}");
    for number in 0..calls {
        kill_at(number, Victim::Step);
        kill_at(number, Victim::Child);
    }
}
