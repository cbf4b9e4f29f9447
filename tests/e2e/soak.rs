//! A host that is disturbed for ten minutes. Once a minute its firewall is reloaded, its clock is
//! stepped by an hour and back, and its name servers change. One tenant uses every resource that it
//! can get. Another tenant's guest stays reachable, gains no way to the host, and is billed for the
//! seconds that it ran.
#![allow(clippy::unwrap_used, missing_docs)]

use roost_e2e::{OwnHost, Rig, TempFile, Tenant, wait_for};
use std::time::Duration;

const SOON: Duration = Duration::from_secs(120);
/// Longest time without the tables or a route after a reload of the firewall, and until new name
/// servers are known.
const REPAIRED: Duration = Duration::from_secs(15);
/// Reports come every 5 s, and an emulated CPU is slow.
const REPORT_SECONDS: f64 = 8.0;

/// Serves a line on port 22, which is open by default, and tries the host's own ports once a
/// second. A tick proves that the attempts continue.
const GUARD: &str = "#!/bin/sh
( while :; do echo alive | nc -l -p 22 -w 2; done ) 2> /dev/null &
gateway=$(ip route | sed -n 's/^default via \\([0-9.]*\\).*/\\1/p')
n=0
while :; do
  for host in $gateway 169.254.100.1 HOST; do
    for port in 22 7443 7444; do
      [ -z \"$(nc -w 1 $host $port < /dev/null 2> /dev/null | head -c 1)\" ] || echo \"breach: $host port $port answers\"
    done
  done
  n=$((n+1)); [ $((n % 5)) != 0 ] || echo \"tick $n\"
done
";
/// Uses CPU, disk, network and console at full speed.
const NOISE: &str = "#!/bin/sh
( while :; do :; done ) &
( while :; do dd if=/dev/urandom of=/noise bs=64k count=16 2> /dev/null; sync; done ) &
( while :; do nc -w 1 198.51.100.1 9 < /dev/null; done ) 2> /dev/null &
while :; do wget -q -T 1 -O /dev/null http://169.254.169.254/latest/meta-data/; echo noise noise noise; done 2> /dev/null
";

fn uptime(host: &OwnHost) -> f64 {
    host.ssh("cut -d ' ' -f 1 /proc/uptime").ok().trim().parse().unwrap()
}

fn step_clock(host: &OwnHost, seconds: i64) {
    host.ssh(&format!("date -s @$(( $(date +%s) + {seconds} ))")).ok();
}

#[track_caller]
fn answers(host: &OwnHost, address: &str) {
    wait_for("the guest to answer on its public address", REPAIRED, || {
        let said = host.ssh(&format!("timeout 3 bash -c 'exec 3<> /dev/tcp/{address}/22; head -n 1 <&3'"));
        if said.stdout.trim() == "alive" { Ok(()) } else { Err(format!("{}{}", said.stdout, said.stderr)) }
    });
}

fn ticks(tenant: &Tenant<'_>, id: &str) -> u64 {
    let console = tenant.roost(&["console", id]).stdout;
    assert!(!console.contains("breach:"), "the guest reached the host:\n{console}");
    let ticks = console.lines().filter_map(|line| line.trim().strip_prefix("tick ")?.parse().ok());
    ticks.max().unwrap_or(0)
}

#[test]
#[ignore = "takes ten minutes and more: scripts/test --full"]
fn a_host_that_is_not_left_in_peace_loses_no_guest_no_second_and_no_wall() {
    let minutes: u64 = std::env::var("ROOST_SOAK_MINUTES").map_or(10, |text| text.parse().unwrap());
    let rig = Rig::get();
    let host = OwnHost::up(&rig, "soak", &["--memory-mib", "3072"]);
    let (own, _config) = host.with_stack(&rig);
    own.admin(&["image", "import", rig.images["tiny-fast"].to_str().unwrap(), "--name", "tiny-fast"]).ok();
    host.ssh("systemctl stop systemd-timesyncd 2> /dev/null; cp /etc/resolv.conf /root/resolv.conf").ok();
    let address = host.ssh("hostname -I | cut -d ' ' -f 1").ok();
    let guard = TempFile::new("guard", &GUARD.replace("HOST", address.trim()));
    let noise = TempFile::new("noise", NOISE);
    let (quiet, noisy) = (own.tenant("quiet"), own.tenant("noisy"));
    let id = quiet.launch("tiny-fast", "home1.micro", &["--wait", "--user-data", guard.path()]);
    let loud = noisy.launch("tiny-fast", "home1.nano", &["--wait", "--user-data", noise.path()]);
    quiet.wait_console(&id, "tick ", SOON);
    let first = quiet.describe(&id);
    let public = first["public_ip"].as_str().unwrap().to_owned();
    let (began_up, began_used) = (uptime(&host), first["used_seconds"].as_f64().unwrap());
    let mut seen = 0;
    for minute in 0..minutes {
        let round = std::time::Instant::now();
        host.ssh("nft flush ruleset").ok();
        answers(&host, &public);
        wait_for("the host's table to be there again", REPAIRED, || {
            let listed = host.ssh("nft list table inet roost_host");
            if listed.code == Some(0) { Ok(()) } else { Err(listed.stderr) }
        });
        let step = if minute % 2 == 0 { 3600 } else { -3600 };
        step_clock(&host, step);
        answers(&host, &public);
        std::thread::sleep(Duration::from_secs(15));
        step_clock(&host, -step);
        let server = format!("192.0.2.{}", 10 + minute);
        host.ssh(&format!("echo nameserver {server} > /etc/resolv.conf")).ok();
        answers(&host, &public);
        let now = ticks(&quiet, &id);
        assert!(now > seen, "the guard in the guest stands still at {now}");
        seen = now;
        for (tenant, instance) in [(&quiet, &id), (&noisy, &loud)] {
            let shown = tenant.describe(instance);
            assert_eq!((&shown["state"], &shown["incarnation"]), (&"running".into(), &1.into()), "{shown}");
        }
        let ran = uptime(&host) - began_up;
        let used = quiet.describe(&id)["used_seconds"].as_f64().unwrap() - began_used;
        assert!((used - ran).abs() <= REPORT_SECONDS, "minute {minute}: ran {ran:.1} s, used {used}");
        std::thread::sleep(Duration::from_secs(60).saturating_sub(round.elapsed()));
    }
    quiet.roost(&["stop", &id, "--wait"]).ok();
    let ran = uptime(&host) - began_up;
    let used = quiet.describe(&id)["used_seconds"].as_f64().unwrap() - began_used;
    println!("{minutes} minutes: ran {ran:.1} s, billed {used} s, {seen} rounds of attempts, none through");
    // The first reading is as old as its report was; the bill ends when the stop is asked for, before the guest is down.
    assert!(used <= ran + REPORT_SECONDS && used >= ran - REPORT_SECONDS, "ran {ran:.1} s, used {used}");
    host.ssh("cp /root/resolv.conf /etc/resolv.conf").ok();
    quiet.terminate_clean(&id);
    noisy.terminate_clean(&loud);
}
