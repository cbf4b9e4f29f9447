//! The host reboots, and its power is cut: what ran runs again as the next start, what was stopped stays so, and the
//! bill knows the difference (`docs/decisions/0004-starts-after-a-host-reboot.md`). In a virtual host of the test's
//! own, with the units that `scripts/install --in-virtual-host` makes.
#![allow(clippy::unwrap_used, missing_docs)]

use roost_e2e::{OwnHost, Rig, TempFile, wait_for};
use serde_json::Value;
use std::time::Duration;

const SOON: Duration = Duration::from_secs(120);
/// Reports come every 5 s, and every 10 s one is made durable.
const LAST_DURABLE_REPORT: i64 = 11_000_000;
/// A report's flight, on an emulated CPU.
const FLIGHT: i64 = 2_000_000;

struct Interval {
    open: i64,
    close: Option<i64>,
}

/// The instance's starts on the usage log.
fn intervals(own: &Rig, id: &str) -> Vec<Interval> {
    let export = format!(
        "setpriv --reuid=roost --regid=roost --clear-groups {}/roost-controller usage-log export --state-dir {}/controller",
        own.host_bin.display(),
        own.state.display()
    );
    let mut found: Vec<Interval> = Vec::new();
    for line in own.host(&export).ok().lines().filter(|line| line.contains(id)) {
        let event: Value = serde_json::from_str(line).unwrap();
        let number = usize::try_from(event["incarnation"].as_u64().unwrap()).unwrap();
        let at = event["at"].as_i64().unwrap();
        if event["kind"] == "open" {
            assert_eq!(found.len() + 1, number, "starts are billed in order and once: {line}");
            found.push(Interval { open: at, close: None });
        } else {
            assert_eq!(found[number - 1].close.replace(at), None, "closed twice: {line}");
        }
    }
    found
}

fn now(host: &OwnHost) -> i64 {
    host.ssh("date +%s%N").ok().trim().parse::<i64>().unwrap() / 1000
}

/// The port can be another one after the host came back.
fn find_again(host: &OwnHost, config: &TempFile) {
    let text = std::fs::read_to_string(&config.0).unwrap();
    let lines: Vec<String> = text
        .lines()
        .map(|line| match line.strip_prefix("endpoint") {
            Some(_) => format!("endpoint = {:?}", host.endpoint()),
            None => line.to_owned(),
        })
        .collect();
    std::fs::write(&config.0, lines.join("\n")).unwrap();
}

#[test]
fn a_host_that_reboots_or_loses_its_power_brings_its_instances_back_and_bills_only_what_ran() {
    let rig = Rig::get();
    let host = OwnHost::up(&rig, "reboot", &["--memory-mib", "3072"]);
    let (own, config) = host.with_stack(&rig);
    own.admin(&["image", "import", rig.images["tiny-fast"].to_str().unwrap(), "--name", "tiny-fast"]).ok();
    let tenant = own.tenant("reboot");
    let runs = tenant.launch("tiny-fast", "home1.nano", &["--name", "runs", "--wait"]);
    let rests = tenant.launch("tiny-fast", "home1.nano", &["--name", "rests", "--wait"]);
    tenant.wait_console(&runs, "roost-guest: ready", SOON);
    tenant.wait_console(&rests, "roost-guest: ready", SOON);
    tenant.roost(&["stop", &rests, "--wait"]).ok();
    let rested = tenant.describe(&rests);

    let mut outages = Vec::new();
    for (incarnation, power_cut) in [(2, false), (3, true)] {
        let began = now(&host);
        if power_cut {
            host.cut_power();
        } else {
            host.command(&["down"]).ok();
        }
        host.up_again();
        find_again(&host, &config);
        let back = wait_for("the instance to run again", SOON, || {
            let ran = tenant.roost(&["describe", &runs, "--output", "json"]);
            let seen: Value = serde_json::from_str(&ran.stdout).map_err(|_| ran.stderr.clone())?;
            let seen = seen["instances"][0].clone();
            let again = seen["state"] == "running" && seen["incarnation"] == incarnation;
            if again { Ok(seen) } else { Err(seen.to_string()) }
        });
        assert!(back["guest_ready"].is_boolean(), "{back}");
        tenant.wait_console(&runs, "roost-guest: ready", SOON);
        outages.push((began, power_cut));
        let still = tenant.describe(&rests);
        for field in ["state", "incarnation", "used_seconds", "billed_seconds"] {
            assert_eq!(still[field], rested[field], "{field} of the one that was stopped");
        }
    }

    let ended = now(&host);
    tenant.terminate_clean(&runs);
    let all = intervals(&own, &runs);
    assert_eq!(all.len(), 3, "one start, two starts anew");
    for (index, (outage, power_cut)) in outages.iter().enumerate() {
        let close = all[index].close.expect("it is over");
        // A clean end is told; of a power cut only the last durable report is known. Never is the outage billed.
        let earliest = if *power_cut { outage - LAST_DURABLE_REPORT } else { outage - FLIGHT };
        assert!(close >= earliest, "billed to {close}, the host went at {outage} (power cut: {power_cut})");
        let latest = if *power_cut { outage + FLIGHT } else { all[index + 1].open };
        assert!(close <= latest, "billed to {close}, the host went at {outage} (power cut: {power_cut})");
        assert!(all[index + 1].open > close, "nothing is billed twice");
    }
    assert!(all[2].close.unwrap() >= ended);
    // The owner asked for one start: its parts share one begun second and one minimum.
    let length: i64 = all.iter().map(|interval| interval.close.unwrap() - interval.open).sum();
    let used = (length + 999_999) / 1_000_000;
    let billed = used.max(60);
    let shown = tenant.describe(&runs);
    assert_eq!(
        (shown["used_seconds"].as_i64(), shown["billed_seconds"].as_i64()),
        (Some(used), Some(billed))
    );
    tenant.terminate_clean(&rests);
    assert_eq!(own.admin(&["hosts", "--output", "json"]).json()["hosts"][0]["instances"], 0);
}
