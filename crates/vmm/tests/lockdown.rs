//! What a locked-down thread may not do: each case runs in a process of its own, which this program starts by running
//! itself again with the case in its environment.

#![allow(clippy::unwrap_used)]

use std::process::Command;

use roost_vmm::exit::ExitCode;
use roost_vmm::log::{self, LoggerConfig};
use roost_vmm::seccomp::{Kind, compile, install, sigsys};
use roost_vmm::threads;

const CASE: &str = "ROOST_VMM_LOCKDOWN_CASE";
const LOG: &str = "ROOST_VMM_LOCKDOWN_LOG";

/// The child's part: locks itself down and breaks the rule.
#[test]
fn child() {
    let Ok(case) = std::env::var(CASE) else { return };
    let (kind, name, action): (Kind, &str, fn()) = match case.as_str() {
        "open" => (Kind::Devices, threads::DEVICES, || drop(std::fs::File::open("/etc/passwd"))),
        "exec" => (Kind::Api, threads::API, || {
            let arguments = [c"true".as_ptr(), std::ptr::null()];
            // SAFETY: the path and the null-terminated list of arguments are valid.
            unsafe { libc::execv(c"/bin/true".as_ptr(), arguments.as_ptr()) };
        }),
        "socket" => (Kind::Api, threads::API, || drop(std::os::unix::net::UnixStream::pair())),
        "network" => (Kind::Devices, threads::DEVICES, || drop(std::net::UdpSocket::bind(("127.0.0.1", 0)))),
        "map" => (Kind::Vcpu, "vcpu0", || {
            // SAFETY: asks for a fresh mapping; the call never returns when the filter works.
            unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    4096,
                    libc::PROT_READ | libc::PROT_EXEC,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                    -1,
                    0,
                )
            };
        }),
        "ioctl" => (Kind::Vcpu, "vcpu0", || {
            // SAFETY: KVM_CREATE_VM's number on stdin fails harmlessly without a filter.
            unsafe { libc::ioctl(0, 0xae01, 0) };
        }),
        other => panic!("no case {other}"),
    };
    if let Some(path) = std::env::var_os(LOG) {
        log::configure(LoggerConfig::default(), Some(std::fs::File::create(path).unwrap()));
    }
    sigsys::install(None).unwrap();
    sigsys::note_thread_name(name);
    install(&compile(kind).unwrap()).unwrap();
    action();
    // The rule was not enforced.
    // SAFETY: ends the process.
    unsafe { libc::_exit(0) };
}

fn breaks(case: &str, thread: &str, call: &str) {
    let program = std::env::current_exe().unwrap();
    let log = tempfile::NamedTempFile::new().unwrap();
    let mut command = Command::new(program);
    command.args(["--exact", "child", "--nocapture"]).env(CASE, case).env(LOG, log.path());
    let output = command.output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(ExitCode::Seccomp.code()), "{case}: {message}");
    let expected = format!("thread {thread} made the forbidden system call {call}");
    assert!(message.contains(&expected), "{case}: {message}");
    let logged = std::fs::read_to_string(log.path()).unwrap();
    assert!(logged.contains(&expected) && logged.ends_with('\n'), "{case}: {logged}");
}

#[test]
fn the_device_thread_opens_no_path() {
    breaks("open", "vmm-dev", "openat");
}

#[test]
fn the_api_thread_makes_no_socket() {
    breaks("socket", "vmm-api", "socketpair");
}

#[test]
fn the_device_thread_makes_unix_sockets_and_no_others() {
    breaks("network", "vmm-dev", "socket");
}

#[test]
fn the_api_thread_starts_no_program() {
    breaks("exec", "vmm-api", "execve");
}

#[test]
fn a_vcpu_thread_maps_nothing_executable() {
    breaks("map", "vcpu0", "mmap");
}

#[test]
fn a_vcpu_thread_makes_no_other_ioctl() {
    breaks("ioctl", "vcpu0", "ioctl");
}
