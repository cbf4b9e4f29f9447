//! What a guest is told: the metadata service in both versions, user data, keys, tags, and the generation of its machine.
#![allow(clippy::unwrap_used, missing_docs)]

use roost_e2e::{Rig, TempFile, user_data};
use std::time::Duration;

const SOON: Duration = Duration::from_secs(90);

/// Asks, and says on the console what it was told. busybox wget cannot send PUT, so HTTP is spoken by hand; the pipe
/// stays open behind the request, because a server may take its end for ours.
const ASK: &str = "#!/bin/sh
echo x >> /var/runs
base=http://169.254.169.254/latest
get() { wget -qO- \"$@\" 2>&1; }
put() {
  [ -p /run/ask ] || mkfifo /run/ask
  exec 3<> /run/ask
  printf 'PUT %s HTTP/1.0\\r\\nHost: 169.254.169.254\\r\\nConnection: close\\r\\nContent-Length: 0\\r\\n%b\\r\\n\\r\\n' \"$@\" >&3
  timeout 5 nc -w 5 169.254.169.254 80 <&3
  exec 3>&-
}
echo \"told v1 $(get $base/meta-data/instance-id)\"
echo \"told role $(get $base/meta-data/tags/instance/role)\"
echo \"told tags $(get $base/meta-data/tags/instance/ | sort | tr '\\n' ' ')\"
echo \"told key $(get $base/meta-data/public-keys/0/openssh-key)\"
token=$(put /latest/api/token 'X-aws-ec2-metadata-token-ttl-seconds: 60' | sed '1,/^\\r*$/d')
echo \"told v2 $(get --header \"X-aws-ec2-metadata-token: $token\" $base/meta-data/instance-id)\"
echo \"told forged $(get --header \"X-aws-ec2-metadata-token: ${token}0\" $base/meta-data/instance-id)\"
echo \"told proxied $(put /latest/api/token 'X-aws-ec2-metadata-token-ttl-seconds: 60\\r\\nX-Forwarded-For: 1.2.3.4' | head -n 1)\"
echo \"told generation $(ls -d /sys/bus/acpi/drivers/vmgenid/*:*)\"
echo \"told runs $(wc -l < /var/runs)\"
";

#[test]
fn a_guest_is_told_who_it_is_once_and_by_both_versions_of_the_metadata_service() {
    let rig = Rig::get();
    let tenant = rig.tenant("metadata");
    let script = TempFile::new("ask.sh", ASK);
    // A key of the user's own; only its public half is ever shown to us.
    let public = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGF/YyaD1542YsBqD8R+iKZP21EE66RHp/wOiGV+q5UD me@home";
    let key = TempFile::new("imported.pub", &format!("{public}\n"));
    tenant.roost(&["key", "import", "mine", key.path()]).ok();
    let id = tenant.launch(
        "tiny-fast",
        "home1.micro",
        &["--user-data", script.path(), "--key", "mine", "--tag", "role=web", "--tag", "tier=a b"],
    );
    let console = tenant.wait_console(&id, "told runs", SOON);
    let told = |what: &str| {
        // The shell's prompt may stand before it.
        let told = format!("told {what} ");
        let lines: Vec<&str> =
            console.lines().filter_map(|line| Some(line.split_once(told.as_str())?.1)).collect();
        assert_eq!(lines.len(), 1, "{what} once in:\n{console}");
        lines[0].trim().to_owned()
    };
    assert_eq!(told("v1"), id);
    assert_eq!(told("v2"), id);
    assert!(told("forged").contains("401"), "{console}");
    assert!(told("proxied").contains("403"), "{console}");
    assert_eq!(told("role"), "web");
    assert_eq!(told("tags"), "role tier");
    // The comment may be ours to choose, the key is not.
    assert_eq!(told("key").split(' ').nth(1), public.split(' ').nth(1));
    // The guest's driver has found the counter that tells it of copies.
    assert!(told("generation").ends_with(":00"), "{console}");
    assert_eq!(told("runs"), "1");

    // User data belongs to the instance, not to a boot of it.
    tenant.roost(&["stop", &id, "--wait"]).ok();
    tenant.roost(&["start", &id, "--wait"]).ok();
    let ready = |console: &str| console.matches("roost-guest: ready").count() == 2;
    let console = roost_e2e::wait_for("the second boot", SOON, || {
        let console = tenant.roost(&["console", &id]).stdout;
        if ready(&console) { Ok(console) } else { Err(roost_e2e::tail(&console)) }
    });
    assert_eq!(console.matches("running user data").count(), 1, "{console}");
    tenant.terminate_clean(&id);
}

#[test]
fn a_tiny_guest_runs_a_packed_script_and_says_what_it_does_not_run() {
    let rig = Rig::get();
    let tenant = rig.tenant("forms");
    let script = TempFile::new("tells.gz", &user_data::dos_gzip(&user_data::tells("/run/told")));
    let config = TempFile::new("config.yaml", "#cloud-config\npackages: [nginx]\n");
    let bash = TempFile::new("bash.sh", "#!/bin/bash\necho hello\n");
    let launch = |file: &TempFile| tenant.launch("tiny-fast", "home1.nano", &["--user-data", file.path()]);
    let (runs, cloud, no_bash) = (launch(&script), launch(&config), launch(&bash));

    let console = tenant.wait_console(&runs, "told input", SOON).replace('\r', "");
    let told: Vec<&str> = user_data::TOLD.lines().filter(|line| !line.contains("boot")).collect();
    assert!(console.contains(&told.join("\n")), "{console}");
    assert!(tenant.describe(&runs)["user_data_not_run"].is_null());

    for (id, form) in [(&cloud, "cloud-config"), (&no_bash, "no-interpreter")] {
        tenant.wait_console(id, &format!("roost-guest: user data not run: {form}"), SOON);
        roost_e2e::wait_for("the agent to say so", SOON, || {
            let seen = tenant.describe(id);
            if seen["user_data_not_run"] == form { Ok(()) } else { Err(seen.to_string()) }
        });
    }
    let shown = tenant.roost(&["describe", &cloud]).ok();
    assert!(shown.contains("not run: cloud-config needs an image with cloud-init"), "{shown}");
    for id in [runs, cloud, no_bash] {
        tenant.terminate_clean(&id);
    }
}
