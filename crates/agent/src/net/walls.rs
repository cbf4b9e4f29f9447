//! Firewall tables of the host and its instances: set, watched, set again after another program
//! removed them, and taken down.
//!
//! A reload of the host's firewall (`nft flush ruleset`) flushes every table of the host. The
//! tables in the instances' namespaces stay, and still close the host and its other networks to
//! guests.
//!
//! Each look reads the generation of the ruleset, one small message per namespace. Rules are listed
//! only if the generation changed. Netlink events would be sooner, but can be lost under load.

use super::netfilter::Netfilter;
use super::surroundings::{self, Surroundings};
use super::{firewall, links, netns};
use crate::error::Result;
use crate::names::{self, HOST_TABLE};
use crate::trouble::Troubles;
use ipnet::Ipv4Net;
use roost_types::agent::InterfaceSpec;
use roost_types::forward::{self, Barrier, LINKS};
use roost_types::ids::InstanceId;
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a repair is reported.
const TELL: Duration = Duration::from_secs(600);
/// How often foreign forward chains are read without a change of nftables: legacy iptables changes
/// no generation.
const LOOK_AROUND: Duration = Duration::from_secs(30);
/// The range of the default public pool, and the range of [`super::UPLINK_GATEWAY`].
const POOLS: [&str; 2] = ["100.64.0.0/10", "169.254.100.0/24"];

/// The walls of this host.
#[derive(Debug, Default)]
pub struct Walls {
    named: Vec<String>,
    state: Mutex<State>,
    /// For readers that must not wait while tables are being set.
    shown: Mutex<Shown>,
}

#[derive(Debug, Default)]
struct Shown {
    around: Surroundings,
    trouble: Option<String>,
    trouble_of: BTreeMap<InstanceId, String>,
}

#[derive(Debug, Default)]
struct State {
    around: Surroundings,
    host: Option<Wall>,
    instances: BTreeMap<InstanceId, Inside>,
    repaired: Option<Told>,
    looked: Option<(u32, Instant)>,
    forwarding: Option<String>,
}

/// The tables of one namespace.
#[derive(Debug)]
struct Wall {
    netfilter: Netfilter,
    /// Generation of the ruleset when the tables were last verified.
    generation: u32,
    /// Roost's rules as the kernel lists them; empty for an instance's namespace, which no other
    /// program uses.
    rules: String,
}

/// The tables of one instance.
#[derive(Debug)]
struct Inside {
    interface: InterfaceSpec,
    namespace: PathBuf,
    wall: Wall,
    repaired: Option<Told>,
}

/// A sentence that is reported until a deadline.
#[derive(Debug, Clone)]
struct Told {
    since: Instant,
    sentence: String,
}

impl Told {
    fn now(sentence: &str) -> Self {
        Self { since: Instant::now(), sentence: sentence.to_owned() }
    }

    fn still(told: Option<&Self>) -> Option<String> {
        told.filter(|told| told.since.elapsed() < TELL).map(|told| told.sentence.clone())
    }
}

impl Wall {
    fn untouched(&self) -> bool {
        self.netfilter.generation().is_ok_and(|now| now == self.generation)
    }
}

impl State {
    fn public(&self) -> Vec<(InstanceId, Ipv4Addr)> {
        self.instances.iter().map(|(id, inside)| (id.clone(), inside.interface.public_ip)).collect()
    }

    /// Sets the host's table, then enables forwarding from the uplinks.
    fn set_host(&mut self, also: Option<(InstanceId, Ipv4Addr)>) -> Result<()> {
        let netfilter = Netfilter::open()?;
        let before = netfilter.generation()?;
        let known = self.host.take().filter(|wall| wall.generation == before);
        let public: Vec<_> = self.public().into_iter().chain(also).collect();
        firewall::apply("set the host's rules", &firewall::host_table(&self.around, &public))?;
        let after = netfilter.generation()?;
        self.host = Some(match known {
            // No other program changed the ruleset in between: the rules are those of last time.
            Some(wall) if after == before + 1 => Wall { generation: after, ..wall },
            _ => Wall { rules: firewall::host_rules(&firewall::ruleset()?), generation: after, netfilter },
        });
        for uplink in self.around.uplinks.iter().filter(|name| links::link_exists(name)) {
            links::forward_from(uplink)?;
        }
        Ok(())
    }

