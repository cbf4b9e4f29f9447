//! Full disks: the controller's, where the database and the images are, and the agent's, where volumes are. Each is
//! said in one sentence, leaves nothing half made, and is over when there is room again.
#![allow(clippy::unwrap_used, missing_docs)]

use roost_e2e::{OwnHost, Ran, Rig, Tenant, wait_for};
use serde_json::Value;
use std::time::Duration;

const SOON: Duration = Duration::from_secs(90);

/// Leaves this much room in a folder's file system, and none with 0.
#[track_caller]
fn leave(host: &OwnHost, folder: &str, mib: u32) {
    // Programs ask for more than a few KiB at a time: full is when not even one more block can be had.
    let rest = "! head -c 1G /dev/zero >> $fill && sync && ! head -c 4096 /dev/zero > $fill.more";
    host.ssh(&format!(
        "fill={folder}/fill; free=$(df --output=avail --block-size=1M {folder} | tail -n 1)
         fallocate --length $((free - {}))M $fill && {}",
        mib.max(16),
        if mib == 0 { rest } else { "true" }
    ))
    .ok();
}

#[track_caller]
fn make_room(host: &OwnHost, folder: &str) {
    host.ssh(&format!("rm -f {folder}/fill {folder}/fill.more")).ok();
}

#[track_caller]
fn refused_as_full(ran: &Ran) {
    assert_eq!(ran.code, Some(8), "{ran:?}");
    assert!(ran.stderr.contains("Unavailable"), "{ran:?}");
    assert!(ran.stderr.contains("full") && ran.stderr.contains("disk"), "{ran:?}");
    assert_eq!(ran.stderr.trim().lines().count(), 1, "one sentence: {ran:?}");
    assert_eq!(ran.stdout, "", "{ran:?}");
}

#[track_caller]
fn instances(tenant: &Tenant<'_>) -> Vec<Value> {
    let listed = tenant.roost(&["ls", "--all", "--output", "json"]).json();
    listed["instances"].as_array().unwrap().clone()
}

#[test]
fn a_full_disk_is_said_and_over_when_there_is_room() {
    let rig = Rig::get();
    // The agent's disk is the host's data disk, the controller's a file system of its own.
    let host = OwnHost::up(&rig, "full", &["--memory-mib", "3072", "--data-gib", "8"]);
    let (database, volumes) = ("/var/lib/roost/stack/controller", "/var/lib/roost/stack/agent");
    host.ssh(&format!(
        "mkdir -p {database} {volumes}; mount -t tmpfs -o size=320m,mode=0700 tmpfs {database}"
    ))
    .ok();
    let (own, _config) = host.with_stack(&rig);
    let tiny = rig.images["tiny-fast"].to_str().unwrap().to_owned();

    // An upload: refused while there is still room for the database, and nothing of it stays.
    leave(&host, database, 100);
    let refused = own.admin(&["image", "import", &tiny, "--name", "tiny-fast"]);
    refused_as_full(&refused);
    assert_eq!(host.ssh(&format!("find {database}/blobs -type f")).ok(), "", "nothing half made");
    assert_eq!(own.admin(&["image", "ls", "--output", "json"]).json()["images"], Value::Array(vec![]));
    make_room(&host, database);
    own.admin(&["image", "import", &tiny, "--name", "tiny-fast"]).ok();

    // The database itself: what runs goes on, what is new is refused whole.
    let tenant = own.tenant("full");
    let runs = tenant.launch("tiny-fast", "home1.nano", &["--wait"]);
    leave(&host, database, 0);
    let refused = wait_for("a launch to find the disk full", SOON, || {
        let ran = tenant.roost(&["launch", "--image", "tiny-fast", "--type", "home1.pico"]);
        if ran.code == Some(0) { Err(ran.stdout) } else { Ok(ran) }
    });
    refused_as_full(&refused);
    let before = instances(&tenant);
    refused_as_full(&tenant.roost(&["stop", &runs]));
    assert_eq!(tenant.describe(&runs)["state"], "running");
    make_room(&host, database);
    assert_eq!(instances(&tenant).len(), before.len(), "nothing half made");
    tenant.roost(&["stop", &runs, "--force", "--wait"]).ok();
    tenant.roost(&["start", &runs, "--wait"]).ok();
    assert_eq!(tenant.describe(&runs)["incarnation"], 2);

    // The host reports its full disk, and takes no launch until there is room.
    leave(&host, volumes, 0);
    wait_for("the host to say that its disk is full", SOON, || {
        let seen = own.admin(&["hosts", "--output", "json"]).stdout;
        if seen.contains("are kept free (--reserve-disk-mib)") { Ok(()) } else { Err(seen) }
    });
    let refused = tenant.roost(&["launch", "--image", "tiny-fast", "--type", "home1.nano"]);
    assert!(refused.code != Some(0) && refused.stderr.contains("disk"), "{refused:?}");
    assert_eq!(tenant.describe(&runs)["state"], "running");
    make_room(&host, volumes);
    wait_for("a launch to find room", SOON, || {
        let ran = tenant.roost(&["launch", "--image", "tiny-fast", "--type", "home1.nano", "--wait"]);
        if ran.code == Some(0) { Ok(()) } else { Err(ran.stderr) }
    });
    for one in instances(&tenant) {
        tenant.terminate_clean(one["instance_id"].as_str().unwrap());
    }
    let fell = host.ssh("systemctl show --property NRestarts --value roost-controller roost-agent").ok();
    assert_eq!(fell.split_whitespace().collect::<Vec<_>>(), ["0", "0"], "neither fell over");
}
