//! The network of an instance.
//!
//! ```text
//!  host namespace                    │ namespace roost-<id>                                  │ guest
//!                                    │                                                       │
//!  uplink ── route public/32 ── rv…  ═ up0 ── 1:1 NAT, security group ── tap0 ═══════════════╪═ eth0
//!     │      (permanent neighbour)   │                                    │ gateway/prefix    │ private/prefix
//!     └─ masquerade, forward accept, │                                    │ 169.254.169.254   │ by DHCP
//!        no way to the host itself   │                                    └ DHCP, metadata    │
//! ```
//! Private addresses of tenants may overlap, as each lives in a namespace of its own; nobody is ever told apart by
//! one. The ends of the veth pair have no addresses: both sides know the other's hardware address for good, so
//! there is nothing to resolve, to spoof or to reach.
//!
//! | module | what it holds |
//! |---|---|
//! | [`netns`] | namespaces with a name, and work done inside them |
//! | [`links`] | veth pair, tap, addresses, routes |
//! | [`surroundings`] | links, addresses and MTU of the host's network |
//! | [`firewall`] | the instance's table and the host's: text, and one transaction each |
//! | [`walls`] | the tables set, with the settings that go with them, and taken down |
//! | [`netfilter`] | the kernel's generation of tables, and connections to be forgotten |
//! | [`dhcp`] | one lease for one guest |
//! | [`metadata`], [`imds`] | what 169.254.169.254 says, and the server that says it |
//! | [`service`] | the two servers of one instance |

pub mod dhcp;
pub mod firewall;
pub mod imds;
pub mod links;
pub mod metadata;
pub mod netfilter;
pub mod netns;
pub mod service;
pub mod surroundings;
pub mod walls;

use std::net::Ipv4Addr;

/// Where the metadata service answers.
pub const METADATA_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// Next hop out of a namespace: a name for the host's end of the veth pair that is never put on the wire.
pub const UPLINK_GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 100, 1);
