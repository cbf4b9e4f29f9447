//! What an accepted call does to an instance, and which state forbids it. EC2's rules.

use super::draft::{Draft, Limits, View};
use super::step::because;
use roost_store::{Claim, InstanceRow};
use roost_types::state::{InstanceState, Step};
use roost_types::{ApiError, ErrorCode, InstanceType, Micros};

fn wrong_state(row: &InstanceRow, verb: &str, from: &str) -> ApiError {
    ApiError::new(
        ErrorCode::IncorrectInstanceState,
        format!("instance {} is {}: only {from} instances can be {verb}", row.instance_id, row.state()),
    )
}

/// Whether a start has anything to do: one of an instance that is pending or running succeeds and changes nothing.
///
/// # Errors
/// `IncorrectInstanceState` in any state but these and `stopped`.
pub fn needs_start(row: &InstanceRow) -> Result<bool, ApiError> {
    match row.state() {
        InstanceState::Stopped => Ok(true),
        InstanceState::Pending | InstanceState::Running => Ok(false),
        _ => Err(wrong_state(row, "started", "stopped, pending and running")),
    }
}

/// Starts a stopped instance with this claim. [`needs_start`] has said yes.
pub fn start(draft: &mut Draft, claim: Claim, now: Micros, limits: &Limits) {
    draft.hop(Step::Place, now, limits);
    draft.record.row.state_reason = None;
    draft.take(claim);
}

/// Stops a running instance; a stop of one that is stopping or stopped succeeds and changes nothing, but that
/// `force` still hurries one that is stopping.
///
/// # Errors
/// `IncorrectInstanceState` in any other state.
pub fn stop(draft: &mut Draft, force: bool, view: &View) -> Result<(), ApiError> {
    match draft.record.row.state() {
        InstanceState::Stopped => {}
        InstanceState::Stopping => {
            let row = &mut draft.record.row;
            if force && !row.force {
                row.force = true;
                row.generation += 1;
            }
        }
        InstanceState::Running => {
            draft.hop(Step::Stop, view.now, &view.limits);
            end_of_bill(draft, view);
            let row = &mut draft.record.row;
            row.force = force;
            row.state_reason =
                Some(because("Client.UserInitiatedShutdown", "Stopped at its owner's request."));
        }
        _ => return Err(wrong_state(&draft.record.row, "stopped", "running")),
    }
    Ok(())
}

/// Nothing after now is billed, and what was seen until now is kept.
fn end_of_bill(draft: &mut Draft, view: &View) {
    let row = &mut draft.record.row;
    if row.open_since.is_some() {
        let now = view.run_now;
        row.bill_until = Some(row.bill_until.map_or(now, |earlier| earlier.min(now)));
        draft.prove(view.proof.map(|seen| seen.min(now)));
    }
}

/// Reboots a running instance: same incarnation, same bill.
///
/// # Errors
/// `IncorrectInstanceState` in any other state.
pub fn reboot(draft: &mut Draft) -> Result<(), ApiError> {
    let row = &mut draft.record.row;
    if row.state() != InstanceState::Running {
        return Err(wrong_state(row, "rebooted", "running"));
    }
    row.reboots += 1;
    row.generation += 1;
    Ok(())
}

/// Removes an instance for good, from any state; again changes nothing.
pub fn terminate(draft: &mut Draft, view: &View) {
    if matches!(draft.record.row.step, Step::Terminate | Step::Gone) {
        return;
    }
    draft.hop(Step::Terminate, view.now, &view.limits);
    end_of_bill(draft, view);
    draft.record.row.state_reason =
        Some(because("Client.UserInitiatedShutdown", "Terminated at its owner's request."));
}

/// Gives a stopped instance another type.
///
/// # Errors
/// `IncorrectInstanceState` in any other state.
pub fn retype(draft: &mut Draft, instance_type: &InstanceType) -> Result<(), ApiError> {
    let row = &mut draft.record.row;
    if row.state() != InstanceState::Stopped {
        return Err(wrong_state(row, "given another type", "stopped"));
    }
    if row.instance_type != *instance_type {
        row.instance_type = instance_type.clone();
        row.generation += 1;
    }
    Ok(())
}
