//! A change in the making, and the loop that runs steps over it.

use super::meter;
use super::step::{StepOutcome, step};
use roost_store::{Change, Claim, ClaimChange, InstanceRecord, InstanceRow, StoreError};
use roost_types::Micros;
use roost_types::metering::UsageEvent;
use roost_types::state::{DesiredState, Step, VolumeState};

/// A time that never comes: a row that only an event can wake.
pub const NEVER: Micros = Micros(i64::MAX);

/// How long each step may take.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// For a host to answer.
    pub place: Micros,
    /// For a start.
    pub launch: Micros,
    /// For a stop or a termination.
    pub stop: Micros,
}

impl Limits {
    /// Time limit of a step, if it has one.
    pub const fn of(&self, step: Step) -> Option<Micros> {
        match step {
            Step::Place => Some(self.place),
            Step::Launch => Some(self.launch),
            Step::Stop | Step::Terminate => Some(self.stop),
            Step::Run | Step::Rest | Step::Gone => None,
        }
    }
}

/// What is known beside the row.
#[derive(Debug, Clone)]
pub struct View {
    /// Now, by the controller's clock.
    pub now: Micros,
    /// Current time on the clock of the billed run: its last proof plus the monotonic time since.
    pub run_now: Micros,
    /// End of the newest sealed month.
    pub sealed: Micros,
    /// Start of this run of the controller. No deadline counts time without a controller.
    pub began: Micros,
    /// Whether the instance's host has reported lately.
    pub host_alive: bool,
    /// Until when the instance was seen running.
    pub proof: Option<Micros>,
    /// A proof so young stands for now.
    pub recent: Micros,
    /// How long steps may take.
    pub limits: Limits,
}

/// A change of one instance that is being put together.
#[derive(Debug, Clone)]
pub struct Draft {
    /// The rows as they will be.
    pub record: InstanceRecord,
    before: InstanceRow,
    usage: Vec<UsageEvent>,
    take: Option<Claim>,
    hold: Option<Claim>,
    proof: Option<Micros>,
    volume: Option<VolumeState>,
    /// A transition that the table does not have: a defect, which must not be written.
    fault: Option<String>,
}

/// What a host makes of an instance that is at a step.
pub const fn wanted_at(step: Step) -> DesiredState {
    match step {
        Step::Place | Step::Launch | Step::Run => DesiredState::Running,
        Step::Stop | Step::Rest => DesiredState::Stopped,
        Step::Terminate | Step::Gone => DesiredState::Terminated,
    }
}

impl Draft {
    /// Begins a change.
    pub fn new(record: InstanceRecord) -> Self {
        let before = record.row.clone();
        Self {
            record,
            before,
            usage: Vec::new(),
            take: None,
            hold: None,
            proof: None,
            volume: None,
            fault: None,
        }
    }

    /// Takes this claim along.
    pub fn take(&mut self, claim: Claim) {
        self.take = Some(claim);
    }

    /// Adds this claim to the change, whether or not it fits.
    pub fn hold(&mut self, claim: Claim) {
        self.hold = Some(claim);
    }

    /// Makes a proof of life durable along.
    pub fn prove(&mut self, seen: Option<Micros>) {
        self.proof = self.proof.max(seen);
    }

    /// Moves to another step; no other function does. A transition that the table does not have is
    /// a defect of the caller: [`Draft::into_change`] refuses the whole change.
    pub fn hop(&mut self, next: Step, now: Micros, limits: &Limits) {
        let row = &mut self.record.row;
        if !row.step.may_become(next) {
            self.fault.get_or_insert_with(|| format!("there is no hop from step {} to {next}", row.step));
            return;
        }
        if wanted_at(row.step) != wanted_at(next) {
            row.generation += 1;
        }
        row.step = next;
        row.step_since = now;
        row.trouble = None;
        row.tries = 0;
        row.not_before = now;
        row.deadline = limits.of(next).map(|limit| now + limit);
        match next {
            Step::Place => {
                row.desired = DesiredState::Running;
                row.incarnation += 1;
                row.incarnation_at = now;
                row.reboots = 0;
                row.force = false;
                row.observed = None;
                row.boot_id = None;
                row.bill_until = None;
                row.segment = 0;
                row.continues = false;
                row.timing = roost_store::Timing { incarnation: row.incarnation, ..Default::default() };
            }
            Step::Stop => row.desired = DesiredState::Stopped,
            Step::Terminate => {
                row.desired = DesiredState::Terminated;
                // The volume's bill ends where its removal is accepted.
                if self.record.volume.metered {
                    self.usage.push(meter::close_volume(&self.record.volume, now));
                    self.record.volume.metered = false;
                }
                self.set_volume(VolumeState::Deleting);
            }
            Step::Gone => {
                row.terminated_at = Some(now);
                self.set_volume(VolumeState::Deleted);
            }
            Step::Launch | Step::Run | Step::Rest => {}
        }
    }

