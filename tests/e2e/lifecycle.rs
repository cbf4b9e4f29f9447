//! One instance over its whole life, as its owner sees it, with the bill beside it.
#![allow(clippy::unwrap_used, missing_docs)]

use roost_e2e::Rig;
use serde_json::Value;
use std::time::Duration;

const SOON: Duration = Duration::from_secs(90);

fn seconds(instance: &Value, field: &str) -> u64 {
    instance[field].as_u64().unwrap_or_else(|| panic!("{field} in {instance}"))
}

#[test]
fn an_instance_is_launched_stopped_resized_started_terminated_and_billed_to_the_second() {
    let rig = Rig::get();
    let tenant = rig.tenant("life");

    let id = tenant.launch("tiny-fast", "home1.micro", &["--name", "one", "--wait"]);
    assert_eq!(tenant.describe(&id)["state"], "running");
    let console = tenant.wait_console(&id, "roost-guest: ready", SOON);
    assert!(console.contains("cpus=1"), "{console}");

    // The CPU and memory limits stand in the kernel, not only in the database.
    let limits = rig.host(&format!("cat $(find /sys/fs/cgroup -type d -name {id})/{{memory.max,memory.swap.max,memory.oom.group,vcpu/cpu.max}}")).ok();
    let limits: Vec<&str> = limits.lines().collect();
    assert!(limits[0].parse::<u64>().unwrap() >= 256 << 20, "{limits:?}");
    assert_eq!(&limits[1..3], ["0", "1"]);
    let (quota, period) = limits[3].split_once(' ').unwrap();
    assert_eq!(quota, period, "home1.micro has one whole CPU");

    // Stopping ends the bill and frees the host; the minimum of 60 s is billed.
    tenant.roost(&["stop", &id, "--wait"]).ok();
    let stopped = tenant.describe(&id);
    assert_eq!(stopped["state"], "stopped");
    let (used, billed) = (seconds(&stopped, "used_seconds"), seconds(&stopped, "billed_seconds"));
    assert!(used > 0);
    assert_eq!(billed, used.max(60));
    let gone =
        rig.host(&format!("find /sys/fs/cgroup -type d -name {id}; ip netns list | grep {id} || true")).ok();
    assert_eq!(gone, "", "a stopped instance holds nothing but its disk");

    // It grows while it is stopped, and not before.
    tenant.roost(&["resize", &id, "--type", "home1.medium"]).ok();
    tenant.roost(&["start", &id, "--wait"]).ok();
    let console = tenant.wait_console(&id, "cpus=2", SOON);
    let memory: u64 =
        console.rsplit_once("memory_kib=").unwrap().1.split_whitespace().next().unwrap().parse().unwrap();
    assert!((850 * 1024..1024 * 1024).contains(&memory), "the guest has {memory} KiB of 1 GiB");

    // The second start has a minimum of its own, and a reboot has none.
    tenant.roost(&["reboot", &id]).ok();
    let rebooted = tenant.wait_state(&id, "running", SOON);
    assert_eq!(rebooted["incarnation"], 2, "a reboot is no new start");

    tenant.terminate_clean(&id);
    let ended = tenant.describe(&id);
    let (used_all, billed_all) = (seconds(&ended, "used_seconds"), seconds(&ended, "billed_seconds"));
    assert!(used_all > used);
    assert_eq!(billed_all, billed + (used_all - used).max(60), "60 s minimum per start, once each");

    // The bill says the same, however it is grouped, and says it again.
    let by_type = tenant.roost(&["bill", "--by", "type", "--output", "json"]).json();
    let line = |bill: &Value, field: &str, value: &str| -> Value {
        let lines = bill["lines"].as_array().unwrap();
        lines
            .iter()
            .find(|line| line[field] == value)
            .unwrap_or_else(|| panic!("no {value} in {bill}"))
            .clone()
    };
    assert_eq!(line(&by_type, "sku", "home1.micro")["used"], used.to_string());
    assert_eq!(line(&by_type, "sku", "home1.micro")["billed"], billed.to_string());
    assert_eq!(line(&by_type, "sku", "home1.medium")["billed"], (billed_all - billed).to_string());
    let bill = tenant.bill();
    assert_eq!(line(&bill, "group", &id)["used"], used_all.to_string());
    assert_eq!(line(&bill, "group", &id)["billed"], billed_all.to_string());
    assert_eq!(tenant.bill()["lines"], bill["lines"], "a bill recomputed is the same");
}

#[test]
fn a_guest_that_powers_itself_off_is_stopped_and_says_so() {
    let rig = Rig::get();
    let tenant = rig.tenant("poweroff");
    let script = roost_e2e::TempFile::new("poweroff.sh", "#!/bin/sh\npoweroff\n");
    let id = tenant.launch("tiny-fast", "home1.nano", &["--user-data", script.path()]);
    let stopped = tenant.wait_state(&id, "stopped", SOON);
    assert_eq!(stopped["state_reason"]["code"], "Client.InstanceInitiatedShutdown", "{stopped}");
    tenant.terminate_clean(&id);
}

#[test]
fn a_repeated_launch_with_one_client_token_launches_once() {
    let rig = Rig::get();
    let tenant = rig.tenant("token");
    let first = tenant.launch("tiny-fast", "home1.pico", &["--client-token", "once"]);
    let second = tenant.launch("tiny-fast", "home1.pico", &["--client-token", "once"]);
    assert_eq!(first, second);
    let other =
        tenant.roost(&["launch", "--image", "tiny-fast", "--type", "home1.nano", "--client-token", "once"]);
    assert_eq!(other.code, Some(6), "{other:?}");
    assert!(other.stderr.contains("IdempotentParameterMismatch"), "{}", other.stderr);
    tenant.terminate_clean(&first);
}

#[test]
fn a_launch_can_be_read_part_by_part() {
    let rig = Rig::get();
    let tenant = rig.tenant("timing");
    let id = tenant.launch("tiny-fast", "home1.micro", &["--wait"]);
    tenant.wait_console(&id, "roost-guest: ready", SOON);
    let timing = roost_e2e::wait_for("the guest's part of the timing", SOON, || {
        let timing = tenant.roost(&["describe", &id, "--timing", "--output", "json"]).json();
        let parts: Vec<String> = timing["parts"]
            .as_array()
            .unwrap()
            .iter()
            .map(|part| part["part"].as_str().unwrap().to_owned())
            .collect();
        if parts.iter().any(|part| part == "guest") { Ok(parts) } else { Err(timing.to_string()) }
    });
    for room in ["api", "store", "placement", "agent.", "monitor."] {
        assert!(timing.iter().any(|part| part.starts_with(room)), "{room} in {timing:?}");
    }
    tenant.terminate_clean(&id);
}
