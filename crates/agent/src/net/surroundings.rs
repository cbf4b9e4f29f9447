//! The part of the host's network that instances' networks depend on. It changes while guests run:
//! laptops roam, and interfaces are added and removed.

use super::links;
use crate::names::VETH_PREFIX;
use ipnet::Ipv4Net;
use serde::Serialize;
use std::collections::BTreeSet;
use std::fs;
use std::net::Ipv4Addr;

/// MTU in bytes if no uplink has one.
const MTU: u16 = 1500;

/// The host's network as guests depend on it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Surroundings {
    /// The uplinks: links of default routes, and those that the owner names.
    pub uplinks: BTreeSet<String>,
    /// MTU of the uplinks in bytes.
    pub mtu: u16,
    /// `net.ipv4.ip_forward` was on already: the host's owner uses the host as a router.
    pub routes: bool,
    /// The host's own addresses, and the networks of its links that are not uplinks. Guests never
    /// reach either.
    pub closed: Vec<Ipv4Net>,
}

impl Surroundings {
    /// Reads the calling thread's namespace. `named` are the uplinks that the owner names.
    pub fn look(named: &[String]) -> Self {
        let routes = fs::read_to_string("/proc/thread-self/net/route").unwrap_or_default();
        let mut uplinks = default_links(&routes);
        let mtu = uplinks.iter().filter_map(|name| links::mtu(name)).min();
        uplinks.extend(named.iter().cloned());
        let forwards = fs::read_to_string("/proc/sys/net/ipv4/ip_forward").unwrap_or_default();
        Self {
            closed: closed(&addresses(), &uplinks),
            uplinks,
            mtu: mtu.unwrap_or(MTU).clamp(576, MTU),
            routes: forwards.trim() == "1",
        }
    }
}

/// Links of default routes in the kernel's table.
fn default_links(routes: &str) -> BTreeSet<String> {
    let fields = routes.lines().skip(1).map(|line| line.split_ascii_whitespace().collect::<Vec<_>>());
    fields
        .filter(|fields| fields.get(1) == Some(&"00000000") && fields.get(7) == Some(&"00000000"))
        .map(|fields| fields[0].to_owned())
        .filter(|name| name != "*")
        .collect()
}

/// Addresses of the calling thread's namespace by link, each with its network.
pub fn addresses() -> Vec<(String, Ipv4Net)> {
    let Ok(all) = nix::ifaddrs::getifaddrs() else { return vec![] };
    all.filter_map(|one| {
        let address: Ipv4Addr = one.address?.as_sockaddr_in()?.ip();
        let mask = one.netmask.and_then(|mask| Some(mask.as_sockaddr_in()?.ip()));
        let net = Ipv4Net::with_netmask(address, mask.unwrap_or(Ipv4Addr::BROADCAST)).ok()?;
        Some((one.interface_name, net))
    })
    .collect()
}

fn closed(addresses: &[(String, Ipv4Net)], uplinks: &BTreeSet<String>) -> Vec<Ipv4Net> {
    let ways_out: Vec<Ipv4Net> =
        addresses.iter().filter(|(name, _)| uplinks.contains(name)).map(|(_, net)| net.trunc()).collect();
    let overlap = |net: &Ipv4Net| ways_out.iter().any(|out| out.contains(net) || net.contains(out));
    let mut closed: Vec<Ipv4Net> = addresses
        .iter()
        .filter(|(name, net)| !name.starts_with(VETH_PREFIX) && !net.addr().is_loopback())
        .flat_map(|(name, net)| {
            let own = Some(Ipv4Net::from(net.addr()));
            // A second link in the uplink's network closes its own address only.
            let network = Some(net.trunc()).filter(|net| !uplinks.contains(name) && !overlap(net));
            [own, network]
        })
        .flatten()
        .collect();
    closed = Ipv4Net::aggregate(&closed);
    closed.sort_unstable();
    closed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_default_route_is_a_way_out_and_no_other_route_is() {
        let routes = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\n\
            eth0\t00000000\t010200C0\t0003\t0\t0\t100\t00000000\t0\t0\t0\n\
            wlan0\t00000000\t010200C0\t0003\t0\t0\t600\t00000000\t0\t0\t0\n\
            tun0\t00000000\t00000000\t0001\t0\t0\t0\t00000080\t0\t0\t0\n\
            docker0\t000011AC\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0\n";
        assert_eq!(default_links(routes), BTreeSet::from(["eth0".to_owned(), "wlan0".to_owned()]));
        assert_eq!(default_links(""), BTreeSet::new());
    }

    #[test]
    fn own_addresses_and_other_networks_are_closed_but_not_the_uplinks_network() {
        let address = |name: &str, net: &str| (name.to_owned(), net.parse::<Ipv4Net>().unwrap());
        let all = [
            address("lo", "127.0.0.1/8"),
            address("eth0", "192.0.2.7/24"),
            address("wlan0", "192.0.2.8/24"),
            address("docker0", "172.17.0.1/16"),
            address("rv0123456789a", "100.64.0.1/32"),
        ];
        let closed = closed(&all, &BTreeSet::from(["eth0".to_owned()]));
        let nets: Vec<String> = closed.iter().map(ToString::to_string).collect();
        assert_eq!(nets, ["172.17.0.0/16", "192.0.2.7/32", "192.0.2.8/32"]);
    }
}
