//! A host that knows of a newer start than the database: the database was put back from a backup.
//!
//! Nobody starts an instance but a controller, so what runs was once accepted, and its record is lost. The host's word
//! stands: the row's incarnation and generation move past what the host has seen, the interval that the backup left
//! open closes at its last proof, and the new run is billed from where it began. What the lost records said of starts in
//! between is nowhere, and is not billed.

use super::draft::{Draft, View};
use super::meter;
use roost_store::{Claim, InstanceRow};
use roost_types::Micros;
use roost_types::agent::Observation;
use roost_types::state::Step;

/// Whether the word is about a start that the row does not know of.
pub fn is_ahead(row: &InstanceRow, word: &Observation) -> bool {
    row.step != Step::Gone && word.incarnation > row.incarnation
}

/// Makes the newer start the row's own. `claim` is what it holds of its host.
pub fn adopt(draft: &mut Draft, word: &Observation, claim: Claim, view: &View) {
    let row = &draft.record.row;
    let ago = |age: u64| Micros(view.now.0.saturating_sub(i64::try_from(age).unwrap_or(i64::MAX)));
    let began = word.run_began_age_us.map(ago);
    let earliest = began.unwrap_or_else(|| ago(word.age_us));
    let open = row.open_since;
    // A proof that lies in the newer run proves nothing of the older one.
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
        // It shall go all the same, and is billed up to where that was asked for.
        row.bill_until = Some(row.step_since);
        if let Some(began) = began {
            draft.open(began.max(view.sealed));
        }
    }
}
