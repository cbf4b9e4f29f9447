//! Volumes.

use crate::ids::{InstanceId, VolumeId};
use crate::state::VolumeState;
use crate::time::Micros;
use serde::{Deserialize, Serialize};

/// Lists volumes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DescribeVolumes {}

/// Volumes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volumes {
    /// Oldest first.
    pub volumes: Vec<Volume>,
}

/// A volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// Its id.
    pub volume_id: VolumeId,
    /// Its state.
    pub state: VolumeState,
    /// Its size in GiB.
    pub size_gib: u64,
    /// What it is attached to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance_id: Option<InstanceId>,
    /// When it was made.
    pub created_at: Micros,
}
