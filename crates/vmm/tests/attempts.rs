//! Attempts of a program in a monitor's place inside the jail, without the monitor's own filter.
//! Every test makes namespaces and needs root; `scripts/test` runs them
//! (`scripts/lib/root-tests.sh`).

#![allow(clippy::unwrap_used)]

mod common;

use std::fs::{self, File};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::process::{Command, Stdio};

use common::calls::{Argument, Calls, results};
use common::{Code, Machine, disk, machines, says, wait_for};
use serde_json::json;

const UID: &str = "70011";
/// Descriptor numbers of handed descriptors.
const HANDED: std::ops::Range<i32> = 3..40;

fn error(number: i32) -> i64 {
    -i64::from(number)
}

fn command(machine: &Machine, jail: &[&str]) -> Command {
    fs::write(machine.path("config"), machine.config.to_string()).unwrap();
    let mut command = Command::new(&machine.program);
    command.args(["jail", "--uid", UID, "--gid", UID, "--id", "test"]).args(jail);
    command.args(["--", "run", "--config", &machine.text("config"), "--api-sock", &machine.text("api")]);
    command.stdin(Stdio::null()).stderr(File::create(machine.path("stderr")).unwrap());
    command
}

fn child_of(parent: u32) -> i32 {
    let all =
        fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let parent_of = |pid: &i32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse::<u32>().ok()
    };
    all.into_iter().find(|pid| parent_of(pid) == Some(parent)).unwrap()
}

/// Makes the calls in a jail that was built for this machine, and returns their results.
fn attempt(machine: &Machine, jail: &[&str], calls: Calls) -> Vec<i64> {
    calls.write(&machine.path("probe"));
    let mut jail = jail.to_vec();
    let probe = machine.text("probe");
    jail.extend(["--exec-file", &probe]);
    let output = command(machine, &jail).stdout(Stdio::piped()).spawn().unwrap().wait_with_output().unwrap();
    let why = fs::read_to_string(machine.path("stderr")).unwrap();
    assert!(output.status.success(), "{why}");
    results(&output.stdout)
}

/// A machine with a writable and a read-only disk.
fn with_two_disks() -> Machine {
    let mut machine = Machine::new(&Code::default());
    for name in ["root", "base"] {
        disk(&machine.path(name), 1 << 20);
    }
    machine.config["drives"] = json!([
        { "drive_id": "root", "path_on_host": machine.text("root"), "is_read_only": false },
        { "drive_id": "base", "path_on_host": machine.text("base"), "is_read_only": true },
    ]);
    machine
}

#[test]
#[ignore = "needs root: scripts/test runs it"]
fn another_monitor_of_the_very_same_user_cannot_be_named() {
    let mut neighbour = machines::with_disk();
    let child = command(&neighbour, &[]).stdout(Stdio::null()).spawn().unwrap();
    let step = child.id();
    neighbour.adopt(child);
    says(&neighbour, machines::UP);
    let pid = child_of(step);

    let mut calls = Calls::default();
    let mut reach = |call, first: i32, second: i32| {
        calls.call(call, [first.into(), second.into(), 0.into(), 0.into(), 0.into(), 0.into()])
    };
    let mut reached = vec![
        reach(libc::SYS_kill, pid, libc::SIGKILL),
        reach(libc::SYS_kill, -1, libc::SIGKILL),
        reach(libc::SYS_ptrace, libc::PTRACE_SEIZE.cast_signed(), pid),
        reach(libc::SYS_pidfd_open, pid, 0),
        reach(libc::SYS_sched_setaffinity, pid, 0),
        reach(libc::SYS_prlimit64, pid, 0),
    ];
    for call in [libc::SYS_process_vm_readv, libc::SYS_process_vm_writev] {
        // The first eight bytes of the program.
        let vector = || Argument::Bytes([0x40_0000_u64.to_ne_bytes(), 8_u64.to_ne_bytes()].concat());
        reached.push(calls.call(call, [pid.into(), vector(), 1.into(), vector(), 1.into(), 0.into()]));
    }
    let machine = Machine::new(&Code::default());
    let gave = attempt(&machine, &[], calls);
    for call in reached {
        assert!(
            [libc::ESRCH, libc::EPERM].map(error).contains(&gave[call]),
            "call {call} gave {}",
            gave[call]
        );
    }
    neighbour.client().info().unwrap();
    neighbour.client().force_stop().unwrap();
    neighbour.wait();
}

