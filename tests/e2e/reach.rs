//! Instances that are launched at once can all be reached, while udev runs beside the agent.
#![allow(clippy::unwrap_used, missing_docs)]

use roost_e2e::Rig;
use std::time::Duration;

#[test]
#[ignore = "slow: ten guests boot at once; scripts/test --full runs it"]
fn ten_instances_launched_at_once_can_all_be_reached() {
    let rig = Rig::get();
    let tenant = rig.tenant("ten");
    let launch =
        ["launch", "--output", "json", "--image", "tiny-fast", "--type", "home1.nano", "--count", "10"];
    let made = tenant.roost(&launch).json();
    let ids: Vec<&str> = made["instances"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| one["instance_id"].as_str().unwrap())
        .collect();
    assert_eq!(ids.len(), 10);
    for id in &ids {
        tenant.wait_console(id, "roost-guest: ready", Duration::from_secs(240));
        let public = tenant.describe(id)["public_ip"].as_str().unwrap().to_owned();
        // The default security group allows ICMP. A guest behind a link with another hardware
        // address receives nothing.
        rig.host(&format!("ping -c 1 -w 20 {public}")).ok();
    }
}
