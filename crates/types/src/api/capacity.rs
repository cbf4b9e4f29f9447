//! What there is to launch on: instance types with their prices, and hosts.

use crate::agent::{HostFacts, Orphan};
use crate::instance_type::InstanceType;
use crate::money::{Currency, Money};
use crate::time::Micros;
use serde::{Deserialize, Serialize};

/// Lists instance types.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DescribeInstanceTypes {}

/// Instance types with their prices.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceTypes {
    /// By family and size.
    pub instance_types: Vec<PricedType>,
    /// Currency of the prices.
    pub currency: Currency,
}

/// An instance type, what it costs now, and whether it can run here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PricedType {
    /// The type.
    #[serde(flatten)]
    pub instance_type: InstanceType,
    /// For one hour.
    pub price_per_hour: Option<Money>,
    /// Why no host here can hold it, even empty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unsupported: Option<String>,
}

/// Lists hosts. Administrators only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DescribeHosts {}

/// Hosts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hosts {
    /// By name.
    pub hosts: Vec<HostView>,
    /// What is wrong with the controller itself, a sentence each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub trouble: Vec<String>,
}

/// Ends an orphan: its host removes it and its disk. Administrators only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EndOrphan {
    /// The instance.
    pub instance_id: String,
}

/// A host and how full it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostView {
    /// What it is and can hold.
    pub facts: HostFacts,
    /// Claimed CPU, in milli-CPUs.
    pub claimed_cpu_milli: u64,
    /// Claimed memory in MiB.
    pub claimed_memory_mib: u64,
    /// Size of the volumes on it in GiB, those of stopped instances too.
    #[serde(default)]
    pub claimed_disk_gib: u64,
    /// Instances that hold capacity.
    pub instances: u64,
    /// When its agent last reported.
    pub last_report_at: Micros,
    /// Whether that is recent enough to place on it.
    pub alive: bool,
    /// What its agent says is wrong with the host itself, a sentence each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub trouble: Vec<String>,
    /// Instances that the host has and the database does not know. Their room is given to no other.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub orphans: Vec<Orphan>,
}
