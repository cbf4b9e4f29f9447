//! Full disks: the controller's, where the database and the images are, and the agent's, where volumes are. Each is
//! said in one sentence, leaves nothing half made, and is over when there is room again.
#![allow(clippy::unwrap_used, missing_docs)]

use roost_e2e::{OwnHost, Ran, Rig, wait_for};
use serde_json::Value;
use std::time::Duration;

const SOON: Duration = Duration::from_secs(90);

/// Fills a folder's file system but for so many KiB.
fn fill(host: &OwnHost, folder: &str, leave_kib: u32) {
    let rest = if leave_kib == 0 { "head -c 64M /dev/zero >> $fill;" } else { "" };
    host.ssh(&format!(
        "fill={folder}/fill; free=$(df --output=avail -k {folder} | tail -n 1)
         fallocate -l $(((free - {leave_kib} - 1024) * 1024)) $fill; {rest} sync; true"
    ))
    .ok();
}

fn empty(host: &OwnHost, folder: &str) {
    host.ssh(&format!("rm {folder}/fill")).ok();
}

#[track_caller]
fn refused_as_full(ran: &Ran) {
    assert_eq!(ran.code, Some(8), "{ran:?}");
    assert!(ran.stderr.contains("full") && ran.stderr.contains("disk"), "{ran:?}");
    assert_eq!(ran.stdout, "", "{ran:?}");
}

#[test]
fn a_full_disk_is_said_and_over_when_there_is_room() {
    let rig = Rig::get();
    let host = OwnHost::up(&rig, "full", &["--memory-mib", "5120"]);
    let (database, volumes) = ("/var/lib/roost/stack/controller", "/var/lib/roost/stack/agent");
    host.ssh(&format!(
        "mkdir -p {database} {volumes}
         mount -t tmpfs -o size=320m,mode=0700 tmpfs {database} && mount -t tmpfs -o size=2200m,mode=0700 tmpfs {volumes}"
    ))
    .ok();
    let (own, _config) = host.with_stack(&rig);
    let tiny = rig.images["tiny-fast"].to_str().unwrap().to_owned();

    // An upload: refused while there is still room for the database, and nothing of it stays.
    fill(&host, database, 100 << 10);
    refused_as_full(&own.admin(&["image", "import", &tiny, "--name", "tiny-fast"]));
    assert_eq!(host.ssh(&format!("find {database}/blobs -type f")).ok(), "", "nothing half made");
    assert_eq!(own.admin(&["image", "ls", "--output", "json"]).json()["images"], Value::Array(vec![]));
    empty(&host, database);
    own.admin(&["image", "import", &tiny, "--name", "tiny-fast"]).ok();

    // The database itself: what runs goes on, what is new is refused whole.
    let tenant = own.tenant("full");
    let runs = tenant.launch("tiny-fast", "home1.nano", &["--wait"]);
    fill(&host, database, 0);
    let refused = wait_for("a launch to find the disk full", SOON, || {
        let ran = tenant.roost(&["launch", "--image", "tiny-fast", "--type", "home1.pico"]);
        if ran.code == Some(0) { Err(ran.stdout) } else { Ok(ran) }
    });
    refused_as_full(&refused);
    let before =
        tenant.roost(&["ls", "--all", "--output", "json"]).json()["instances"].as_array().unwrap().len();
    refused_as_full(&tenant.roost(&["stop", &runs]));
    assert_eq!(tenant.describe(&runs)["state"], "running");
    empty(&host, database);
    let after =
        tenant.roost(&["ls", "--all", "--output", "json"]).json()["instances"].as_array().unwrap().len();
    assert_eq!(after, before, "nothing half made");
    tenant.roost(&["stop", &runs, "--force", "--wait"]).ok();
    tenant.roost(&["start", &runs, "--wait"]).ok();
    assert_eq!(tenant.describe(&runs)["incarnation"], 2);

    // The host's disk: the launch is accepted, says what it waits for, and goes on by itself.
    fill(&host, volumes, 0);
    let waits = tenant.launch("tiny-fast", "home1.nano", &[]);
    wait_for("the launch to say that the disk is full", SOON, || {
        let seen = tenant.describe(&waits);
        let trouble = seen["trouble"].as_str().unwrap_or_default();
        if trouble.contains("No space left") { Ok(()) } else { Err(seen.to_string()) }
    });
    assert_eq!(tenant.describe(&waits)["used_seconds"], 0, "what does not run costs nothing");
    empty(&host, volumes);
    tenant.wait_state(&waits, "running", SOON);
    for id in tenant.roost(&["ls", "--output", "json"]).json()["instances"].as_array().unwrap() {
        tenant.terminate_clean(id["instance_id"].as_str().unwrap());
    }
}
