//! Firewall tables as text for `nft -f -`, which applies each text as one transaction: whoever looks sees the old
//! rules or the new ones, never none.
//!
//! An instance's table lives in its own namespace and goes with it. The host's table is shared by all instances; it
//! lets their packets pass, hides their public addresses behind the host's where they leave it, and keeps them
//! from the host itself.

use super::METADATA_ADDRESS;
use super::surroundings::Surroundings;
use crate::error::{Error, Result};
use crate::names::{HOST_TABLE, INSTANCE_TABLE, TAP, UPLINK, VETH_PREFIX};
use ipnet::Ipv4Net;
use roost_types::agent::{IngressRule, InterfaceSpec, Protocol};
use roost_types::forward;
use roost_types::ids::{InstanceId, InterfaceId};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::Write as _;
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};

/// Most tracked connections of one instance in each direction.
///
/// The host's kernel has one connection table, and never evicts a TCP connection that was answered.
pub const CONNECTIONS: u32 = 8192;
/// New connections per second of one instance and direction, after a burst of [`NEW_BURST`].
///
/// The kernel keeps a closed TCP connection for 120 s and does not count it against
/// [`CONNECTIONS`].
const NEW_PER_SECOND: u32 = 500;
const NEW_BURST: u32 = 4096;

/// Packets per second that a guest may send to DHCP and the metadata service together, as EC2
/// allows.
const SERVICE_PACKETS: u32 = 1024;

/// The tables of an instance's namespace: anti-spoofing (ARP too), 1:1 NAT, security group and
/// connection limits.
///
/// `closed` holds the host's own addresses and its other networks. The host's table drops packets
/// to them as well, but another program can flush that table.
pub fn instance_table(interface: &InterfaceSpec, closed: &[Ipv4Net]) -> String {
    instance_table_of(interface, closed, CONNECTIONS)
}

/// [`instance_table`] with another limit of connections.
pub fn instance_table_of(interface: &InterfaceSpec, closed: &[Ipv4Net], connections: u32) -> String {
    let InterfaceSpec { mac, private_ip, public_ip, gateway, .. } = interface;
    let rules = interface.ingress.iter().fold(String::new(), |mut text, rule| {
        let _ = writeln!(text, "    {}", ingress_rule(rule));
        text
    });
    let closed = Ipv4Net::aggregate(&closed.to_vec()).iter().fold(String::new(), |mut text, net| {
        let _ = writeln!(text, "    iifname \"{TAP}\" ip daddr {net} counter drop");
        text
    });
    // Rules are replaced. Sets stay, because they hold the counts.
    format!(
        r#"table inet {INSTANCE_TABLE}
flush table inet {INSTANCE_TABLE}
table inet {INSTANCE_TABLE} {{
  set conns_out {{ type ipv4_addr; size 64; flags dynamic; }}
  set conns_in {{ type ipv4_addr; size 64; flags dynamic; }}
  chain spoof {{
    type filter hook prerouting priority raw; policy accept;
    iifname != "{TAP}" accept
    ether saddr != {mac} counter drop
    ip daddr {{ {gateway}, {METADATA_ADDRESS}, 255.255.255.255 }} limit rate over {SERVICE_PACKETS}/second burst {SERVICE_PACKETS} packets counter drop
    ip saddr {private_ip} accept
    ip saddr 0.0.0.0 ip daddr 255.255.255.255 udp sport 68 udp dport 67 accept
    counter drop
  }}
  chain prerouting {{
    type nat hook prerouting priority dstnat; policy accept;
    ip daddr {public_ip} dnat ip to {private_ip}
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
    oifname "{UPLINK}" ip saddr {private_ip} snat ip to {public_ip}
    oifname "{TAP}" ip saddr {private_ip} masquerade
  }}
  chain input {{
    type filter hook input priority filter; policy drop;
    iifname "lo" accept
    ct state established,related accept
    iifname "{TAP}" udp sport 68 udp dport 67 accept
    iifname "{TAP}" ip daddr {METADATA_ADDRESS} tcp dport 80 accept
    iifname "{TAP}" ip daddr {gateway} icmp type echo-request accept
    counter drop
  }}
  chain forward {{
    type filter hook forward priority filter; policy drop;
    ct state established,related accept
    ct state invalid counter drop
    iifname "{TAP}" ip daddr 169.254.0.0/16 counter drop
{closed}    iifname "{TAP}" limit rate over {NEW_PER_SECOND}/second burst {NEW_BURST} packets counter drop
    iifname "{TAP}" add @conns_out {{ ip saddr ct count over {connections} }} counter drop
    iifname "{TAP}" oifname "{UPLINK}" accept
    iifname "{TAP}" oifname "{TAP}" ct status dnat accept
    iifname "{UPLINK}" oifname "{TAP}" jump ingress
    counter drop
  }}
  chain ingress {{
{rules}  }}
  chain admit {{
    limit rate over {NEW_PER_SECOND}/second burst {NEW_BURST} packets counter drop
    add @conns_in {{ ip daddr ct count over {connections} }} counter drop
    accept
  }}
}}
table arp {INSTANCE_TABLE}
flush table arp {INSTANCE_TABLE}
table arp {INSTANCE_TABLE} {{
  chain input {{
    type filter hook input priority filter; policy drop;
    iifname "{TAP}" arp saddr ip {private_ip} arp saddr ether {mac} accept
    iifname != "{TAP}" accept
    counter drop
  }}
}}
"#
    )
}

