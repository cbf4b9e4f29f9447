//! Adopts a start that a host knows and the database does not: the database was restored from a
//! backup.
//!
//! Only a controller starts an instance. A running instance was therefore accepted once, and its
//! record is lost. The host's observation wins: the row's incarnation and generation move past the
//! host's. The open interval closes at its last proof, and the new run is billed from its begin.
//! Starts that only the lost records held are not billed.

use super::draft::{Draft, View};
use super::meter;
use roost_store::{Claim, InstanceRow};
use roost_types::Micros;
use roost_types::agent::Observation;
use roost_types::state::Step;

/// Returns true if the observation is of a start that the row does not have.
pub fn is_ahead(row: &InstanceRow, word: &Observation) -> bool {
    row.step != Step::Gone && word.incarnation > row.incarnation
}

/// Adopts the newer start into the row. `claim` is the instance's capacity on its host.
pub fn adopt(draft: &mut Draft, word: &Observation, claim: Claim, view: &View) {
    let row = &draft.record.row;
    let ago = |age: u64| Micros(view.now.0.saturating_sub(i64::try_from(age).unwrap_or(i64::MAX)));
    let began = word.run_began_age_us.map(ago);
    let earliest = began.unwrap_or_else(|| ago(word.age_us));
    let open = row.open_since;
    // A proof within the newer run proves nothing of the older run.
    let end = open.map(|open| meter::end_of_run(row, None, view, open).min(earliest).max(open));
    if let Some(end) = end {
        draft.close(end);
    }
    let hops: &[Step] = match draft.record.row.step {
        Step::Run => &[Step::Stop, Step::Rest, Step::Place],
        Step::Stop => &[Step::Rest, Step::Place],
        Step::Rest => &[Step::Place],
        Step::Place | Step::Launch | Step::Terminate | Step::Gone => &[],
    };
    if draft.record.row.step == Step::Rest {
        draft.hold(claim);
    }
    for next in hops {
        draft.hop(*next, view.now, &view.limits);
    }
    let row = &mut draft.record.row;
    row.incarnation = word.incarnation;
    row.incarnation_at = end.map_or(earliest, |end| end.max(earliest));
    row.generation = row.generation.max(word.generation) + 1;
    row.reboots = 0;
    row.segment = 0;
    row.continues = false;
    row.observed = None;
    row.boot_id = None;
    row.timing = roost_store::Timing { incarnation: row.incarnation, ..Default::default() };
    if row.step == Step::Terminate {
        // The termination still applies, and the run is billed up to its request.
        row.bill_until = Some(row.step_since);
        if let Some(began) = began {
            draft.open(began.max(view.sealed));
        }
    }
}