    fn set_volume(&mut self, state: VolumeState) {
        if self.record.volume.state.may_become(state) {
            self.record.volume.state = state;
            self.volume = Some(state);
        }
    }

    /// The virtual CPUs began to run: the bill opens, for the volume too at the first time.
    pub(super) fn open(&mut self, at: Micros) {
        let row = &mut self.record.row;
        if row.open_since.is_none() {
            self.usage.push(meter::open_instance(row, at));
            row.open_since = Some(at);
            row.running_since = Some(at);
        }
        if self.record.volume.state == VolumeState::Creating {
            self.usage.push(meter::open_volume(&self.record.volume, at));
            self.record.volume.metered = true;
            self.set_volume(VolumeState::InUse);
        }
    }

    /// They ended: the bill closes.
    pub(super) fn close(&mut self, at: Micros) {
        let row = &mut self.record.row;
        if let Some(open) = row.open_since.take() {
            self.usage.push(meter::close_instance(row, at.max(open)));
            self.proof = None;
        }
    }

    /// Ends the open interval at its last proof, and opens the next part of the same start at
    /// `until`. The time between has no proof, and is never billed.
    pub fn seal(&mut self, proof: Option<Micros>, until: Micros) {
        let row = &mut self.record.row;
        let Some(open) = row.open_since.filter(|open| *open < until) else { return };
        let seen = proof.unwrap_or(open);
        if seen >= until {
            return;
        }
        self.usage.push(meter::close_instance(row, seen.max(open)));
        row.segment += 2;
        row.open_since = Some(until);
        self.usage.push(meter::open_instance(row, until));
    }

    /// Writes a step's outcome into the draft.
    pub fn apply(&mut self, outcome: StepOutcome, view: &View) {
        if let Some(at) = outcome.open {
            self.open(at);
        }
        if let Some(at) = outcome.close {
            self.close(at);
        }
        if let Some(reason) = outcome.reason {
            self.record.row.state_reason = reason;
        }
        for next in outcome.hops {
            self.hop(next, view.now, &view.limits);
        }
        let row = &mut self.record.row;
        row.continues |= outcome.continues;
        if outcome.regenerate {
            row.generation = row.generation.max(row.observed.as_ref().map_or(0, |seen| seen.generation)) + 1;
            row.observed.iter_mut().for_each(|seen| seen.refused = None);
        }
        if let Some(nap) = outcome.nap {
            row.not_before = nap.until;
            row.trouble = nap.trouble;
            row.tries = if nap.failed { row.tries.saturating_add(1) } else { 0 };
        }
    }

    /// Whether anything differs from what was read.
    pub fn is_change(&self) -> bool {
        self.record.row != self.before || !self.usage.is_empty() || self.proof.is_some()
    }

    /// The point at which a test can halt the commit of a hop.
    pub fn point(&self) -> Option<&'static str> {
        let to = self.record.row.step;
        (to != self.before.step).then_some(match to {
            Step::Place => "controller.to-place",
            Step::Launch => "controller.to-launch",
            Step::Run => "controller.to-run",
            Step::Stop => "controller.to-stop",
            Step::Rest => "controller.to-rest",
            Step::Terminate => "controller.to-terminate",
            Step::Gone => "controller.to-gone",
        })
    }

    /// The change for the store. Capacity follows from the states: an instance at rest or gone holds none.
    ///
    /// # Errors
    /// [`StoreError::Unreadable`] if the draft made a transition that the table does not have.
    pub fn into_change(self) -> Result<Change, StoreError> {
        if let Some(detail) = self.fault {
            return Err(StoreError::Unreadable { what: format!("row {}", self.before.instance_id), detail });
        }
        let state = self.record.row.state();
        let claim = match (self.take, self.hold) {
            (Some(claim), _) => ClaimChange::Take(claim),
            (None, Some(claim)) if state.holds_capacity() => ClaimChange::Hold(claim),
            (None, _) if self.before.state().holds_capacity() && !state.holds_capacity() => {
                ClaimChange::Release
            }
            (None, _) => ClaimChange::Keep,
        };
        let mut change = Change::of(self.record.row);
        change.release_addresses = change.row.step == Step::Gone && self.before.step != Step::Gone;
        change.claim = claim;
        change.usage = self.usage;
        change.proof = self.proof;
        change.volume = self.volume;
        Ok(change)
    }
}

/// Runs steps until one naps.
pub fn advance(draft: &mut Draft, view: &View) {
    loop {
        let outcome = step(&draft.record.row, view);
        let napped = outcome.hops.is_empty();
        draft.apply(outcome, view);
        if napped || draft.fault.is_some() {
            return;
        }
    }
}