#[test]
#[ignore = "needs root: scripts/test runs it"]
fn no_socket_of_the_host_is_reached_by_name_or_path() {
    let machine = Machine::new(&Code::default());
    let name = format!("roost-test-{}", std::process::id());
    let abstract_name = SocketAddr::from_abstract_name(&name).unwrap();
    let _named = UnixListener::bind_addr(&abstract_name).unwrap();
    let _placed = UnixListener::bind(machine.path("outside")).unwrap();

    let unix = || u16::try_from(libc::AF_UNIX).unwrap().to_ne_bytes();
    let mut calls = Calls::default();
    let mut connect = |to: &[u8]| {
        let socket = calls.call(libc::SYS_socket, [libc::AF_UNIX.into(), libc::SOCK_STREAM.into(), 0.into()]);
        let address = [&unix()[..], to].concat();
        let length = i64::try_from(address.len()).unwrap();
        calls.call(libc::SYS_connect, [Argument::Result(socket), Argument::Bytes(address), length.into()])
    };
    let named = connect(&[b"\0", name.as_bytes()].concat());
    let placed = connect(machine.text("outside").as_bytes());
    let others = ["/run/docker.sock", "/run/systemd/private", "/run/dbus/system_bus_socket"];
    let others = others.map(|path| connect(path.as_bytes()));
    let gave = attempt(&machine, &[], calls);
    // Abstract names are local to the empty network namespace.
    assert_eq!(gave[named], error(libc::ECONNREFUSED));
    for call in [placed].into_iter().chain(others) {
        assert!([libc::ENOENT, libc::EACCES].map(error).contains(&gave[call]), "{}", gave[call]);
    }
}

#[test]
#[ignore = "needs root: scripts/test runs it"]
fn what_is_handed_for_reading_stays_as_it_is_whatever_is_tried_on_its_descriptor() {
    let machine = with_two_disks();
    let files = ["kernel", "base"].map(|name| (machine.path(name), fs::read(machine.path(name)).unwrap()));
    let mut calls = Calls::default();
    let mut links = Vec::new();
    for number in HANDED {
        let mut on = |call, second: Argument, third: i64, fourth: i64| {
            calls.call(call, [number.into(), second, third.into(), fourth.into()])
        };
        on(libc::SYS_pwrite64, "written".into(), 7, 0);
        on(libc::SYS_fcntl, libc::F_SETFL.into(), libc::O_RDWR.into(), 0);
        on(libc::SYS_pwrite64, "written".into(), 7, 0);
        on(libc::SYS_ftruncate, 0.into(), 0, 0);
        on(libc::SYS_fallocate, 0.into(), 0, 8 << 20);
        on(libc::SYS_fchmod, 0o777.into(), 0, 0);
        let write = libc::PROT_READ | libc::PROT_WRITE;
        let shared = [0.into(), 4096.into(), write.into(), libc::MAP_SHARED.into(), number.into(), 0.into()];
        calls.call(libc::SYS_mmap, shared);
        // A new open of the same file.
        let here = libc::AT_FDCWD;
        links.push(calls.call(
            libc::SYS_linkat,
            [number.into(), "".into(), here.into(), "name".into(), libc::AT_EMPTY_PATH.into()],
        ));
        let path = format!("/proc/self/fd/{number}");
        links.push(calls.call(libc::SYS_open, [path.as_str().into(), libc::O_RDWR.into()]));
        links.push(calls.call(libc::SYS_openat, [number.into(), "".into(), libc::O_RDWR.into()]));
    }
    let gave = attempt(&machine, &[], calls);
    for call in links {
        assert!(gave[call] < 0, "call {call} gave {}", gave[call]);
    }
    for (path, before) in files {
        assert!(fs::read(&path).unwrap() == before, "{} was changed", path.display());
        let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&path).unwrap().permissions());
        assert_ne!(mode & 0o777, 0o777, "{}", path.display());
    }
}

#[test]
#[ignore = "needs root: scripts/test runs it"]
fn no_file_is_made_longer_than_the_limit() {
    let mut machine = with_two_disks();
    machine.config["status"] = json!(machine.text("status"));
    let limit = 2 << 20;
    let mut calls = Calls::default();
    // SIGXFSZ is ignored, so that each call returns its error.
    let ignore = [libc::SIG_IGN.to_ne_bytes(), [0; 8], [0; 8], [0; 8]].concat();
    calls.call(libc::SYS_rt_sigaction, [libc::SIGXFSZ.into(), Argument::Bytes(ignore), 0.into(), 8.into()]);
    let grown: Vec<_> = HANDED
        .flat_map(|number| {
            let (far, tib) = (Argument::Number((1 << 40) - 1), 1_i64 << 40);
            [
                calls.call(libc::SYS_ftruncate, [number.into(), tib.into()]),
                calls.call(libc::SYS_fallocate, [number.into(), 0.into(), 0.into(), tib.into()]),
                calls.call(libc::SYS_pwrite64, [number.into(), "x".into(), 1.into(), far]),
            ]
        })
        .collect();
    let gave = attempt(&machine, &["--resource-limit", &format!("fsize={limit}")], calls);
    assert!(grown.iter().any(|call| gave[*call] == error(libc::EFBIG)), "{gave:?}");
    for name in ["root", "base", "status"] {
        let length = fs::metadata(machine.path(name)).unwrap().len();
        assert!(length <= limit, "{name}: {length}");
    }
}

