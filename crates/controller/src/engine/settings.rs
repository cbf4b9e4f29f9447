//! What the owner of a controller may set.

use ipnet::Ipv4Net;
use roost_types::Micros;
use roost_types::agent::{IngressRule, Protocol};
use std::net::Ipv4Addr;

/// Settings of the engine.
#[derive(Debug, Clone)]
pub struct EngineSettings {
    /// Region of every instance.
    pub region: String,
    /// Zone of a launch that has hosts in several: the first that has room. The first zone of an account's subnets.
    pub zone: String,
    /// Public addresses come from here.
    pub public_pool: Ipv4Net,
    /// How long a released address stays unassigned.
    pub address_rest: Micros,
    /// What may come in to a new instance.
    pub ingress: Vec<IngressRule>,
    /// Longest time between two reports of an agent.
    pub report_every: Micros,
    /// A host that has not reported for so long is not placed on.
    pub alive_within: Micros,
    /// Proofs of life are made durable at most this often.
    pub proof_every: Micros,
    /// How long a worker may hold an instance.
    pub lease: Micros,
    /// How long a host may take to answer before a start fails.
    pub place_deadline: Micros,
    /// How long a start may take before it fails.
    pub launch_deadline: Micros,
    /// How long a stop or a termination may take before it is called trouble.
    pub stop_deadline: Micros,
    /// Longest time from a month's end to its seal.
    pub seal_after: Micros,
    /// How long a terminated instance stays visible.
    pub show_terminated: Micros,
    /// Volume type of root volumes, for their price.
    pub volume_type: String,
}

impl Default for EngineSettings {
    fn default() -> Self {
        let anywhere = Ipv4Net::default();
        Self {
            region: "home-1".to_owned(),
            zone: "home-1a".to_owned(),
            public_pool: Ipv4Net::new_assert(Ipv4Addr::new(100, 64, 0, 0), 16),
            address_rest: Micros::from_secs(300),
            ingress: vec![
                IngressRule { protocol: Protocol::Tcp, from_port: 22, to_port: 22, source: anywhere },
                IngressRule { protocol: Protocol::Icmp, from_port: 0, to_port: 0, source: anywhere },
            ],
            report_every: Micros::from_secs(5),
            alive_within: Micros::from_secs(20),
            proof_every: Micros::from_secs(10),
            lease: Micros::from_secs(5),
            place_deadline: Micros::from_secs(60),
            launch_deadline: Micros::from_secs(600),
            stop_deadline: Micros::from_secs(300),
            seal_after: Micros::from_secs(72 * 3600),
            show_terminated: Micros::from_secs(3600),
            volume_type: "gp3".to_owned(),
        }
    }
}
