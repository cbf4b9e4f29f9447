//! Decides the next action for one instance: a pure function of the spec, the remembered run and
//! the facts of a look at the host.
//!
//! ```text
//! wanted running:  begin → fetch → disk → network → cgroup → start monitor → let run → rest(running)
//!                    ▲                                                         │ monitor gone
//!                    └── new incarnation ── rest(stopped) ◀── tear down ◀── end ┘
//!                                                           (a reboot goes back to `start monitor` instead)
//!                  a disk that was made before and is gone is never made again: end, with that reason
//! wanted stopped:    power button, again and again → (grace) → kill → end → tear down → rest(stopped)
//! wanted terminated: kill → end → tear down → remove disk → forget
//! ```
//! There is no state of its own: a crash anywhere is a pause, and the next look goes on from what is there.

use crate::host::{Death, Facts, MonitorFact};
use crate::record::{Ended, Run};
use roost_types::agent::{InstanceSpec, Observed, StateReason};
use roost_types::state::DesiredState;
use roost_vmm::status::ExitReason;

/// Monitors that may end before their vCPUs ran; then the start has failed.
pub const START_ATTEMPTS: u32 = 3;

/// A guest that resets itself this many times within [`RESETS_WITHIN_NS`] without ever being ready
/// cannot boot: its run ends.
pub const RESETS: usize = 5;
/// 300 s: five failing boots of a slow guest take less.
pub const RESETS_WITHIN_NS: u64 = 300_000_000_000;

/// The next thing to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Remember a fresh incarnation.
    Begin,
    /// Get the blobs.
    Fetch,
    /// Make the root volume.
    MakeDisk,
    /// Make or replace the network.
    MakeNetwork,
    /// Make the cgroup, or set its limits anew.
    MakeCgroup,
    /// Start the monitor, held.
    StartMonitor,
    /// Let the vCPUs run.
    LetRun,
    /// Remember when vCPUs began to run.
    NoteBegan(u64),
    /// Remember that a monitor ended before vCPUs ran, and why.
    NoteFailedStart(String),
    /// Remember that a reboot has taken the monitor down; it starts again.
    NoteReboot,
    /// Remember how the run ended.
    NoteEnded(Ended),
    /// Press the guest's power button, now and then, until the grace is over.
    PowerOff,
    /// End every process of it.
    Kill,
    /// Remove what exists only for a run.
    TearDown,
    /// Remove the volume.
    RemoveDisk,
    /// Remove the records; nothing is left.
    Forget,
    /// Nothing to do: this is what it is.
    Rest(Observed),
}

/// What was already asked of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Power {
    /// Nothing.
    NotAsked,
    /// Its power button was pressed and it has time.
    Waiting,
    /// Its time is over.
    Overdue,
}

/// Elapsed times that the decision depends on.
#[derive(Debug, Clone, Copy)]
pub struct Deadlines<'a> {
    /// Progress of a requested power-off.
    pub power: Power,
    /// Set if a reboot's new monitor is overdue: the last error.
    pub restart: Option<&'a str>,
}

/// Decides.
pub fn plan(spec: &InstanceSpec, run: &Run, facts: &Facts, deadlines: Deadlines<'_>) -> Action {
    let power = deadlines.power;
    if let Some(why) = deadlines.restart.filter(|_| restarts(spec, run, facts)) {
        return match &facts.monitor {
            MonitorFact::Stray | MonitorFact::Alive { .. } => Action::Kill,
            MonitorFact::None | MonitorFact::Dead(_) => Action::NoteEnded(not_restarted(run, why)),
        };
    }
    match &facts.monitor {
        MonitorFact::Stray => Action::Kill,
        MonitorFact::Alive { ran_ns, resets_ns } => cannot_boot(spec, run, resets_ns)
            .map_or_else(|| alive(spec, run, facts, power, *ran_ns), Action::NoteEnded),
        MonitorFact::Dead(death) => dead(spec, run, death),
        MonitorFact::None => none(spec, run, facts),
    }
}