    /// Returns true if the host's table is as it was set, whatever else changed.
    fn host_stands(&mut self) -> Result<bool> {
        let public = self.public();
        let Some(wall) = &mut self.host else { return Ok(false) };
        if wall.untouched() {
            return Ok(true);
        }
        let generation = wall.netfilter.generation()?;
        let ruleset = firewall::ruleset()?;
        let listed = firewall::public_set(&ruleset);
        let stands = firewall::host_rules(&ruleset) == wall.rules
            && public.iter().all(|(id, address)| listed.contains(&(*address, id.to_string())));
        if stands {
            wall.generation = generation;
        }
        Ok(stands)
    }

    /// Opens foreign chains that drop instances' packets. Returns the sentence with the fix for the
    /// others.
    fn look_at_others(&mut self) -> Result<Option<String>> {
        let ruleset = firewall::ruleset()?;
        let mut sentences = Vec::new();
        for barrier in forward::barriers(&ruleset, HOST_TABLE) {
            let missing: Vec<String> = ways(&self.around.uplinks)
                .filter(|(from, to)| !barrier.passes(&ruleset, Some(from), Some(to)))
                .map(|(from, to)| barrier.pass(&from, &to))
                .collect();
            if barrier.is_of_iptables() {
                let Barrier { family, table, rules_into, .. } = &barrier;
                let wide = forward::too_wide(&ruleset, &barrier).into_iter();
                let wide =
                    wide.map(|handle| format!("delete rule {family} {table} {rules_into} handle {handle}"));
                let text: String = missing.into_iter().chain(wide).map(|line| line + "\n").collect();
                if !text.is_empty() {
                    tracing::warn!(%barrier, "drops what instances send and get; they are let pass");
                    firewall::apply("let instances pass a chain that drops", &text)?;
                }
            } else if !missing.is_empty() {
                let fix: Vec<String> = missing.iter().map(|rule| format!("nft '{rule}'")).collect();
                sentences.push(format!(
                    "{barrier} drops what instances send and get; let them pass: {}",
                    fix.join("; ")
                ));
            }
        }
        firewall::pass_old_iptables(&self.around)?;
        Ok((!sentences.is_empty()).then(|| sentences.join(". ")))
    }
}

/// Every path of instances' packets: to the uplink, from it, and between instances.
fn ways(uplinks: &BTreeSet<String>) -> impl Iterator<Item = (String, String)> {
    let both =
        uplinks.iter().flat_map(|name| [(LINKS.to_owned(), name.clone()), (name.clone(), LINKS.to_owned())]);
    both.chain([(LINKS.to_owned(), LINKS.to_owned())])
}

