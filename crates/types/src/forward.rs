//! Chains on nftables' forward hook of other programs that drop instances' packets. The agent
//! checks them while instances run, `roost doctor` before.
//!
//! A drop is final in nftables: no other table can overrule it. An accept is not final.

use serde_json::Value;
use std::fmt;

/// Pattern of the host's links to instances.
pub const LINKS: &str = "rv*";

/// The agent's own table of the host.
pub const HOST_TABLE: &str = "roost_host";

/// A chain that drops every packet that no rule accepts.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Barrier {
    /// `ip` or `inet`.
    pub family: String,
    /// Table of the chain.
    pub table: String,
    /// The chain on the forward hook.
    pub chain: String,
    /// Chain for additional rules: Docker keeps `DOCKER-USER` for them.
    pub rules_into: String,
}

impl fmt::Display for Barrier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "chain {} of table {} {}", self.chain, self.family, self.table)
    }
}

impl Barrier {
    /// The forward chain of iptables, Docker and ufw.
    pub fn is_of_iptables(&self) -> bool {
        self.family == "ip" && self.table == "filter" && self.chain == "FORWARD"
    }

    /// The rule in nft's syntax that accepts packets from one link to another in this chain.
    pub fn pass(&self, from: &str, to: &str) -> String {
        let Self { family, table, rules_into, .. } = self;
        format!(r#"insert rule {family} {table} {rules_into} iifname "{from}" oifname "{to}" counter accept"#)
    }

    /// Returns true if the ruleset (`nft -j list ruleset`) accepts packets from one link to another
    /// in this chain. `None` is any link.
    pub fn passes(&self, ruleset: &Value, from: Option<&str>, to: Option<&str>) -> bool {
        rules(ruleset).filter(|rule| self.leads_to(ruleset, rule)).any(|rule| {
            let says = |key: &str, name: Option<&str>| match (link_of(rule, key), name) {
                (Some(said), Some(name)) => said == name,
                (None, Some(_)) => false,
                (_, None) => true,
            };
            has(rule, "accept") && says("iifname", from) && says("oifname", to)
        })
    }

    /// A rule of the chain itself, or of one that it jumps to.
    fn leads_to(&self, ruleset: &Value, rule: &Value) -> bool {
        let ours = |rule: &Value| rule["family"] == *self.family && rule["table"] == *self.table;
        ours(rule)
            && (rule["chain"] == *self.chain
                || rules(ruleset).filter(|from| ours(from) && from["chain"] == *self.chain).any(|from| {
                    expressions(from).any(|part| {
                        [&part["jump"], &part["goto"]].into_iter().any(|to| to["target"] == rule["chain"])
                    })
                }))
    }
}

/// Chains in `nft -j list ruleset` that drop instances' packets by default. Chains of Roost's own
/// `table` are left out.
pub fn barriers(ruleset: &Value, table: &str) -> Vec<Barrier> {
    let forward = objects(ruleset, "chain").filter(|chain| {
        chain["hook"] == "forward"
            && chain["table"] != table
            && matches!(chain["family"].as_str(), Some("ip" | "inet"))
    });
    let dropping = forward.filter(|chain| {
        let last = rules(ruleset)
            .filter(|rule| ["family", "table"].iter().all(|key| rule[key] == chain[key]))
            .rfind(|rule| rule["chain"] == chain["name"]);
        chain["policy"] == "drop" || last.is_some_and(drops_all)
    });
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    dropping
        .map(|chain| {
            let mut barrier = Barrier {
                family: text(&chain["family"]),
                table: text(&chain["table"]),
                chain: text(&chain["name"]),
                rules_into: text(&chain["name"]),
            };
            let docker = objects(ruleset, "chain").any(|other| {
                other["family"] == "ip" && other["table"] == "filter" && other["name"] == "DOCKER-USER"
            });
            if docker && barrier.is_of_iptables() {
                "DOCKER-USER".clone_into(&mut barrier.rules_into);
            }
            barrier
        })
        .collect()
}

/// Handles of rules of earlier agents that accept instances' packets to every link of the host.
pub fn too_wide(ruleset: &Value, barrier: &Barrier) -> Vec<u64> {
    rules(ruleset)
        .filter(|rule| rule["family"] == *barrier.family && rule["table"] == *barrier.table)
        .filter(|rule| rule["chain"] == *barrier.rules_into && has(rule, "accept"))
        .filter(|rule| {
            matches!(
                (link_of(rule, "iifname"), link_of(rule, "oifname")),
                (Some(LINKS), None) | (None, Some(LINKS))
            )
        })
        .filter(|rule| expressions(rule).filter(|part| part.get("match").is_some()).count() == 1)
        .filter_map(|rule| rule["handle"].as_u64())
        .collect()
}

/// The objects of one kind, in the order of the listing.
pub fn objects<'a>(ruleset: &'a Value, kind: &'a str) -> impl DoubleEndedIterator<Item = &'a Value> {
    ruleset["nftables"].as_array().into_iter().flatten().filter_map(move |object| object.get(kind))
}

fn rules(ruleset: &Value) -> impl DoubleEndedIterator<Item = &Value> {
    objects(ruleset, "rule")
}

fn expressions(rule: &Value) -> impl Iterator<Item = &Value> {
    rule["expr"].as_array().into_iter().flatten()
}

fn has(rule: &Value, verdict: &str) -> bool {
    expressions(rule).any(|part| part.get(verdict).is_some())
}

fn drops_all(rule: &Value) -> bool {
    (has(rule, "drop") || has(rule, "reject"))
        && expressions(rule)
            .all(|part| ["drop", "reject", "counter", "log"].iter().any(|known| part.get(known).is_some()))
}

/// The input (`iifname`) or output (`oifname`) link that a rule matches.
fn link_of<'a>(rule: &'a Value, key: &str) -> Option<&'a str> {
    expressions(rule)
        .map(|part| &part["match"])
        .find(|part| part["op"] == "==" && part["left"]["meta"]["key"] == key)
        .and_then(|part| part["right"].as_str())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn chain(family: &str, table: &str, name: &str, policy: Option<&str>) -> Value {
        let hook = policy.map(|_| "forward");
        json!({"chain": {"family": family, "table": table, "name": name, "hook": hook, "policy": policy}})
    }

    fn rule(family: &str, table: &str, chain: &str, parts: &[Value]) -> Value {
        json!({"rule": {"family": family, "table": table, "chain": chain, "handle": 7, "expr": parts}})
    }

    fn link(key: &str, name: &str) -> Value {
        json!({"match": {"op": "==", "left": {"meta": {"key": key}}, "right": name}})
    }

    fn ruleset(objects: &[Value]) -> Value {
        json!({ "nftables": objects })
    }

    #[test]
    fn dockers_policy_is_a_barrier_until_instances_may_pass_both_ways() {
        let jump = rule("ip", "filter", "FORWARD", &[json!({"jump": {"target": "DOCKER-USER"}})]);
        let mut all = vec![
            chain("ip", "filter", "FORWARD", Some("drop")),
            chain("ip", "filter", "DOCKER-USER", None),
            chain("inet", "roost_host", "forward", Some("drop")),
            chain("ip6", "filter", "FORWARD", Some("drop")),
            jump,
        ];
        let found = barriers(&ruleset(&all), "roost_host");
        assert_eq!(found.len(), 1, "{found:?}");
        let docker = &found[0];
        assert_eq!(docker.to_string(), "chain FORWARD of table ip filter");
        assert!(docker.is_of_iptables());
        assert_eq!(
            docker.pass(LINKS, "eth0"),
            r#"insert rule ip filter DOCKER-USER iifname "rv*" oifname "eth0" counter accept"#
        );
        assert!(!docker.passes(&ruleset(&all), Some(LINKS), None));
        let accept = |a, b| rule("ip", "filter", "DOCKER-USER", &[a, b, json!({"accept": null})]);
        all.push(accept(link("iifname", LINKS), link("oifname", "eth0")));
        assert!(docker.passes(&ruleset(&all), Some(LINKS), Some("eth0")));
        assert!(!docker.passes(&ruleset(&all), Some("eth0"), Some(LINKS)), "one way is not both");
        assert!(too_wide(&ruleset(&all), docker).is_empty());
        all.push(rule("ip", "filter", "DOCKER-USER", &[link("iifname", LINKS), json!({"accept": null})]));
        assert_eq!(too_wide(&ruleset(&all), docker), [7]);
    }

    #[test]
    fn a_last_rule_that_drops_everything_is_a_barrier_too() {
        let reject = json!({"reject": {"type": "icmpx", "expr": "admin-prohibited"}});
        let mut all = vec![
            chain("inet", "firewalld", "filter_FORWARD", Some("accept")),
            rule("inet", "firewalld", "filter_FORWARD", &[json!({"counter": null}), reject]),
        ];
        let found = barriers(&ruleset(&all), "roost_host");
        assert_eq!(found.len(), 1);
        assert!(!found[0].is_of_iptables());
        // A chain that drops some packets does not drop all.
        all[1] =
            rule("inet", "firewalld", "filter_FORWARD", &[link("iifname", "eth9"), json!({"drop": null})]);
        assert!(barriers(&ruleset(&all), "roost_host").is_empty());
        assert!(barriers(&json!({}), "roost_host").is_empty());
    }
}