/// Returns true if a reboot ended the monitor of a wanted run and no vCPU of the next monitor runs
/// yet.
pub fn restarts(spec: &InstanceSpec, run: &Run, facts: &Facts) -> bool {
    let waits = match &facts.monitor {
        MonitorFact::None | MonitorFact::Stray => true,
        MonitorFact::Alive { ran_ns, .. } => ran_ns.is_none(),
        MonitorFact::Dead(death) => death.ran_ns.is_none() && !death.host_rebooted,
    };
    let wanted = spec.desired == DesiredState::Running && run.incarnation == spec.incarnation;
    waits && wanted && run.is_open() && run.restart_ns.is_some()
}

fn alive(spec: &InstanceSpec, run: &Run, facts: &Facts, power: Power, ran_ns: Option<u64>) -> Action {
    if let (Some(at), None) = (ran_ns, run.began_ns) {
        return Action::NoteBegan(at);
    }
    let ours = run.incarnation == spec.incarnation && run.ended.is_none();
    if !ours || ran_ns.is_none() && spec.desired != DesiredState::Running {
        return Action::Kill;
    }
    let gentle = match spec.desired {
        DesiredState::Running => {
            if !facts.network {
                return Action::MakeNetwork;
            }
            if !facts.cgroup {
                return Action::MakeCgroup;
            }
            if ran_ns.is_none() {
                return Action::LetRun;
            }
            if spec.reboots <= run.reboots_done {
                return Action::Rest(Observed::Running);
            }
            true
        }
        DesiredState::Stopped => true,
        // A disk that outlives its instance is worth a clean end.
        DesiredState::Terminated => !spec.root_volume.delete_on_termination,
    };
    if gentle && !spec.force && power != Power::Overdue { Action::PowerOff } else { Action::Kill }
}

fn dead(spec: &InstanceSpec, run: &Run, death: &Death) -> Action {
    match (run.began_ns, death.ran_ns) {
        (None, Some(at)) if !death.host_rebooted => return Action::NoteBegan(at),
        (None, _) => return Action::NoteFailedStart(why(death).message),
        _ => {}
    }
    let wanted = spec.desired == DesiredState::Running && run.incarnation == spec.incarnation;
    if wanted && run.ended.is_none() && spec.reboots > run.reboots_done && !death.host_rebooted {
        return Action::NoteReboot;
    }
    if run.ended.is_some() {
        // Killed after its end was noted: nothing more to remember.
        return Action::NoteEnded(run.ended.clone().unwrap_or_else(|| ended(spec, run, death)));
    }
    Action::NoteEnded(ended(spec, run, death))
}

fn none(spec: &InstanceSpec, run: &Run, facts: &Facts) -> Action {
    let current = run.incarnation == spec.incarnation;
    if spec.desired == DesiredState::Running && current && run.ended.is_none() {
        return match facts {
            Facts { disk: false, .. } if run.volume_made || run.began_ns.is_some() => {
                Action::NoteEnded(volume_lost(spec, run))
            }
            Facts { images: false, .. } => Action::Fetch,
            Facts { disk: false, .. } => Action::MakeDisk,
            Facts { network: false, .. } => Action::MakeNetwork,
            Facts { cgroup: false, .. } => Action::MakeCgroup,
            _ => Action::StartMonitor,
        };
    }
    if run.is_open() {
        // Between the two monitors of a reboot, and now it shall not run any more.
        return Action::NoteEnded(Ended { at_ns: run.last_seen_ns, reason: None, failed: false });
    }
    if facts.run_objects {
        return Action::TearDown;
    }
    match spec.desired {
        DesiredState::Terminated if facts.files && spec.root_volume.delete_on_termination => {
            Action::RemoveDisk
        }
        DesiredState::Terminated => Action::Forget,
        DesiredState::Running if !current => Action::Begin,
        _ if current && run.ended.as_ref().is_some_and(|ended| ended.failed) => {
            Action::Rest(Observed::Failed)
        }
        _ => Action::Rest(Observed::Stopped),
    }
}