impl Walls {
    /// Creates an empty set of walls. `named` are uplinks beside those of the default routes.
    pub fn new(named: Vec<String>) -> Self {
        let around = Surroundings::look(&named);
        let shown = Shown { around: around.clone(), ..Shown::default() };
        Self { named, state: Mutex::new(State { around, ..State::default() }), shown: Mutex::new(shown) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn shown(&self) -> MutexGuard<'_, Shown> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The host's network that the tables were made for.
    pub fn around(&self) -> Surroundings {
        self.shown().around.clone()
    }

    /// Sets the tables of an instance, and adds its public address to the host's table. Blocks.
    ///
    /// # Errors
    /// The namespace does not exist, or the kernel refused a rule.
    pub fn set(&self, id: &InstanceId, interface: &InterfaceSpec, namespace: &Path) -> Result<()> {
        let (around, before) = {
            let mut state = self.lock();
            (state.around.clone(), state.instances.remove(id))
        };
        let wall = set_inside(namespace, interface, &around)?;
        let mut state = self.lock();
        let repaired = before.and_then(|inside| inside.repaired);
        let inside = Inside { interface: interface.clone(), namespace: namespace.to_owned(), wall, repaired };
        state.set_host(Some((id.clone(), interface.public_ip)))?;
        state.instances.insert(id.clone(), inside);
        // A foreign chain may drop already.
        state.looked = None;
        Ok(())
    }

    /// Removes an instance's tables once its links are gone. Blocks.
    ///
    /// # Errors
    /// See [`release`].
    pub fn take_down(&self, id: &InstanceId) -> Result<()> {
        let mut state = self.lock();
        let known = state.instances.remove(id).map(|inside| inside.interface.public_ip);
        release(id, known)?;
        // Nothing is watched without instances.
        if state.instances.is_empty() {
            state.host = None;
        }
        Ok(())
    }

    /// Returns the trouble of an instance's tables if there is one, or was one until a moment ago.
    pub fn trouble_of(&self, id: &InstanceId) -> Option<String> {
        let shown = self.shown();
        shown.trouble_of.get(id).or(shown.trouble.as_ref()).cloned()
    }

    /// Checks and repairs all tables; due once a second. Blocks.
    pub fn tend(&self, troubles: &Troubles) {
        let mut state = self.lock();
        let around = Surroundings::look(&self.named);
        let moved = around != state.around;
        if moved {
            tracing::info!(?around, "the host's network has changed");
            self.shown().around.clone_from(&around);
            state.around = around;
        }
        if state.instances.is_empty() {
            drop(state);
            for subject in ["firewall", "forwarding", "address pools"] {
                troubles.set(subject, None);
            }
            return;
        }
        let host = tend_host(&mut state, moved);
        let inside = tend_instances(&mut state, moved);
        let failed = host.and(inside).err().map(|error| {
            format!("the walls of instances cannot be set again and are open or shut: {}", error.chain())
        });
        let forwarding = look_around(&mut state, moved).unwrap_or_else(|error| Some(error.chain()));
        state.forwarding.clone_from(&forwarding);
        let inside = |inside: &Inside| Told::still(inside.repaired.as_ref());
        let trouble_of: BTreeMap<InstanceId, String> =
            state.instances.iter().filter_map(|(id, one)| Some((id.clone(), inside(one)?))).collect();
        let told = failed
            .or_else(|| Told::still(state.repaired.as_ref()))
            .or_else(|| trouble_of.iter().next().map(|(id, sentence)| format!("{id}: {sentence}")));
        let common = forwarding.clone().or_else(|| Told::still(state.repaired.as_ref()));
        drop(state);
        {
            let mut shown = self.shown();
            shown.trouble = common;
            shown.trouble_of = trouble_of;
        }
        troubles.set("firewall", told);
        troubles.set("forwarding", forwarding);
        troubles.set("address pools", owned_elsewhere(&surroundings::addresses()));
    }
}

fn tend_host(state: &mut State, moved: bool) -> Result<()> {
    let stands = state.host_stands()?;
    if !stands && state.host.is_some() {
        let sentence = "another program changed or flushed the host's firewall; Roost's table was set again";
        tracing::warn!("{sentence}");
        state.repaired = Some(Told::now(sentence));
    }
    if moved {
        // The host's rules change with its network.
        state.host = None;
    }
    if !stands || moved {
        state.set_host(None)?;
    }
    // Turning `net.ipv4.ip_forward` off turns off the forwarding of each link.
    for id in state.instances.keys() {
        let link = names::host_veth(id);
        if links::link_exists(&link) {
            links::forward_from(&link)?;
        }
    }
    for uplink in state.around.uplinks.iter().filter(|name| links::link_exists(name)) {
        links::forward_from(uplink)?;
    }
    Ok(())
}

fn tend_instances(state: &mut State, moved: bool) -> Result<()> {
    let around = state.around.clone();
    let mut failed = None;
    for (id, inside) in &mut state.instances {
        let untouched = inside.wall.untouched();
        if untouched && !moved {
            continue;
        }
        // A namespace that is being removed is no trouble of the host.
        if !netns::exists(&inside.namespace) {
            continue;
        }
        if !untouched {
            let sentence =
                "another program changed the firewall in the instance's namespace; it was set again";
            tracing::warn!(instance = %id, "{sentence}");
            inside.repaired = Some(Told::now(sentence));
        }
        match set_inside(&inside.namespace, &inside.interface, &around) {
            Ok(wall) => inside.wall = wall,
            Err(error) => failed = Some(error),
        }
    }
    failed.map_or(Ok(()), Err)
}

fn look_around(state: &mut State, moved: bool) -> Result<Option<String>> {
    let Some(wall) = &state.host else { return Ok(state.forwarding.clone()) };
    let now = (wall.netfilter.generation()?, Instant::now());
    let due = state
        .looked
        .is_none_or(|(generation, at)| moved || generation != now.0 || at.elapsed() >= LOOK_AROUND);
    if !due {
        return Ok(state.forwarding.clone());
    }
    state.looked = Some(now);
    state.look_at_others()
}

/// Finds addresses of the host in Roost's own ranges.
fn owned_elsewhere(addresses: &[(String, Ipv4Net)]) -> Option<String> {
    let pools: Vec<Ipv4Net> = POOLS.iter().filter_map(|pool| pool.parse().ok()).collect();
    addresses
        .iter()
        .filter(|(name, _)| !name.starts_with(names::VETH_PREFIX))
        .find_map(|(name, net)| {
            let pool = pools.iter().find(|pool| pool.contains(&net.addr()))?;
            Some(format!(
                "the link {name} has {net}, of {pool}, which instances' addresses are from: one of the two may be \
                 cut off; give instances another range (roost-controller serve --public-pool), or stop what has made {name}"
            ))
        })
}

/// Sets the tables of an instance's namespace. Blocks.
fn set_inside(namespace: &Path, interface: &InterfaceSpec, around: &Surroundings) -> Result<Wall> {
    let rules = firewall::instance_table(interface, &around.closed);
    netns::enter(namespace, move || {
        firewall::apply("set the instance's rules", &rules)?;
        links::forget_idle()?;
        let netfilter = Netfilter::open()?;
        Ok(Wall { generation: netfilter.generation()?, netfilter, rules: String::new() })
    })
}

/// Removes an instance's public addresses, and every tracked connection to them, once its links are
/// gone. The next instance with such an address gets no packet of the old connections. `known` is
/// an address that the host's table may have lost. Blocks.
///
/// # Errors
/// The kernel cannot delete connections, or refused to take an address out.
pub fn release(id: &InstanceId, known: Option<Ipv4Addr>) -> Result<()> {
    let listed = firewall::public_addresses(id)?;
    let addresses: Vec<Ipv4Addr> = listed.iter().copied().chain(known).collect();
    if addresses.is_empty() {
        return Ok(());
    }
    let count = Netfilter::open()?.forget(&addresses)?;
    tracing::debug!(instance = %id, count, "connections forgotten");
    if listed.is_empty() {
        return Ok(());
    }
    // The listed addresses go last: they name what a repeated call has to release.
    firewall::apply("remove public addresses", &firewall::without(&listed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_an_address_of_our_ranges_is_named() {
        let address = |name: &str, net: &str| (name.to_owned(), net.parse::<Ipv4Net>().unwrap());
        let mut all = vec![address("eth0", "192.0.2.1/24"), address("rv0123456789a", "100.64.0.1/32")];
        assert_eq!(owned_elsewhere(&all), None);
        all.push(address("tailscale0", "100.101.102.103/32"));
        let said = owned_elsewhere(&all).unwrap();
        assert!(said.contains("tailscale0") && said.contains("--public-pool"), "{said}");
        assert!(owned_elsewhere(&[address("br0", "169.254.100.7/24")]).is_some());
    }
}
