//! Each process is killed with a real guest running or on its way: the instance reaches what was asked for or a
//! stated end, nothing leaks, and the bill is what the agent saw. At exact points: `kill_matrix`.
#![allow(clippy::unwrap_used, missing_docs)]

use roost_e2e::{Rig, Tenant, wait_for};
use std::time::Duration;

const SOON: Duration = Duration::from_secs(90);
const AT_ONCE: Duration = Duration::from_secs(20);

fn monitor_pid(rig: &Rig, id: &str) -> String {
    rig.host(&format!("cat $(find /sys/fs/cgroup -type d -name {id})/cgroup.procs | head -n 1"))
        .stdout
        .trim()
        .to_owned()
}

fn kill(rig: &Rig, part: &str) {
    rig.host(&format!("systemctl kill --signal=KILL {}-{part}", rig.units)).ok();
}

fn running_guest(tenant: &Tenant<'_>) -> String {
    let id = tenant.launch("tiny-fast", "home1.micro", &["--wait"]);
    tenant.wait_console(&id, "roost-guest: ready", SOON);
    id
}

#[test]
fn a_killed_agent_leaves_guests_running_and_adopts_them_again() {
    let rig = Rig::get();
    let tenant = rig.tenant("agent-killed");
    let id = running_guest(&tenant);
    let before = (monitor_pid(&rig, &id), tenant.describe(&id));
    assert_ne!(before.0, "");

    kill(&rig, "agent");
    wait_for("the agent to report again", AT_ONCE, || {
        let hosts = rig.admin(&["hosts", "--output", "json"]).json();
        let active = rig.host(&format!("systemctl show -p NRestarts,ActiveState {}-agent", rig.units)).stdout;
        if hosts["hosts"][0]["alive"] == true && active.contains("ActiveState=active") {
            Ok(())
        } else {
            Err(active)
        }
    });
    assert_eq!(monitor_pid(&rig, &id), before.0, "the guest never noticed");
    // It is really held again: the agent can still stop it cleanly through the monitor.
    tenant.roost(&["stop", &id, "--wait"]).ok();
    let after = tenant.describe(&id);
    assert_eq!(after["state"], "stopped");
    assert_eq!(after["incarnation"], before.1["incarnation"]);
    assert!(
        tenant.roost(&["console", &id]).stdout.contains("ready"),
        "the console outlives agent and monitor"
    );
    tenant.terminate_clean(&id);
}

#[test]
fn a_killed_controller_goes_on_where_it_was() {
    let rig = Rig::get();
    let tenant = rig.tenant("controller-killed");
    let id = tenant.launch("tiny-fast", "home1.micro", &[]);
    kill(&rig, "controller");
    wait_for("the controller to answer again", AT_ONCE, || {
        let ran = rig.admin(&["hosts", "--output", "json"]);
        if ran.code == Some(0) { Ok(()) } else { Err(ran.stderr) }
    });
    let running = tenant.wait_state(&id, "running", AT_ONCE);
    assert_eq!(running["incarnation"], 1, "one launch, one start");
    assert_ne!(monitor_pid(&rig, &id), "");
    tenant.terminate_clean(&id);
    let bill = tenant.bill();
    let lines: Vec<_> =
        bill["lines"].as_array().unwrap().iter().filter(|line| line["meter"] == "instance-seconds").collect();
    assert_eq!(lines.len(), 1, "billed once: {bill}");
}

#[test]
fn a_killed_monitor_ends_in_stopped_with_the_reason_and_the_bill_ends_with_it() {
    let rig = Rig::get();
    let tenant = rig.tenant("monitor-killed");
    let id = running_guest(&tenant);
    rig.host(&format!("kill -9 {}", monitor_pid(&rig, &id))).ok();
    let stopped = tenant.wait_state(&id, "stopped", AT_ONCE);
    let code = stopped["state_reason"]["code"].as_str().unwrap_or_default();
    assert!(code.starts_with("Server."), "{stopped}");
    let used = stopped["used_seconds"].clone();
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(tenant.describe(&id)["used_seconds"], used, "a dead guest uses nothing");
    // It starts again from the same disk.
    tenant.roost(&["start", &id, "--wait"]).ok();
    assert_eq!(tenant.describe(&id)["incarnation"], 2);
    tenant.terminate_clean(&id);
}

#[test]
fn a_host_without_its_agent_is_billed_to_the_last_report_and_goes_on_when_it_is_back() {
    let rig = Rig::get();
    let tenant = rig.tenant("agent-away");
    let id = running_guest(&tenant);
    rig.host(&format!("systemctl stop {}-agent", rig.units)).ok();
    let first = tenant.describe(&id)["used_seconds"].as_u64().unwrap();
    std::thread::sleep(Duration::from_secs(8));
    let second = tenant.describe(&id)["used_seconds"].as_u64().unwrap();
    rig.host(&format!("systemctl start {}-agent", rig.units)).ok();
    assert!(second <= first + 1, "nobody saw it run: {first} then {second}");
    wait_for("the guest's time to count again", AT_ONCE, || {
        let now = tenant.describe(&id)["used_seconds"].as_u64().unwrap();
        if now >= second + 6 { Ok(()) } else { Err(now.to_string()) }
    });
    tenant.terminate_clean(&id);
}
