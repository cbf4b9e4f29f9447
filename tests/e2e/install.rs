//! `scripts/install` and `scripts/uninstall` on a host with systemd and a KVM that boots guests: a virtual host of
//! the test's own, which is a bare host to the scripts.
#![allow(clippy::unwrap_used, missing_docs)]

use roost_e2e::{OwnHost, Rig};
use std::time::Duration;

/// Everything that could be left of an installation, as text: files (without what changes by itself, and without the
/// folder of network namespaces, which is the system's), users, units, firewall, links, namespaces, cgroups, processes.
const EVERYTHING: &str = r"
find / -xdev \( -path /proc -o -path /sys -o -path /dev -o -path /tmp -o -path /var/log -o -path /var/cache \
    -o -path /opt/roost -o -path /run/log -o -path /run/systemd/units -o -path /run/systemd/transient \) -prune -o -print
find /run /var/lib \( -path /run/log -o -path /run/systemd/units -o -path /run/systemd/inhibit \
    -o -path /run/systemd/transient -o -path /run/netns \) -prune -o -print
getent passwd
getent group
systemctl list-unit-files --no-legend --no-pager | awk '{print $1}'
nft list ruleset
ip -o link | awk '{print $2}'
ip netns list
find /sys/fs/cgroup -type d
ps -eo comm | grep roost
true";

fn everything(host: &OwnHost) -> Vec<String> {
    let mut lines: Vec<String> = host.ssh(EVERYTHING).ok().lines().map(str::to_owned).collect();
    lines.sort();
    lines.dedup();
    lines
}

#[test]
fn installed_on_a_bare_host_used_without_root_updated_and_taken_away_again() {
    let rig = Rig::get();
    let tiny = format!("{}=images/tiny", rig.images["tiny-fast"].display());
    let host = OwnHost::up(&rig, "install", &["--memory-mib", "3072", "--share", &tiny]);
    // A checkout with programs that were built elsewhere. The data disk of a virtual host is no part of a bare host.
    host.ssh(
        "set -e
         umount -l /var/lib/roost && mount -t tmpfs -o size=6g tmpfs /var/lib/roost
         useradd --create-home --shell /bin/sh ann
         mkdir -p /root/checkout/target/x86_64-unknown-linux-gnu
         ln -s /opt/roost/scripts /root/checkout/scripts
         ln -s /opt/roost/bin /root/checkout/target/x86_64-unknown-linux-gnu/release",
    )
    .ok();
    let before = everything(&host);

    // As `sudo scripts/install` by ann.
    let install =
        "ROOST_NO_BUILD=1 SUDO_USER=ann /root/checkout/scripts/install --yes --image /opt/roost/images/tiny";
    // Another user of the machine, who reads every readable file all the time.
    host.ssh(
        "setsid setpriv --reuid=nobody --regid=nogroup --clear-groups sh -c '
            while :; do cat /tmp/*/admin.json /tmp/*/*/admin.json; sleep 0.2; done' > /tmp/seen 2>/tmp/refused < /dev/null &
         echo $! > /tmp/spy",
    )
    .ok();
    let said = host.ssh(install);
    assert_eq!(said.code, Some(0), "{said:?}");
    host.ssh("kill $(cat /tmp/spy)").ok();
    let seen = host.ssh("cat /tmp/seen; grep -c . /tmp/refused > /dev/null").ok();
    assert_eq!(seen, "", "the administrator's key is for ann alone");
    let exposure = host.ssh(
        "systemd-analyze security --no-pager --threshold=20 roost-controller | tail -n 1
         systemd-analyze security --no-pager --threshold=20 roost-controller > /dev/null &&
         systemd-analyze security --no-pager --threshold=70 roost-agent > /dev/null",
    );
    assert_eq!(exposure.code, Some(0), "{exposure:?}");
    let ann = |words: &str| host.ssh(&format!("runuser -u ann -- sh -c 'cd; roost {words}'"));
    ann("key create me").ok();
    let launched = ann("launch --type home1.nano --image tiny --key me --name first --wait --output json");
    assert_eq!(launched.code, Some(0), "{launched:?}");
    let first = ann("describe first --output json").json()["instances"][0].clone();
    assert_eq!(first["state"], "running");
    let id = first["instance_id"].as_str().unwrap().to_owned();
    let monitor =
        || host.ssh(&format!("cat $(find /sys/fs/cgroup -type d -name {id})/cgroup.procs | head -n 1")).ok();
    let pid = monitor();
    let scores =
        "cat /proc/$(systemctl show -p MainPID --value roost-agent)/oom_score_adj /proc/$pid/oom_score_adj";
    let scores = host.ssh(&format!("pid={}; {scores}", pid.trim())).ok();
    assert_eq!(scores.lines().collect::<Vec<_>>(), ["-500", "0"], "the kernel ends a guest before the agent");
    let complete = host.ssh("man -w roost || ls /usr/local/share/man/man1/roost.1; systemctl is-enabled roost-agent roost-controller");
    assert_eq!(complete.code, Some(0), "{complete:?}");

    // Again, as after an update: both programs are new processes, the instance never notices.
    let programs = || host.ssh("systemctl show -p MainPID --value roost-agent roost-controller").ok();
    let processes = programs();
    let said = host.ssh(install);
    assert_eq!(said.code, Some(0), "{said:?}");
    assert_ne!(programs(), processes, "the programs were started anew");
    assert_eq!(monitor(), pid, "the guest goes on");
    let seen = roost_e2e::wait_for("the instance to be adopted", Duration::from_secs(30), || {
        let seen = ann("describe first --output json").json()["instances"][0].clone();
        if seen["state"] == "running" { Ok(seen) } else { Err(seen.to_string()) }
    });
    assert_eq!(seen["incarnation"], 1, "{seen}");
    ann("stop first --wait --timeout 2m").ok();
    ann("start first --wait").ok();

    // Gone, with a running instance.
    let said = host.ssh("/root/checkout/scripts/uninstall --yes");
    assert_eq!(said.code, Some(0), "{said:?}");
    // The doctor asks the system whether its clock is synchronised; the system ends that service itself when idle.
    host.ssh("systemctl stop systemd-timedated").ok();
    let after = everything(&host);
    let left: Vec<&String> = after
        .iter()
        .filter(|line| before.binary_search(line).is_err())
        // Ann's own: her access key is of no use any more, but it is hers.
        .filter(|line| !line.starts_with("/home/ann/.config"))
        .collect();
    assert!(left.is_empty(), "left behind: {left:#?}\nuninstall said: {}", said.stderr);
}

#[test]
fn what_cannot_be_installed_is_refused_before_anything_is_changed() {
    let rig = Rig::get();
    let scripts = rig.checkout.join("scripts");
    for (script, words) in [
        ("demo", "--fast"),
        ("test", "--quick"),
        ("install", "--imaeg debian-12"),
        ("install", "--image"),
        ("uninstall", "--all"),
        ("setup", "--everything"),
        ("virtual-host", "--nmae x up"),
        ("lib/stack", "begin"),
        ("../guest-images/build", "--krenel fast"),
    ] {
        let command = format!("{}/{script} {words}", scripts.display());
        let output = std::process::Command::new("sh").args(["-c", &command]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{command}: {said}");
        assert!(!said.is_empty(), "{command} says why");
    }
}