fn ingress_rule(rule: &IngressRule) -> String {
    let source = rule.source.trunc();
    let ports = if rule.from_port == rule.to_port {
        rule.from_port.to_string()
    } else {
        format!("{}-{}", rule.from_port.min(rule.to_port), rule.from_port.max(rule.to_port))
    };
    match rule.protocol {
        Protocol::Tcp => format!("ip saddr {source} tcp dport {ports} counter goto admit"),
        Protocol::Udp => format!("ip saddr {source} udp dport {ports} counter goto admit"),
        Protocol::Icmp => format!("ip saddr {source} ip protocol icmp counter goto admit"),
    }
}

/// The host's table with the public addresses of instances.
pub fn host_table(around: &Surroundings, instances: &[(InstanceId, Ipv4Addr)]) -> String {
    host_table_of(around, instances, CONNECTIONS)
}

/// [`host_table`] with another limit of connections.
pub fn host_table_of(
    around: &Surroundings,
    instances: &[(InstanceId, Ipv4Addr)],
    connections: u32,
) -> String {
    let mut rules = String::new();
    let mut rule = |chain: &str, rule: &str| {
        let _ = writeln!(rules, "add rule inet {HOST_TABLE} {chain} {rule}");
    };
    let guest = format!(r#"iifname "{VETH_PREFIX}*""#);
    rule("input", &format!("{guest} ct state established,related accept"));
    rule("input", &format!("{guest} counter drop"));
    rule("forward", &format!("{guest} ip saddr != @public counter drop"));
    rule("forward", &format!("{guest} meta nfproto ipv6 counter drop"));
    // Guests reach the uplink and other instances only: no container, virtual machine or tunnel.
    let others = around.uplinks.iter().fold(format!(r#"oifname != "{VETH_PREFIX}*""#), |mut text, name| {
        let _ = write!(text, r#" oifname != "{name}""#);
        text
    });
    rule("forward", &format!("{guest} {others} counter drop"));
    // Ports that the host publishes (DNAT) are closed to guests, wherever they lead.
    rule("forward", &format!("{guest} ct direction original ct status dnat counter drop"));
    for (name, key) in [("iifname", "saddr"), ("oifname", "daddr")] {
        let new = format!(r#"{name} "{VETH_PREFIX}*" ct state new"#);
        let rate = format!("limit rate over {NEW_PER_SECOND}/second burst {NEW_BURST} packets");
        rule("forward", &format!("{new} update @new_{key} {{ ip {key} {rate} }} counter drop"));
        rule(
            "forward",
            &format!("{new} add @conns_{key} {{ ip {key} ct count over {connections} }} counter drop"),
        );
    }
    if !around.routes {
        for name in &around.uplinks {
            // The uplink forwards for instances only: the host is no router for others.
            rule("forward", &format!(r#"iifname "{name}" oifname != "{VETH_PREFIX}*" counter drop"#));
        }
    }
    rule("postrouting", &format!(r#"oifname != "{VETH_PREFIX}*" ip saddr @public counter masquerade"#));
    for (id, public) in instances {
        let _ = writeln!(
            rules,
            r#"add element inet {HOST_TABLE} public {{ {public} }}
delete element inet {HOST_TABLE} public {{ {public} }}
add element inet {HOST_TABLE} public {{ {public} comment "{id}" }}"#
        );
    }
    format!(
        r#"add table inet {HOST_TABLE}
add set inet {HOST_TABLE} public {{ type ipv4_addr ; }}
add set inet {HOST_TABLE} conns_saddr {{ type ipv4_addr ; size 65535 ; flags dynamic ; }}
add set inet {HOST_TABLE} conns_daddr {{ type ipv4_addr ; size 65535 ; flags dynamic ; }}
add set inet {HOST_TABLE} new_saddr {{ type ipv4_addr ; size 65535 ; flags dynamic,timeout ; timeout 1m ; }}
add set inet {HOST_TABLE} new_daddr {{ type ipv4_addr ; size 65535 ; flags dynamic,timeout ; timeout 1m ; }}
add chain inet {HOST_TABLE} input {{ type filter hook input priority -5 ; policy accept ; }}
add chain inet {HOST_TABLE} forward {{ type filter hook forward priority -5 ; policy accept ; }}
add chain inet {HOST_TABLE} postrouting {{ type nat hook postrouting priority 100 ; policy accept ; }}
flush chain inet {HOST_TABLE} input
flush chain inet {HOST_TABLE} forward
flush chain inet {HOST_TABLE} postrouting
{rules}"#
    )
}

/// Takes public addresses out of the host's table.
pub fn without(addresses: &[Ipv4Addr]) -> String {
    addresses.iter().fold(String::new(), |mut text, address| {
        let _ = writeln!(text, "delete element inet {HOST_TABLE} public {{ {address} }}");
        text
    })
}

/// Applies a text in the calling thread's namespace, in one transaction.
///
/// # Errors
/// `nft` is missing or refused it; nothing has changed then.
pub fn apply(what: &str, text: &str) -> Result<()> {
    run(what, &["-f", "-"], text).map(drop)
}

/// Lets the kernel load what rules need (seconds on a slow host) before the first instance waits for it: checks a
/// table that is never made.
///
/// # Errors
/// `nft` is missing, or the kernel lacks something that rules need; the text says what.
pub fn warm_up() -> Result<()> {
    // Addresses of RFC 5737, which are nobody's.
    let (private_ip, public_ip) = (Ipv4Addr::new(192, 0, 2, 2), Ipv4Addr::new(198, 51, 100, 2));
    let source = Ipv4Net::default();
    let interface = InterfaceSpec {
        interface_id: InterfaceId::from_random([0; 9]),
        mac: "06:00:00:00:00:00".into(),
        private_ip,
        prefix_len: 24,
        gateway: Ipv4Addr::new(192, 0, 2, 1),
        public_ip,
        ingress: vec![IngressRule { protocol: Protocol::Tcp, from_port: 22, to_port: 22, source }],
    };
    let host = host_table(&Surroundings::default(), &[]);
    let text = instance_table(&interface, &[Ipv4Net::default()]) + &host;
    run("check the rules of an instance", &["-c", "-f", "-"], &text).map(drop)
}

/// The public addresses that the host's table holds for an instance.
///
/// # Errors
/// `nft` is missing or fails otherwise than for want of the table.
pub fn public_addresses(id: &InstanceId) -> Result<Vec<Ipv4Addr>> {
    let text =
        match run("list the public addresses", &["-j", "list", "set", "inet", HOST_TABLE, "public"], "") {
            Ok(text) => text,
            Err(Error::Program { stderr, .. }) if stderr.contains("No such file or directory") => {
                return Ok(vec![]);
            }
            Err(error) => return Err(error),
        };
    let value: Value = serde_json::from_str(&text)
        .map_err(|source| Error::Damaged { path: "nft -j list set".into(), source })?;
    Ok(elements(&value, id.as_str()))
}

fn elements(value: &Value, comment: &str) -> Vec<Ipv4Addr> {
    public_set(value).into_iter().filter(|(_, whose)| whose == comment).map(|(address, _)| address).collect()
}

/// The host's public addresses as nft lists them, each with its instance.
pub fn public_set(listed: &Value) -> BTreeSet<(Ipv4Addr, String)> {
    let sets = forward::objects(listed, "set")
        .filter(|set| set["name"] == "public" && (set["table"] == HOST_TABLE || set["table"].is_null()));
    let elements = sets.filter_map(|set| set["elem"].as_array()).flatten().map(|item| &item["elem"]);
    elements
        .filter_map(|element| {
            let address = element["val"].as_str()?.parse().ok()?;
            Some((address, element["comment"].as_str()?.to_owned()))
        })
        .collect()
}

/// Every table of the calling thread's namespace, without counters.
///
/// # Errors
/// `nft` is missing or fails.
pub fn ruleset() -> Result<Value> {
    let text = run("list the rules", &["-j", "-s", "list", "ruleset"], "")?;
    serde_json::from_str(&text)
        .map_err(|source| Error::Damaged { path: "nft -j list ruleset".into(), source })
}

/// The chains and rules of the host's table in a listing. Equal texts are equal tables.
pub fn host_rules(ruleset: &Value) -> String {
    let kinds = ["chain", "rule"].into_iter().flat_map(|kind| forward::objects(ruleset, kind));
    kinds.filter(|object| object["table"] == HOST_TABLE).fold(String::new(), |mut text, object| {
        let mut object = object.clone();
        if let Some(fields) = object.as_object_mut() {
            // The handle differs each time that the same rule is set.
            fields.remove("handle");
        }
        let _ = writeln!(text, "{object}");
        text
    })
}

/// Removes the host's table, if no instance of any agent is in it any more.
///
/// # Errors
/// `nft` fails.
pub fn remove_empty_host_table() -> Result<()> {
    let Ok(text) = run("look for the host's table", &["list", "set", "inet", HOST_TABLE, "public"], "")
    else {
        return Ok(());
    };
    if text.contains("elements") {
        return Ok(());
    }
    apply("remove the host's table", &format!("delete table inet {HOST_TABLE}\n"))
}

/// Lets instances pass the FORWARD chain of legacy iptables, which nftables does not list, if its
/// policy is to drop, as with Docker. The rules accept packets between instances and to and from
/// the uplinks. They go into `DOCKER-USER` if Docker made that chain, else into FORWARD.
///
/// # Errors
/// The policy is to drop and a rule cannot be set.
pub fn pass_old_iptables(around: &Surroundings) -> Result<()> {
    let tables = std::fs::read_to_string("/proc/thread-self/net/ip_tables_names").unwrap_or_default();
    if !tables.lines().any(|table| table == "filter") {
        return Ok(());
    }
    // With both kinds installed, `iptables` may be the nftables variant.
    let program = ["iptables-legacy", "iptables"]
        .into_iter()
        .find_map(|name| Some((name, Command::new(name).args(["-w", "-S"]).output().ok()?)));
    let Some((program, output)) = program else { return Ok(()) };
    let rules = String::from_utf8_lossy(&output.stdout);
    for arguments in docker_rules(&rules, &around.uplinks) {
        let output = Command::new(program).arg("-w").args(arguments.split(' ')).output();
        let output = output.map_err(Error::io("running iptables"))?;
        if !output.status.success() {
            return Err(Error::Program {
                program: "iptables",
                what: format!("let instances pass ({arguments})"),
                stderr: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            });
        }
    }
    Ok(())
}

/// The changes that `iptables -S` needs, as arguments of iptables.
fn docker_rules(rules: &str, uplinks: &BTreeSet<String>) -> Vec<String> {
    let there = |rule: &str| rules.lines().any(|line| line == rule);
    let chain = if there("-N DOCKER-USER") { "DOCKER-USER" } else { "FORWARD" };
    let mut changes = Vec::new();
    // Earlier agents accepted packets to every container.
    for rule in ["-i rv+ -j ACCEPT", "-o rv+ -j ACCEPT"] {
        if there(&format!("-A {chain} {rule}")) {
            changes.push(format!("-D {chain} {rule}"));
        }
    }
    if there("-P FORWARD DROP") {
        let ways = uplinks.iter().flat_map(|name| [format!("-i rv+ -o {name}"), format!("-i {name} -o rv+")]);
        for way in ways.chain(["-i rv+ -o rv+".to_owned()]) {
            if !there(&format!("-A {chain} {way} -j ACCEPT")) {
                changes.push(format!("-I {chain} {way} -j ACCEPT"));
            }
        }
    }
    changes
}

fn run(what: &str, arguments: &[&str], input: &str) -> Result<String> {
    let mut child = Command::new("nft")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(Error::io("running nft (Debian: apt install nftables)"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A text that nft stops reading is explained by what nft says.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().map_err(Error::io("waiting for nft"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(Error::Program {
        program: "nft",
        what: what.to_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::ensure;

    #[test]
    fn rules_of_a_security_group_become_accepts_and_the_rest_is_dropped() {
        let mut interface = ensure(1).spec.interface;
        interface.ingress = vec![
            IngressRule {
                protocol: Protocol::Tcp,
                from_port: 8000,
                to_port: 8080,
                source: "10.1.2.3/8".parse().unwrap(),
            },
            IngressRule {
                protocol: Protocol::Icmp,
                from_port: 0,
                to_port: 0,
                source: "0.0.0.0/0".parse().unwrap(),
            },
        ];
        let text = instance_table(&interface, &[]);
        assert!(text.contains("ip saddr 10.0.0.0/8 tcp dport 8000-8080 counter goto admit"), "{text}");
        assert!(text.contains("ip saddr 0.0.0.0/0 ip protocol icmp counter goto admit"), "{text}");
        assert!(
            text.starts_with("table inet roost\nflush table inet roost\n"),
            "rules are replaced as a whole: {text}"
        );
        assert!(text.contains("ether saddr != 06:00:0a:00:00:05"), "{text}");
    }

    #[test]
    fn docker_lets_instances_pass_to_the_uplink_and_not_to_containers() {
        let uplinks = BTreeSet::from(["eth0".to_owned()]);
        let docker = "-P FORWARD DROP\n-N DOCKER-USER\n-A DOCKER-USER -i rv+ -j ACCEPT\n";
        assert_eq!(
            docker_rules(docker, &uplinks),
            [
                "-D DOCKER-USER -i rv+ -j ACCEPT",
                "-I DOCKER-USER -i rv+ -o eth0 -j ACCEPT",
                "-I DOCKER-USER -i eth0 -o rv+ -j ACCEPT",
                "-I DOCKER-USER -i rv+ -o rv+ -j ACCEPT"
            ]
        );
        let done = "-P FORWARD DROP\n-A FORWARD -i rv+ -o eth0 -j ACCEPT\n-A FORWARD -i eth0 -o rv+ -j ACCEPT\n\
            -A FORWARD -i rv+ -o rv+ -j ACCEPT\n";
        assert!(docker_rules(done, &uplinks).is_empty());
        assert!(docker_rules("-P FORWARD ACCEPT\n", &uplinks).is_empty());
    }

    #[test]
    fn elements_are_told_apart_by_their_comment() {
        let value = serde_json::json!({"nftables": [{"metainfo": {}}, {"set": {"name": "public", "elem": [
            {"elem": {"val": "100.64.0.5", "comment": "i-0123456789abcdef0"}},
            {"elem": {"val": "100.64.0.6", "comment": "i-other"}}, "100.64.0.7"]}}]});
        assert_eq!(elements(&value, "i-0123456789abcdef0"), vec![Ipv4Addr::new(100, 64, 0, 5)]);
        assert!(elements(&serde_json::json!({}), "x").is_empty());
    }
}