#[test]
#[ignore = "needs root: scripts/test runs it"]
fn descriptors_and_processes_end_at_their_limits() {
    let machine = Machine::new(&Code::default());
    let mut calls = Calls::default();
    let copies: Vec<_> = (0..100).map(|_| calls.call(libc::SYS_dup, [1.into()])).collect();
    let raised = calls.call(
        libc::SYS_setrlimit,
        [
            libc::RLIMIT_NOFILE.cast_signed().into(),
            Argument::Bytes([1000_u64.to_ne_bytes(), 1000_u64.to_ne_bytes()].concat()),
        ],
    );
    let second = calls.call(libc::SYS_fork, []);
    let gave = attempt(&machine, &["--resource-limit", "no-file=64", "--resource-limit", "nproc=1"], calls);
    assert_eq!(gave[*copies.last().unwrap()], error(libc::EMFILE));
    assert_eq!(gave[raised], error(libc::EPERM));
    assert_eq!(gave[second], error(libc::EAGAIN));
}

#[test]
#[ignore = "needs root: scripts/test runs it"]
fn a_user_namespace_of_ones_own_gives_nothing_over_the_host() {
    let machine = Machine::new(&Code::default());
    let mut calls = Calls::default();
    // The call may succeed: what it gains counts.
    calls.call(libc::SYS_unshare, [(libc::CLONE_NEWUSER | libc::CLONE_NEWNS).into()]);
    let raw = [libc::AF_PACKET.into(), libc::SOCK_RAW.into(), 0.into()];
    let mount = calls.call(libc::SYS_mount, ["none".into(), "/".into(), "tmpfs".into(), 0.into(), 0.into()]);
    let refused = [
        ("sethostname", calls.call(libc::SYS_sethostname, ["mine".into(), 4.into()])),
        ("packet socket", calls.call(libc::SYS_socket, raw)),
        ("iopl", calls.call(libc::SYS_iopl, [3.into()])),
        ("init_module", calls.call(libc::SYS_init_module, ["".into(), 0.into(), "".into()])),
        ("swapoff", calls.call(libc::SYS_swapoff, ["/none".into()])),
        ("acct", calls.call(libc::SYS_acct, [0.into()])),
        ("setuid", calls.call(libc::SYS_setuid, [0.into()])),
    ];
    let handles: Vec<_> = HANDED
        .map(|number| {
            let handle = [&8_u32.to_ne_bytes()[..], &1_i32.to_ne_bytes(), &[2, 0, 0, 0, 0, 0, 0, 0]].concat();
            let by_handle = [number.into(), Argument::Bytes(handle), libc::O_RDWR.into()];
            (
                calls.call(libc::SYS_open_by_handle_at, by_handle),
                calls.call(libc::SYS_setns, [number.into(), 0.into()]),
            )
        })
        .collect();
    let gave = attempt(&machine, &[], calls);
    // SAFETY: with the flag 1 there is no struct to read.
    let landlock = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0, 0, 1) };
    assert!(gave[mount] < 0 || landlock < 0, "landlock refuses mounts");
    for (what, call) in refused {
        assert!(gave[call] < 0, "{what} gave {}", gave[call]);
    }
    for (by_handle, namespace) in handles {
        assert!(gave[by_handle] < 0 && gave[namespace] < 0, "{} {}", gave[by_handle], gave[namespace]);
    }
    let own = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    assert_ne!(own.trim(), "mine");
}

#[test]
#[ignore = "needs root: scripts/test runs it"]
fn a_program_that_ignores_signals_goes_with_its_step() {
    let machine = Machine::new(&Code::default());
    let mut calls = Calls::default();
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
        let ignore = [libc::SIG_IGN.to_ne_bytes(), [0; 8], [0; 8], [0; 8]].concat();
        calls.call(libc::SYS_rt_sigaction, [signal.into(), Argument::Bytes(ignore), 0.into(), 8.into()]);
    }
    calls.call(libc::SYS_write, [1.into(), "r".into(), 1.into()]);
    calls.call(libc::SYS_pause, []);
    calls.write(&machine.path("probe"));
    let mut jail = command(&machine, &["--exec-file", &machine.text("probe")]);
    let mut child = jail.stdout(Stdio::piped()).spawn().unwrap();
    let mut ready = [0];
    std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut ready).unwrap();
    let pid = child_of(child.id());
    // SAFETY: the step, which this test has started.
    unsafe { libc::kill(child.id().cast_signed(), libc::SIGKILL) };
    child.wait().unwrap();
    let stat = format!("/proc/{pid}/stat");
    wait_for("its end", || {
        fs::read_to_string(&stat).map_or(true, |text| text.contains(") Z ")).then_some(())
    });
}
