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

/// These calls read, ask or fail if the filter allows them: an allowed one does no harm.
fn beyond_the_process() -> Vec<(&'static str, i64, [i64; 4])> {
    let exec = i64::from(libc::PROT_READ | libc::PROT_EXEC);
    let fresh = i64::from(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    let ioctl = |name, request: i64| (name, libc::SYS_ioctl, [-1, request, 0, 0]);
    let socket = |name, family: i32| (name, libc::SYS_socket, [i64::from(family), 1, 0, 0]);
    vec![
        ("kill", libc::SYS_kill, [1, 0, 0, 0]),
        ("tgkill of another process", libc::SYS_tgkill, [1, 1, 0, 0]),
        ("ptrace", libc::SYS_ptrace, [-1, 0, 0, 0]),
        ("process_vm_readv", libc::SYS_process_vm_readv, [1, 0, 0, 0]),
        ("process_vm_writev", libc::SYS_process_vm_writev, [1, 0, 0, 0]),
        ("pidfd_open", libc::SYS_pidfd_open, [1, 0, 0, 0]),
        ("pidfd_getfd", libc::SYS_pidfd_getfd, [-1, 0, 0, 0]),
        ("pidfd_send_signal", libc::SYS_pidfd_send_signal, [-1, 0, 0, 0]),
        ("unshare", libc::SYS_unshare, [0; 4]),
        ("setns", libc::SYS_setns, [-1, 0, 0, 0]),
        ("clone3", libc::SYS_clone3, [0; 4]),
        ("setuid", libc::SYS_setuid, [-1, 0, 0, 0]),
        ("capset", libc::SYS_capset, [0; 4]),
        ("mount", libc::SYS_mount, [0; 4]),
        ("chroot", libc::SYS_chroot, [0; 4]),
        ("keyctl", libc::SYS_keyctl, [0xffff, 0, 0, 0]),
        ("bpf", libc::SYS_bpf, [0xffff, 0, 0, 0]),
        ("perf_event_open", libc::SYS_perf_event_open, [0, 0, -1, -1]),
        ("userfaultfd", libc::SYS_userfaultfd, [-1, 0, 0, 0]),
        ("io_uring_setup", libc::SYS_io_uring_setup, [0; 4]),
        ("io_uring_register of buffers", libc::SYS_io_uring_register, [-1, 0, 0, 0]),
        ("memfd_create", libc::SYS_memfd_create, [0; 4]),
        ("open", libc::SYS_open, [0; 4]),
        ("openat", libc::SYS_openat, [-1, 0, 0, 0]),
        ("openat2", libc::SYS_openat2, [-1, 0, 0, 0]),
        ("open_by_handle_at", libc::SYS_open_by_handle_at, [-1, 0, 0, 0]),
        ("linkat", libc::SYS_linkat, [-1, 0, -1, 0]),
        ("execve", libc::SYS_execve, [0; 4]),
        ("execveat", libc::SYS_execveat, [-1, 0, 0, 0]),
        socket("an internet socket", libc::AF_INET),
        socket("a packet socket", libc::AF_PACKET),
        socket("a netlink socket", libc::AF_NETLINK),
        socket("a vsock socket", libc::AF_VSOCK),
        ("listen", libc::SYS_listen, [-1, 0, 0, 0]),
        // SCM_RIGHTS would pass descriptors to another process.
        ("sendmsg", libc::SYS_sendmsg, [-1, 0, 0, 0]),
        ("sendmmsg", libc::SYS_sendmmsg, [-1, 0, 0, 0]),
        ("dup2", libc::SYS_dup2, [-1, -1, 0, 0]),
        ("prctl", libc::SYS_prctl, [-1, 0, 0, 0]),
        ("seccomp", libc::SYS_seccomp, [-1, 0, 0, 0]),
        ("prlimit64", libc::SYS_prlimit64, [-1, 0, 0, 0]),
        ("personality", libc::SYS_personality, [0xffff_ffff, 0, 0, 0]),
        ("mmap of code", libc::SYS_mmap, [0, 4096, exec, fresh]),
        ("mprotect of code", libc::SYS_mprotect, [0, 4096, exec, 0]),
        ("pkey_mprotect", libc::SYS_pkey_mprotect, [0, 4096, exec, -1]),
        ("iopl", libc::SYS_iopl, [99, 0, 0, 0]),
        ioctl("TUNSETIFF", 0x4004_54ca),
        ioctl("TUNSETPERSIST", 0x4004_54cb),
        ioctl("TUNSETOWNER", 0x4004_54cc),
        ioctl("TUNSETSNDBUF", 0x4004_54d4),
        ioctl("SIOCSIFFLAGS", 0x8914),
        ioctl("TIOCSTI", 0x5412),
        ioctl("KVM_CREATE_VM", 0xae01),
        ioctl("KVM_SET_USER_MEMORY_REGION", 0x4020_ae46),
    ]
}

#[test]
fn no_thread_of_a_monitor_makes_a_call_that_reaches_beyond_its_process() {
    for (kind, name) in [
        (Kind::Api, threads::API),
        (Kind::Devices, threads::DEVICES),
        (Kind::Disk, threads::DISK),
        (Kind::Vcpu, "vcpu0"),
    ] {
        let filter = compile(kind).unwrap();
        for (what, call, arguments) in beyond_the_process() {
            // SAFETY: the child makes plain calls only, and ends by _exit.
            let child = unsafe { libc::fork() };
            if child == 0 {
                let locked = sigsys::install(None).and_then(|()| {
                    sigsys::note_thread_name(name);
                    install(&filter)
                });
                let [a, b, c, d] = arguments;
                if locked.is_ok() {
                    // SAFETY: the call is forbidden; if it is not, its arguments do nothing.
                    unsafe { libc::syscall(call, a, b, c, d, -1, 0) };
                }
                // SAFETY: ends the child at once, without handlers.
                unsafe { libc::_exit(0) };
            }
            let mut status = 0;
            // SAFETY: waits for the child that was just made.
            assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
            let code = libc::WIFEXITED(status).then(|| libc::WEXITSTATUS(status));
            assert_eq!(code, Some(ExitCode::Seccomp.code()), "{kind:?} may do this: {what}");
        }
    }
}
