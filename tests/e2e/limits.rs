//! What an instance type promises is what the instance gets, and what one guest does hurts only itself.
#![allow(clippy::unwrap_used, clippy::cast_precision_loss, missing_docs)]

use roost_e2e::{Rig, TempFile, Tenant};
use std::time::Duration;

const SOON: Duration = Duration::from_secs(90);
/// Works for ever and counts what it has done on the console.
const BURN: &str = "#!/bin/sh
echo burning
i=0
while :; do
  j=0
  while [ $j -lt 10000 ]; do j=$((j+1)); done
  i=$((i+1)); echo \"work $i\"
done
";

/// CPU time of an instance's vCPUs and the host's clock, both in microseconds, read together on the host.
fn cpu(rig: &Rig, id: &str) -> (f64, f64) {
    let text = rig
        .host(&format!(
            "d=$(find /sys/fs/cgroup -type d -name {id}); grep -h usage_usec $d/vcpu/cpu.stat; cut -d' ' -f1 /proc/uptime"
        ))
        .ok();
    let mut lines = text.lines();
    let usage: f64 = lines.next().unwrap().split_whitespace().nth(1).unwrap().parse().unwrap();
    let uptime: f64 = lines.next().unwrap().parse().unwrap();
    (usage, uptime * 1e6)
}

fn work_done(tenant: &Tenant<'_>, id: &str) -> f64 {
    let console = tenant.roost(&["console", id]).ok();
    let last = console.lines().rev().find_map(|line| line.trim().strip_prefix("work ")?.parse::<f64>().ok());
    last.unwrap_or(0.0)
}

/// Share of one CPU that each instance got over `time`, and how much it worked per second of it.
fn measure(tenant: &Tenant<'_>, ids: &[&str], time: Duration) -> Vec<(f64, f64)> {
    let before: Vec<_> = ids.iter().map(|id| (cpu(tenant.rig, id), work_done(tenant, id))).collect();
    std::thread::sleep(time);
    ids.iter()
        .zip(before)
        .map(|(id, ((usage, clock), work))| {
            let (usage_now, clock_now) = cpu(tenant.rig, id);
            let work_now = work_done(tenant, id);
            ((usage_now - usage) / (clock_now - clock), (work_now - work) / ((clock_now - clock) / 1e6))
        })
        .collect()
}

#[test]
fn limited_instances_get_their_share_of_a_core_within_five_percent() {
    let rig = Rig::get();
    let tenant = rig.tenant("shares");
    let burn = TempFile::new("burn.sh", BURN);
    let more = ["--user-data", burn.path()];
    let half = tenant.launch("tiny-fast", "home1.nano", &more);
    let quarter = tenant.launch("tiny-fast", "home1.pico", &more);
    for id in [&half, &quarter] {
        tenant.wait_console(id, "work 1", SOON);
    }
    let limited = measure(&tenant, &[&half, &quarter], Duration::from_secs(32));
    tenant.roost(&["stop", "--force", "--wait", &half, &quarter]).ok();

    let whole = tenant.launch("tiny-fast", "home1.micro", &more);
    tenant.wait_console(&whole, "work 1", SOON);
    let unlimited = measure(&tenant, &[&whole], Duration::from_secs(10));

    println!(
        "{:<12} {:>8} {:>10} {:>14} {:>22}",
        "type", "promised", "cpu.stat", "work/s", "work against a whole CPU"
    );
    for (name, promised, (share, work)) in [
        ("home1.nano", 0.5, limited[0]),
        ("home1.pico", 0.25, limited[1]),
        ("home1.micro", 1.0, unlimited[0]),
    ] {
        println!("{name:<12} {promised:>8.2} {share:>10.3} {work:>14.1} {:>22.3}", work / unlimited[0].1);
    }
    for (name, promised, (share, _)) in [("home1.nano", 0.5, limited[0]), ("home1.pico", 0.25, limited[1])] {
        assert!(
            (share / promised - 1.0).abs() <= 0.05,
            "{name} got {share:.3} of a core, promised {promised}"
        );
    }
    for id in [half, quarter, whole] {
        tenant.terminate_clean(&id);
    }
}

#[test]
fn a_guest_that_uses_all_its_memory_hurts_only_itself() {
    let rig = Rig::get();
    let tenant = rig.tenant("memory");
    let hog = TempFile::new("hog.sh", "#!/bin/sh\necho hogging\ntail /dev/zero\necho \"hog ended\"\n");
    let neighbour = tenant.launch("tiny-fast", "home1.nano", &["--wait"]);
    tenant.wait_console(&neighbour, "roost-guest: ready", SOON);
    let before = rig.host("grep ^oom_kill /proc/vmstat").ok();

    let hungry = tenant.launch("tiny-fast", "home1.micro", &["--user-data", hog.path()]);
    // The guest's own kernel ends the hog: the limit around the monitor leaves room for all the guest's memory.
    tenant.wait_console(&hungry, "hog ended", Duration::from_secs(120));
    assert_eq!(rig.host("grep ^oom_kill /proc/vmstat").ok(), before, "the host killed nobody");
    let events = rig.host(&format!("cat $(find /sys/fs/cgroup -type d -name {hungry})/memory.events")).ok();
    assert!(events.contains("oom_kill 0"), "{events}");
    for id in [&neighbour, &hungry] {
        assert_eq!(tenant.describe(id)["state"], "running");
    }
    for id in [neighbour, hungry] {
        tenant.terminate_clean(&id);
    }
}
