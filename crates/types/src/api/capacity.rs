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
    /// Troubles of the controller itself, a sentence each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub trouble: Vec<String>,
}

/// Ends an orphan: its host removes the instance and its disk. Administrators only.
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
    /// Sum of the sizes of the host's volumes in GiB, those of stopped instances included.
    #[serde(default)]
    pub claimed_disk_gib: u64,
    /// Instances that hold capacity.
    pub instances: u64,
    /// When its agent last reported.
    pub last_report_at: Micros,
    /// Whether that is recent enough to place on it.
    pub alive: bool,
    /// Troubles of the host itself that its agent reports, a sentence each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub trouble: Vec<String>,
    /// Orphans: instances on the host that the database does not have. Their CPU and memory are not
    /// placed again; their disk is not counted yet.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub orphans: Vec<Orphan>,
}
