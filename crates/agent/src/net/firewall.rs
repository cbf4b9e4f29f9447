//! Firewall tables as text for `nft -f -`, which applies each text as one transaction: whoever looks sees the old
//! rules or the new ones, never none.
//!
//! An instance's table lives in its own namespace and goes with it. The host's table is shared by all instances; it
//! lets their packets pass, hides their public addresses behind the host's where they leave it, and keeps them
//! from the host itself.

use super::METADATA_ADDRESS;
use crate::error::{Error, Result};
use crate::names::{HOST_TABLE, INSTANCE_TABLE, TAP, UPLINK, VETH_PREFIX};
use ipnet::Ipv4Net;
use roost_types::agent::{IngressRule, InterfaceSpec, Protocol};
use roost_types::ids::{InstanceId, InterfaceId};
use std::fmt::Write as _;
use std::io::Write as _;
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};

/// The instance's table: anti-spoofing, 1:1 NAT, security group.
pub fn instance_table(interface: &InterfaceSpec) -> String {
    let InterfaceSpec { mac, private_ip, public_ip, gateway, .. } = interface;
    let rules = interface.ingress.iter().fold(String::new(), |mut text, rule| {
        let _ = writeln!(text, "    {}", ingress_rule(rule));
        text
    });
    format!(
        r#"table inet {INSTANCE_TABLE}
delete table inet {INSTANCE_TABLE}
table inet {INSTANCE_TABLE} {{
  chain spoof {{
    type filter hook prerouting priority raw; policy accept;
    iifname != "{TAP}" accept
    ether saddr != {mac} counter drop
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
    iifname "{TAP}" oifname "{UPLINK}" accept
    iifname "{TAP}" oifname "{TAP}" ct status dnat accept
    iifname "{UPLINK}" oifname "{TAP}" jump ingress
    counter drop
  }}
  chain ingress {{
{rules}  }}
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
        Protocol::Tcp => format!("ip saddr {source} tcp dport {ports} counter accept"),
        Protocol::Udp => format!("ip saddr {source} udp dport {ports} counter accept"),
        Protocol::Icmp => format!("ip saddr {source} ip protocol icmp counter accept"),
    }
}

/// The host's table, with one instance's public address in it.
pub fn host_table(id: &InstanceId, public: Ipv4Addr) -> String {
    format!(
        r#"add table inet {HOST_TABLE}
add set inet {HOST_TABLE} public {{ type ipv4_addr ; }}
add chain inet {HOST_TABLE} input {{ type filter hook input priority -5 ; policy accept ; }}
add chain inet {HOST_TABLE} forward {{ type filter hook forward priority -5 ; policy accept ; }}
add chain inet {HOST_TABLE} postrouting {{ type nat hook postrouting priority 100 ; policy accept ; }}
flush chain inet {HOST_TABLE} input
flush chain inet {HOST_TABLE} forward
flush chain inet {HOST_TABLE} postrouting
add rule inet {HOST_TABLE} input iifname "{VETH_PREFIX}*" ct state established,related accept
add rule inet {HOST_TABLE} input iifname "{VETH_PREFIX}*" counter drop
add rule inet {HOST_TABLE} forward iifname "{VETH_PREFIX}*" ip saddr != @public counter drop
add rule inet {HOST_TABLE} forward iifname "{VETH_PREFIX}*" meta nfproto ipv6 counter drop
add rule inet {HOST_TABLE} postrouting oifname != "{VETH_PREFIX}*" ip saddr @public counter masquerade
add element inet {HOST_TABLE} public {{ {public} }}
delete element inet {HOST_TABLE} public {{ {public} }}
add element inet {HOST_TABLE} public {{ {public} comment "{id}" }}
"#
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
    run("check the rules of an instance", &["-c", "-f", "-"], &instance_table(&interface)).map(drop)
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
    let value: serde_json::Value = serde_json::from_str(&text)
        .map_err(|source| Error::Damaged { path: "nft -j list set".into(), source })?;
    Ok(elements(&value, id.as_str()))
}

fn elements(value: &serde_json::Value, comment: &str) -> Vec<Ipv4Addr> {
    let sets = value["nftables"].as_array().into_iter().flatten().filter_map(|item| item.get("set"));
    let elements = sets.filter_map(|set| set["elem"].as_array()).flatten().map(|item| &item["elem"]);
    elements
        .filter(|element| element["comment"] == comment)
        .filter_map(|element| element["val"].as_str()?.parse().ok())
        .collect()
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

/// Docker sets the policy of the old FORWARD chain to drop, and a drop there is final for every packet on the host
/// (a table of ours cannot overrule it). Where that is so, instances get a rule of their own in that chain, or in
/// `DOCKER-USER`, which Docker keeps free for this.
///
/// # Errors
/// The policy is to drop and the rule cannot be set.
pub fn pass_docker() -> Result<()> {
    let Ok(output) = Command::new("iptables").args(["-w", "-S"]).output() else { return Ok(()) };
    let rules = String::from_utf8_lossy(&output.stdout);
    if !rules.lines().any(|line| line == "-P FORWARD DROP") {
        return Ok(());
    }
    let user = rules.lines().any(|line| line == "-N DOCKER-USER");
    let chain = if user { "DOCKER-USER" } else { "FORWARD" };
    for direction in ["-i", "-o"] {
        let rule = [direction, "rv+", "-j", "ACCEPT"];
        let present = format!("-A {chain} {direction} rv+ -j ACCEPT");
        if rules.lines().any(|line| line == present) {
            continue;
        }
        let output = Command::new("iptables").args(["-w", "-I", chain]).args(rule).output();
        let output = output.map_err(Error::io("running iptables"))?;
        if !output.status.success() {
            return Err(Error::Program {
                program: "iptables",
                what: format!("let instances pass {chain}"),
                stderr: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            });
        }
    }
    Ok(())
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
        let text = instance_table(&interface);
        assert!(text.contains("ip saddr 10.0.0.0/8 tcp dport 8000-8080 counter accept"), "{text}");
        assert!(text.contains("ip saddr 0.0.0.0/0 ip protocol icmp counter accept"), "{text}");
        assert!(
            text.starts_with("table inet roost\ndelete table inet roost\n"),
            "replaced as a whole: {text}"
        );
        assert!(text.contains("ether saddr != 06:00:0a:00:00:05"), "{text}");
    }

    #[test]
    fn elements_are_told_apart_by_their_comment() {
        let value = serde_json::json!({"nftables": [{"metainfo": {}}, {"set": {"elem": [
            {"elem": {"val": "100.64.0.5", "comment": "i-0123456789abcdef0"}},
            {"elem": {"val": "100.64.0.6", "comment": "i-other"}}, "100.64.0.7"]}}]});
        assert_eq!(elements(&value, "i-0123456789abcdef0"), vec![Ipv4Addr::new(100, 64, 0, 5)]);
        assert!(elements(&serde_json::json!({}), "x").is_empty());
    }
}
