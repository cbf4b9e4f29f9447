//! The kill matrix with real guests: agent, controller and monitor are killed (SIGKILL) at each point of launch, run,
//! stop, resize, start, reboot and terminate. After each: the step resumes, the instance gets to where it should or
//! stops with the reason, nothing leaks, and the bill is what the agent saw.
//!
//! `scripts/test --full` strikes every point, an ordinary run the chosen ones (`points.rs`); `ROOST_KILL_AT="reboot
//! agent.power.after"` only those whose operation and name contain that. The same with simulated
//! hosts and at every second: `crates/controller/tests/kill_matrix.rs`.
#![allow(clippy::unwrap_used, missing_docs)]

mod books;
mod life;
mod points;

use life::Life;
use points::{LIFE, Operation, Victim, points};
use roost_e2e::Rig;
use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Strikes all points of a victim: as many lives as it takes, each with at most one kill per operation.
fn strike_all(victim: Victim) {
    let rig = Rig::get();
    let tenant = rig.tenant(&format!("killed-{victim}").replace('+', "-"));
    let only = std::env::var("ROOST_KILL_AT").ok();
    let mut left: Vec<(Operation, VecDeque<String>)> = LIFE
        .iter()
        .map(|operation| {
            let wanted = points(victim, *operation).into_iter().filter(|(name, chosen)| match &only {
                Some(only) => format!("{operation} {name}").contains(only),
                None => rig.full || *chosen,
            });
            (*operation, wanted.map(|(name, _)| name).collect())
        })
        .collect();
    let all: usize = LIFE.iter().map(|operation| points(victim, *operation).len()).sum();
    let strikes: usize = left.iter().map(|(_, points)| points.len()).sum();
    println!(
        "{victim}: {strikes} of {all} points{}",
        if rig.full { "" } else { " (all with scripts/test --full)" }
    );
    let mut table = File::options().append(true).create(true).open(&rig.points).unwrap();
    let mut failures = Vec::new();
    while left.iter().any(|(_, points)| !points.is_empty()) {
        let turn: Vec<(Operation, Option<String>)> =
            left.iter_mut().map(|(operation, points)| (*operation, points.pop_front())).collect();
        let mut life = Life::new(&rig, &tenant, victim);
        let mut at = String::new();
        let lived = catch_unwind(AssertUnwindSafe(|| {
            for (operation, point) in &turn {
                // Both ends are in every life; what lies between only where there is a point to strike.
                if point.is_some() || matches!(operation, Operation::Launch | Operation::Terminate) {
                    at = format!("{operation} {}", point.as_deref().unwrap_or("without a kill"));
                    life.go(*operation, point.as_deref());
                }
            }
            at = "the bill".to_owned();
            life.bill()
        }));
        for row in &life.rows {
            let bill = lived.as_deref().unwrap_or("not compared");
            let seconds = row.took.as_secs_f32();
            let line = format!(
                "{}\t{}\t{}\t{}\t{seconds:.1}\t{bill}",
                row.victim, row.operation, row.point, row.outcome
            );
            println!("{line}");
            writeln!(table, "{line}").unwrap();
        }
        if let Err(panic) = lived {
            let why = panic.downcast_ref::<String>().map_or("a panic", String::as_str);
            writeln!(table, "{victim}\t{at}\t\tFAILED\t\t").unwrap();
            life.give_up();
            failures.push(format!("{victim}, {at}: {why}"));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
}

#[test]
fn an_agent_killed_at_any_point_is_a_pause() {
    strike_all(Victim::Agent);
}

#[test]
fn a_controller_killed_at_any_point_is_a_pause() {
    strike_all(Victim::Controller);
}

#[test]
fn a_monitor_killed_at_any_point_is_started_again_or_ends_the_run_with_the_reason() {
    strike_all(Victim::Monitor);
}

#[test]
fn a_monitor_killed_unseen_is_billed_to_the_last_report() {
    strike_all(Victim::AgentAndMonitor);
}
