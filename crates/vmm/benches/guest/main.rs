//! What a Linux guest costs, measured in a virtual host, where there is one on any machine. QEMU's microvm runs beside ours.
//! `scripts/bench` puts it together and runs it.
//!
//! The same static program is three: the init of the virtual host, where it measures ([`host`], [`boots`],
//! [`snapshots`], [`restore`], [`idle`], [`throughput`]);
//! the init of a guest that works ([`load`]); and outside it makes a table of what the virtual host printed, one of what its CPU did
//! ([`profile`]), and the init of a guest that does nothing ([`guest`]).

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

#[path = "../../tests/common/mod.rs"]
mod common;
#[allow(dead_code, reason = "the native benchmark uses the rest")]
#[path = "../native/report.rs"]
mod report;

mod boots;
mod guest;
mod host;
mod idle;
mod link;
mod load;
mod monitors;
mod profile;
mod restore;
mod snapshots;
mod throughput;

use std::fs;

use report::{Goal, Report, Sample, Who};
use serde_json::Value;

fn main() {
    if std::process::id() == 1 {
        // The kernel gives a word NAME=VALUE of its command line that it does not know to init's environment.
        match std::env::var("bench").as_deref() {
            Ok("load") => load::run(),
            Ok(what) => host::run(what),
            Err(_) => host::run(""),
        }
    }
    let words: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["init", output] => fs::write(output, guest::program()).unwrap(),
        ["profile", format, first, second, more, map] => {
            if let Err(problem) = profile::print(format, [first, second], more.parse().unwrap(), map) {
                eprintln!("error: {problem}");
                std::process::exit(1);
            }
        }
        [log, format] => {
            let report = report_of(&fs::read_to_string(log).unwrap());
            match format {
                "json" => println!("{}", report.json()),
                _ => print!("{report}"),
            }
        }
        // `cargo bench` without a filter comes here.
        _ => println!("this measures in a virtual host: scripts/bench --help"),
    }
}

/// Puts the figures of the virtual host's console together.
fn report_of(console: &str) -> Report {
    let lines = || console.lines().filter_map(|line| line.split_once("FIGURE ")).map(|(_, text)| text);
    let figures: Vec<Value> = lines().filter_map(|text| serde_json::from_str(text).ok()).collect();
    let about = figures.iter().filter_map(|figure| {
        let costs = [throughput::COST_OF_ROOST, throughput::COST_OF_QEMU];
        let name = ["virtual host", "kernel", "QEMU", "mode", "exits of Roost", "exits of QEMU"]
            .into_iter()
            .chain(costs)
            .find(|name| figure["about"] == *name)?;
        Some((name, figure["text"].as_str()?.to_owned()))
    });
    let mut report = Report::new(about.collect());
    for (what, unit, goal) in rows() {
        let mut sample = Sample::default();
        for figure in figures.iter().filter(|figure| figure["what"] == *what) {
            let who = if figure["who"] == "roost" { Who::Roost } else { Who::Qemu };
            sample.add(who, figure["value"].as_f64().unwrap_or(f64::NAN));
        }
        if sample.any() {
            report.compare(&what, unit, &sample, goal);
        }
    }
    report
}

/// Every row that there can be, and what it should be.
fn rows() -> Vec<(String, &'static str, Goal)> {
    let ratio = |most| Goal::default().and_ratio(most);
    let fixed = [
        (boots::LINE, "ms", ratio(0.5)),
        (boots::FIRST_RUN, "ms", ratio(0.25)),
        (boots::EXITS, "", Goal::default()),
        (snapshots::CREATE, "ms", Goal::below(300.0)),
        (snapshots::LOAD, "ms", Goal::below(8.0)),
        (restore::COLD, "ms", Goal::default()),
        (idle::CPU, "ms per s", ratio(1.0)),
        (idle::EXITS, "per s", Goal::default()),
        (idle::SAME_CPU, "ms per s", Goal::default()),
        (idle::SAME_EXITS, "per s", Goal::default()),
    ];
    let clones = [restore::MAPPED, restore::MAPPED_LATER, restore::SERVED, restore::SERVED_LATER]
        .into_iter()
        .flat_map(|row| [(row.took, "ms", Goal::default()), (row.ratio, "", Goal::below(0.1))]);
    let through = throughput::rows();
    let through =
        through.into_iter().map(|(what, unit)| (what, unit, Goal::default().and_ratio_at_least(1.0)));
    fixed
        .into_iter()
        .chain(clones)
        .map(|(what, unit, goal)| (what.to_owned(), unit, goal))
        .chain(through)
        .collect()
}
