//! What a Linux guest costs, measured in a virtual host, where there is one on any machine. QEMU's microvm runs beside ours.
//! `scripts/bench --counted` and `--idle` put it together and run it.
//!
//! The same static program is three: the init of the guest ([`guest`]), the init of the virtual host, where it measures
//! ([`host`], [`boots`], [`idle`]), and outside it makes a table of what the virtual host printed.

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
mod monitors;

use report::{Goal, Report, Sample, Who};
use serde_json::Value;

fn main() {
    if std::process::id() == 1 {
        // The kernel gives a word NAME=VALUE of its command line that it does not know to init's environment.
        match std::env::var("bench").as_deref() {
            Ok("guest") => guest::run(),
            Ok(what) => host::run(what),
            Err(_) => host::run(""),
        }
    }
    let mut arguments = std::env::args().skip(1).filter(|word| word != "--bench");
    let (Some(log), Some(output)) = (arguments.next(), arguments.next()) else {
        // `cargo bench` without a filter comes here.
        println!("this measures in a virtual host: scripts/bench --counted, scripts/bench --idle");
        return;
    };
    let report = report_of(&std::fs::read_to_string(log).unwrap());
    match output.as_str() {
        "json" => println!("{}", report.json()),
        _ => print!("{report}"),
    }
}

/// Puts the figures of the virtual host's console together.
fn report_of(console: &str) -> Report {
    let lines = || console.lines().filter_map(|line| line.split_once("FIGURE ")).map(|(_, text)| text);
    let figures: Vec<Value> = lines().filter_map(|text| serde_json::from_str(text).ok()).collect();
    let about = figures.iter().filter_map(|figure| {
        let name = ["virtual host", "kernel", "QEMU", "mode", "exits of Roost", "exits of QEMU"]
            .into_iter()
            .find(|name| figure["about"] == *name)?;
        Some((name, figure["text"].as_str()?.to_owned()))
    });
    let mut report = Report::new(about.collect());
    for (what, unit, goal) in rows() {
        let mut sample = Sample::default();
        for figure in figures.iter().filter(|figure| figure["what"] == what) {
            let who = if figure["who"] == "roost" { Who::Roost } else { Who::Qemu };
            sample.add(who, figure["value"].as_f64().unwrap_or(f64::NAN));
        }
        if sample.any() {
            report.compare(what, unit, &sample, goal);
        }
    }
    report
}

/// Every row that there can be, and what it should be.
fn rows() -> Vec<(&'static str, &'static str, Goal)> {
    let ratio = |most| Goal::default().and_ratio(most);
    vec![
        (boots::LINE, "ms", ratio(0.5)),
        (boots::FIRST_RUN, "ms", ratio(0.25)),
        (boots::EXITS, "", Goal::default()),
        (idle::CPU, "ms per s", ratio(1.0)),
        (idle::EXITS, "per s", Goal::default()),
    ]
}
