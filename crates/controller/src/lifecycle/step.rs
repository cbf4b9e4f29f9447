//! What to do next about an instance: one pure function per step.

use super::draft::{NEVER, View};
use super::meter;
use roost_store::{InstanceRow, Seen};
use roost_types::Micros;
use roost_types::agent::{Observed, StateReason};
use roost_types::state::Step;

/// What a step decided.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StepOutcome {
    /// Steps to hop through, in this order and in one transaction.
    pub hops: Vec<Step>,
    /// Where it hops nowhere: until when it sleeps.
    pub nap: Option<Nap>,
    /// A new reason for the state, or that there is none.
    pub reason: Option<Option<StateReason>>,
    /// The virtual CPUs began to run at this time.
    pub open: Option<Micros>,
    /// They ended at this time.
    pub close: Option<Micros>,
    /// The start that the hops lead to goes on with the one before.
    pub continues: bool,
    /// The host refuses the spec as it is numbered: number it anew.
    pub regenerate: bool,
}

/// Nothing to do for now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nap {
    /// When to look again if nothing happens.
    pub until: Micros,
    /// What goes wrong just now.
    pub trouble: Option<String>,
    /// Whether this try failed; the next one waits longer.
    pub failed: bool,
}

/// How long to wait after so many failed tries: 1 s, doubling up to 64 s.
pub fn back_off(tries: u32) -> Micros {
    Micros::from_secs(1 << tries.min(6))
}

fn nap(until: Micros, trouble: Option<String>) -> StepOutcome {
    StepOutcome { nap: Some(Nap { until, trouble, failed: false }), ..StepOutcome::default() }
}

fn hop(next: Step) -> StepOutcome {
    StepOutcome { hops: vec![next], ..StepOutcome::default() }
}

/// A state reason.
pub fn because(code: &str, message: impl Into<String>) -> StateReason {
    StateReason { code: code.to_owned(), message: message.into() }
}

/// Runs the step that the row is at.
pub fn step(row: &InstanceRow, view: &View) -> StepOutcome {
    let own = row.observed.as_ref().filter(|seen| seen.incarnation == row.incarnation);
    let mut outcome = match row.step {
        Step::Place => place(row, view, own),
        Step::Launch => launch(row, view, own),
        Step::Run => run(row, view, own),
        Step::Stop => stop(row, view),
        Step::Terminate => terminate(row, view),
        Step::Rest | Step::Gone => nap(NEVER, None),
    };
    let refused = row.observed.as_ref().is_some_and(|seen| {
        seen.refused.is_some() || (seen.generation > row.generation && row.step != Step::Gone)
    });
    if refused && outcome.hops.is_empty() && (row.tries == 0 || view.now >= row.not_before) {
        outcome.regenerate = true;
        if let Some(nap) = &mut outcome.nap {
            nap.until = nap.until.min(view.now + back_off(row.tries));
            nap.failed = true;
            nap.trouble = row.observed.as_ref().and_then(|seen| seen.refused.clone()).or(nap.trouble.take());
        }
    }
    outcome
}

fn host_name(row: &InstanceRow) -> &str {
    row.host_id.as_ref().map_or("(none)", |host| host.as_str())
}

/// Deadline of the step. A step that began before this run of the controller gets its whole time
/// anew: the wall clock proves nothing about the time in between.
fn deadline(row: &InstanceRow, view: &View) -> Option<Micros> {
    let deadline = row.deadline?;
    let anew = view.limits.of(row.step).filter(|_| row.step_since < view.began);
    Some(anew.map_or(deadline, |limit| deadline.max(view.began + limit)))
}

fn overdue(row: &InstanceRow, view: &View) -> bool {
    deadline(row, view).is_some_and(|deadline| view.now >= deadline)
}

/// A start failed. One that never ran is of no use to anybody and goes; one that did keeps its disk.
fn fail_start(row: &InstanceRow, reason: StateReason) -> StepOutcome {
    let next = if row.running_since.is_none() { Step::Terminate } else { Step::Stop };
    StepOutcome { reason: Some(Some(reason)), ..hop(next) }
}

fn place(row: &InstanceRow, view: &View, own: Option<&Seen>) -> StepOutcome {
    if view.host_alive || own.is_some() {
        return hop(Step::Launch);
    }
    let silent = format!("host {} does not report", host_name(row));
    if overdue(row, view) {
        return fail_start(row, because("Server.InternalError", silent));
    }
    let until = (view.now + back_off(row.tries)).min(deadline(row, view).unwrap_or(NEVER));
    StepOutcome { nap: Some(Nap { until, trouble: Some(silent), failed: true }), ..StepOutcome::default() }
}

/// Whether the host has rebooted since this incarnation was first seen on it.
fn rebooted(row: &InstanceRow, seen: &Seen) -> bool {
    row.boot_id.as_ref().is_some_and(|boot| *boot != seen.boot_id)
}

/// The host rebooted under a wanted instance. One transaction ends this incarnation and starts the
/// next one, so that no other instance takes its capacity in between. The owner asked for one
/// start, and pays one minimum.
fn come_back(row: &InstanceRow, view: &View, seen: &Seen) -> StepOutcome {
    StepOutcome {
        hops: vec![Step::Stop, Step::Rest, Step::Place],
        continues: row.continues || row.open_since.is_some(),
        close: row.open_since.map(|open| meter::end_of_run(row, Some(seen), view, open)),
        reason: Some(Some(because("Server.HostReboot", "The host rebooted; the instance is started again."))),
        ..StepOutcome::default()
    }
}

