//! What is new in an agent's word on an instance, dated by the controller's clock.
//!
//! The first report of an event converts its age to a time; later reports do not move it. The begin
//! of a run is dated by the controller's clock, between the incarnation's acceptance and now. Every
//! later event of the run is its begin plus a length that the host measured. A run is billed for
//! its length: neither a step of the controller's clock nor a restart under a wrong clock adds to
//! it.

use roost_store::{InstanceRow, Seen};
use roost_types::Micros;
use roost_types::agent::{Observation, Observed, TimedPart};
use roost_types::state::Step;

fn ago(now: Micros, age_us: u64) -> Micros {
    Micros(now.0.saturating_sub(i64::try_from(age_us).unwrap_or(i64::MAX)))
}

/// Returns the time `age_us` ago in a run that began at `began`, or `None` if the host does not
/// report the run's length.
fn in_run(began: Option<Micros>, word: &Observation, age_us: u64) -> Option<Micros> {
    let lasted = word.run_began_age_us?.saturating_sub(age_us);
    Some(Micros(began?.0.saturating_add(i64::try_from(lasted).unwrap_or(i64::MAX))))
}

/// Returns the time up to which the observation proves running virtual CPUs, and the age of that
/// proof. `stopping` proves nothing: the agent also reports it while clearing up a run that ended
/// unseen. A restarted agent may report `running` from memory before its first look. Then only its
/// durable record counts (`from_memory`). `row` already includes the observation.
pub fn proof_of_life(
    row: &InstanceRow,
    word: &Observation,
    now: Micros,
    from_memory: bool,
) -> Option<(Micros, Micros)> {
    let age = match (word.state, from_memory) {
        (Observed::Running, false) => 0,
        (Observed::Running, true) => word.last_seen_age_us?,
        _ => return None,
    };
    let own = row.observed.as_ref().filter(|seen| seen.incarnation == row.incarnation);
    let began = own.and_then(|seen| seen.run_began);
    let seen = in_run(began, word, age).unwrap_or_else(|| ago(now, age));
    Some((seen, Micros(i64::try_from(age).unwrap_or(i64::MAX))))
}

/// The row with the observation in it; `None` if it says nothing new.
pub fn observe(row: &InstanceRow, word: &Observation, boot_id: &str, now: Micros) -> Option<InstanceRow> {
    if row.step == Step::Gone {
        return None;
    }
    let own = word.incarnation == row.incarnation;
    let obeys = word.generation >= row.generation;
    let final_word = matches!(word.state, Observed::Stopped | Observed::Failed | Observed::Absent);
    // A word on an earlier incarnation counts only where it answers our newest generation.
    if !(own || obeys && final_word) {
        return None;
    }
    // Nothing but its end is of interest once it is at rest: a late word on its run would only confuse.
    if row.step == Step::Rest && !final_word {
        return None;
    }
    // An end that lies before this start was accepted is the end of the one before, sent with our new number.
    let over = !matches!(word.state, Observed::Preparing | Observed::Running);
    let starting = matches!(row.step, Step::Place | Step::Launch);
    if starting && over && ago(now, word.age_us) < row.incarnation_at {
        return None;
    }
    let old = row.observed.as_ref().filter(|seen| seen.incarnation == word.incarnation);
    let same_boot = old.is_none_or(|seen| seen.boot_id == boot_id);
    let earliest = row.incarnation_at;
    let latest = now.max(earliest);
    let date = |age: u64, not_before: Micros| ago(now, age).clamp(not_before.min(latest), latest);
    let run_began = old
        .and_then(|seen| seen.run_began)
        .or_else(|| word.run_began_age_us.filter(|_| own).map(|age| date(age, earliest)));
    let run_from = run_began.unwrap_or(earliest);
    let date_in_run =
        |age: u64| in_run(run_began, word, age).map_or_else(|| date(age, run_from), |at| at.max(run_from));
    let run_ended = old
        .and_then(|seen| seen.run_ended)
        .or_else(|| word.run_ended_age_us.filter(|_| own).map(date_in_run));
    let last_seen = old
        .and_then(|seen| seen.last_seen)
        .or_else(|| word.last_seen_age_us.filter(|_| own && over && same_boot).map(date_in_run));
    let since = old
        .filter(|seen| seen.state == word.state && same_boot)
        .map_or_else(|| date(word.age_us, earliest), |seen| seen.since);
    let guest_ready_at =
        old.and_then(|seen| seen.guest_ready_at).or_else(|| word.guest_ready.then_some(latest));
    let seen = Seen {
        state: word.state,
        generation: word.generation,
        incarnation: word.incarnation,
        boot_id: boot_id.to_owned(),
        since,
        run_began,
        run_ended,
        last_seen,
        reason: word.reason.clone(),
        refused: word.refused.clone(),
        trouble: word.trouble.clone(),
        guest_ready: word.guest_ready,
        guest_ready_at,
        ssh_host_key: word.ssh_host_key.clone().or_else(|| old.and_then(|seen| seen.ssh_host_key.clone())),
        user_data_not_run: word.user_data_not_run.or_else(|| old.and_then(|seen| seen.user_data_not_run)),
    };
    let mut next = row.clone();
    if own {
        // Until it is seen to run, a reboot of the host costs nothing but time: it just begins again.
        if row.boot_id.is_none() || (!over && row.open_since.is_none()) {
            next.boot_id = Some(boot_id.to_owned());
        }
        if !word.timing.is_empty() {
            next.timing.host.clone_from(&word.timing);
        }
        if next.timing.guest.is_none()
            && let (Some(ready), Some(began)) = (seen.guest_ready_at, seen.run_began)
        {
            let took_us = u64::try_from((ready - began).0).unwrap_or(0);
            next.timing.guest = Some(TimedPart { part: "guest".to_owned(), took_us });
        }
    }
    next.observed = Some(seen);
    (next != *row).then_some(next)
}

/// The word of a host that rebooted and has forgotten an instance that was running there.
pub fn forgotten(row: &InstanceRow) -> Observation {
    Observation::new(row.instance_id.clone(), row.generation, row.incarnation, Observed::Stopped)
}
