//! The system calls that a monitor's threads make once each is behind its filter.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::process::{Child, Command};
use std::thread::JoinHandle;

use roost_vmm::seccomp::rules::Kind;

use super::{DEADLINE, notify};

/// A call: its number and arguments.
pub type Call = (i64, [u64; 6]);

/// What has been seen: by thread's name.
#[derive(Debug, Default)]
pub struct Seen {
    /// The monitor's process.
    pub pid: u32,
    /// Calls by the threads of each kind.
    pub calls: BTreeSet<(u8, Call)>,
}

/// Starts a program whose calls are watched until it ends.
pub fn start(command: &mut Command) -> (Child, JoinHandle<Seen>) {
    let (child, listener) = notify::spawn(command, notify::Calls::All).unwrap();
    let pid = child.id();
    (child, std::thread::spawn(move || watch(&listener, pid)))
}

fn watch(listener: &OwnedFd, pid: u32) -> Seen {
    let mut seen = Seen { pid, ..Seen::default() };
    while let Some(call) = notify::next(listener, DEADLINE).unwrap() {
        // The thread stands in its call: what is read of it is true at that moment.
        if let Some(kind) = locked_down(call.pid) {
            seen.calls.insert((kind as u8, (i64::from(call.data.nr), call.data.args)));
        }
        notify::go_on(listener, &call);
    }
    seen
}

/// The kind of a thread that is behind a filter of its own, beside ours.
fn locked_down(thread: u32) -> Option<Kind> {
    let folder = format!("/proc/{thread}");
    let status = std::fs::read_to_string(format!("{folder}/status")).ok()?;
    let filters: u32 =
        status.lines().find_map(|line| line.strip_prefix("Seccomp_filters:"))?.trim().parse().ok()?;
    if filters < 2 {
        return None;
    }
    let name = std::fs::read_to_string(format!("{folder}/comm")).ok()?;
    Some(match name.trim() {
        "vmm-api" => Kind::Api,
        "vmm-dev" => Kind::Devices,
        "vmm-disk" => Kind::Disk,
        "vmm-opener" => Kind::Opener,
        _ => Kind::Vcpu,
    })
}