/// Why a run ended that nobody had asked to end.
fn why_ended(seen: &Seen) -> StateReason {
    seen.reason.clone().unwrap_or_else(|| {
        if seen.run_ended.is_some() {
            because("Client.InstanceInitiatedShutdown", "The guest ended by itself.")
        } else {
            because("Server.InternalError", "The monitor ended without a word.")
        }
    })
}

fn launch(row: &InstanceRow, view: &View, own: Option<&Seen>) -> StepOutcome {
    let Some(seen) = own else { return wait_for_start(row, view, None) };
    let began = seen.run_began;
    match seen.state {
        Observed::Running => {
            let open = began.unwrap_or(seen.since).max(view.sealed);
            StepOutcome { open: Some(open), reason: Some(None), ..hop(Step::Run) }
        }
        Observed::Preparing | Observed::Absent => wait_for_start(row, view, seen.trouble.as_deref()),
        _ if rebooted(row, seen) => come_back(row, view, seen),
        // It ran and ended before anybody told us: billed for what it ran.
        Observed::Stopping | Observed::Stopped | Observed::Failed if began.is_some() => StepOutcome {
            open: began.map(|began| began.max(view.sealed)),
            close: began.map(|began| meter::end_of_run(row, Some(seen), view, began.max(view.sealed))),
            reason: Some(Some(why_ended(seen))),
            ..hop(Step::Stop)
        },
        // It is about to begin.
        Observed::Stopping | Observed::Stopped => wait_for_start(row, view, seen.trouble.as_deref()),
        Observed::Failed => {
            let reason = seen.reason.clone().unwrap_or_else(|| {
                because("Server.InternalError", "The start failed on the host, which did not say why.")
            });
            fail_start(row, reason)
        }
    }
}

fn wait_for_start(row: &InstanceRow, view: &View, trouble: Option<&str>) -> StepOutcome {
    if overdue(row, view) {
        let last = trouble.map_or_else(String::new, |trouble| format!(": {trouble}"));
        let text = format!("The instance did not start within {} s{last}.", view.limits.launch.floor_secs());
        return fail_start(row, because("Server.InternalError", text));
    }
    nap(deadline(row, view).unwrap_or(NEVER), trouble.map(str::to_owned))
}

fn run(row: &InstanceRow, view: &View, own: Option<&Seen>) -> StepOutcome {
    let Some(seen) = own else { return nap(NEVER, None) };
    if rebooted(row, seen) {
        return come_back(row, view, seen);
    }
    match seen.state {
        // A reboot takes a new monitor; it is one run all the same.
        Observed::Running | Observed::Preparing => nap(NEVER, seen.trouble.clone()),
        Observed::Absent if seen.generation < row.generation => nap(NEVER, None),
        Observed::Stopping | Observed::Stopped | Observed::Failed | Observed::Absent => StepOutcome {
            // While the host is still clearing up, an end that it has not dated yet can still come.
            close: row
                .open_since
                .filter(|_| seen.state != Observed::Stopping || seen.run_ended.is_some())
                .map(|open| meter::end_of_run(row, Some(seen), view, open)),
            reason: Some(Some(why_ended(seen))),
            ..hop(Step::Stop)
        },
    }
}

/// Whether the host has carried out our newest word.
fn obeyed(row: &InstanceRow, seen: &Seen) -> bool {
    seen.generation >= row.generation
}

fn stop(row: &InstanceRow, view: &View) -> StepOutcome {
    let Some(seen) = &row.observed else { return wait_for_end(row, view, None) };
    let own = seen.incarnation == row.incarnation;
    let ended = match seen.state {
        // An incarnation that has ended never runs again.
        Observed::Stopped | Observed::Failed => own || obeyed(row, seen),
        Observed::Absent => obeyed(row, seen),
        Observed::Preparing | Observed::Running | Observed::Stopping => false,
    };
    let close = row
        .open_since
        .filter(|_| ended || (own && seen.run_ended.is_some()))
        .map(|open| meter::end_of_run(row, Some(seen), view, open));
    let rest = if ended { hop(Step::Rest) } else { wait_for_end(row, view, seen.trouble.as_deref()) };
    // Of an end that nobody asked for, the host may learn the reason only while it clears up.
    let unasked = row.bill_until.is_none() && row.running_since.is_some();
    let reason = seen.reason.clone().filter(|_| ended && own && unasked).map(Some);
    StepOutcome { close, reason, ..rest }
}

fn terminate(row: &InstanceRow, view: &View) -> StepOutcome {
    let Some(seen) = &row.observed else { return wait_for_end(row, view, None) };
    let own = seen.incarnation == row.incarnation;
    let gone = seen.state == Observed::Absent && obeyed(row, seen);
    let close = row
        .open_since
        .filter(|_| gone || (own && seen.run_ended.is_some()))
        .map(|open| meter::end_of_run(row, Some(seen), view, open));
    let next = if gone { hop(Step::Gone) } else { wait_for_end(row, view, seen.trouble.as_deref()) };
    StepOutcome { close, ..next }
}

/// An end is never given up: only the host can say that nothing is left. Past the deadline it is called trouble.
fn wait_for_end(row: &InstanceRow, view: &View, trouble: Option<&str>) -> StepOutcome {
    if !overdue(row, view) {
        return nap(deadline(row, view).unwrap_or(NEVER), trouble.map(str::to_owned));
    }
    let detail = trouble.map_or_else(|| format!("host {} says nothing", host_name(row)), str::to_owned);
    nap(NEVER, Some(format!("not done within {} s: {detail}", view.limits.stop.floor_secs())))
}