fn ended(spec: &InstanceSpec, run: &Run, death: &Death) -> Ended {
    let asked = spec.desired != DesiredState::Running || run.incarnation != spec.incarnation;
    let at_ns = death.word.as_ref().filter(|_| !death.host_rebooted).map(|word| word.at_ns);
    Ended { at_ns, reason: (!asked || death.host_rebooted).then(|| why(death)), failed: false }
}

/// Why a monitor ended that nobody asked to, in EC2's manner.
pub fn why(death: &Death) -> StateReason {
    let reason = |code: &str, message: String| StateReason { code: code.into(), message };
    if death.out_of_memory {
        return reason(
            "Server.OutOfMemory",
            "the monitor needed more memory beside the guest's than its limit allows, and the kernel ended it".into(),
        );
    }
    let Some(word) = &death.word else {
        return if death.host_rebooted {
            reason("Server.HostReboot", "the host has booted since".into())
        } else {
            reason("Server.MonitorKilled", "the instance's monitor was killed from outside".into())
        };
    };
    match word.reason {
        ExitReason::PowerOff => {
            reason("Client.InstanceInitiatedShutdown", "the guest powered itself off".into())
        }
        ExitReason::Reset => reason("Client.InstanceInitiatedShutdown", "the guest reset itself".into()),
        ExitReason::Crash => reason("Client.GuestCrash", format!("the guest crashed: {}", word.message)),
        ExitReason::KilledByApi => reason("Server.MonitorKilled", word.message.clone()),
        ExitReason::Error => reason("Server.InternalError", word.message.clone()),
        ExitReason::Seccomp => reason("Server.MonitorViolation", word.message.clone()),
    }
}

/// Ends a run whose guest resets itself over and over and was never ready. Its monitor still lives:
/// once the end is recorded, the monitor is a stray and is killed.
fn cannot_boot(spec: &InstanceSpec, run: &Run, resets_ns: &[u64]) -> Option<Ended> {
    let ours = spec.desired == DesiredState::Running && run.incarnation == spec.incarnation && run.is_open();
    let first = resets_ns.len().checked_sub(RESETS).filter(|_| ours && !run.guest_ready)?;
    let took = resets_ns.last()?.saturating_sub(*resets_ns.get(first)?);
    let message = format!(
        "the guest cannot boot: it restarted itself {RESETS} times within {} s and was never ready; its console \
         (`roost console`) says why",
        took.div_ceil(1_000_000_000)
    );
    let reason = Some(StateReason { code: "Client.GuestCannotBoot".into(), message });
    (took <= RESETS_WITHIN_NS).then_some(Ended { at_ns: None, reason, failed: false })
}

/// Ends a run whose reboot got no new monitor. The run ended with its last monitor.
pub fn not_restarted(run: &Run, why: &str) -> Ended {
    let message = format!("a reboot ended the guest, and it could not be started again: {why}");
    let reason = Some(StateReason { code: "Server.InternalError".into(), message });
    Ended { at_ns: run.restart_ns, reason, failed: false }
}

/// Ends an instance whose volume was made before and is gone: an empty volume in its place would
/// hide the loss.
fn volume_lost(spec: &InstanceSpec, run: &Run) -> Ended {
    let message = format!(
        "volume {} is not on this host, where it was made before; it is not replaced by an empty one. Once the owner \
         of the host has put its file back, the instance can be started again",
        spec.root_volume.volume_id
    );
    let reason = Some(StateReason { code: "Server.VolumeNotFound".into(), message });
    Ended { at_ns: run.restart_ns, reason, failed: !run.is_open() }
}

/// The reason of a start that failed for good.
pub fn failed(message: impl Into<String>) -> Ended {
    Ended {
        at_ns: None,
        reason: Some(StateReason { code: "Server.InternalError".into(), message: message.into() }),
        failed: true,
    }
}
