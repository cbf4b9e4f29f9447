//! The walls of one instance and of the host, set and taken down: tables, and the settings that go with them.

use super::netfilter::Netfilter;
use super::surroundings::Surroundings;
use super::{firewall, links, netns};
use crate::error::Result;
use roost_types::agent::InterfaceSpec;
use roost_types::ids::InstanceId;
use std::net::Ipv4Addr;
use std::path::Path;

/// Sets the tables of an instance's namespace. Blocks.
///
/// # Errors
/// There is no such namespace, or the kernel refused a rule.
pub fn set_inside(namespace: &Path, interface: &InterfaceSpec, around: &Surroundings) -> Result<()> {
    let rules = firewall::instance_table(interface, &around.closed);
    netns::enter(namespace, move || {
        firewall::apply("set the instance's rules", &rules)?;
        links::forget_idle()
    })
}

/// Sets the host's table with the public addresses of these instances in it, then lets their replies in. Blocks.
///
/// # Errors
/// The kernel refused a rule.
pub fn set_host(around: &Surroundings, instances: &[(InstanceId, Ipv4Addr)]) -> Result<()> {
    firewall::apply("set the host's rules", &firewall::host_table(around, instances))?;
    for uplink in around.uplinks.iter().filter(|name| links::link_exists(name)) {
        links::forward_from(uplink)?;
    }
    Ok(())
}

/// Takes an instance's public addresses back, when its links are gone: nothing that was connected to them goes on, so
/// the next instance that has one hears nothing of it. Blocks.
///
/// # Errors
/// The kernel cannot delete connections, or refused to take an address out.
pub fn release(id: &InstanceId) -> Result<()> {
    let addresses = firewall::public_addresses(id)?;
    if addresses.is_empty() {
        return Ok(());
    }
    let count = Netfilter::open()?.forget(&addresses)?;
    tracing::debug!(instance = %id, count, "connections forgotten");
    // Last, as they say what is to be released if this is cut short.
    firewall::apply("remove public addresses", &firewall::without(&addresses))
}
