//! Instances: launch, look, stop, start, reboot, resize, terminate.

use super::Tags;
use crate::agent::{MetadataOptions, StateReason, TimedPart};
use crate::ids::{
    AccountId, HostId, ImageId, InstanceId, InterfaceId, ReservationId, SubnetId, VolumeId, VpcId,
};
use crate::state::{InstanceState, Step};
use crate::time::Micros;
use crate::user_data::UserDataForm;
use serde::{Deserialize, Serialize};
use std::net::Ipv4Addr;

/// Launches instances.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunInstances {
    /// Image id or name.
    pub image: String,
    /// Instance type.
    pub instance_type: String,
    /// Fewest instances; with less room than that, none is launched.
    pub min_count: u32,
    /// Most instances, 1 to [`MAX_LAUNCH_COUNT`].
    pub max_count: u32,
    /// Key pair that may log in.
    #[serde(default)]
    pub key_name: Option<String>,
    /// Base64, at most [`MAX_USER_DATA`] bytes inside.
    #[serde(default)]
    pub user_data: Option<String>,
    /// Root volume in GiB; the image's own size if absent.
    #[serde(default)]
    pub volume_gib: Option<u64>,
    /// Tags; `Name` is shown in tables.
    #[serde(default)]
    pub tags: Tags,
    /// Options of the instances' metadata service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metadata_options: Option<MetadataOptions>,
    /// Repeating a call with the same token and parameters answers with the first call's instances.
    #[serde(default)]
    pub client_token: Option<String>,
    /// Check everything, do nothing.
    #[serde(default)]
    pub dry_run: bool,
}

/// What one launch made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reservation {
    /// Its id.
    pub reservation_id: ReservationId,
    /// Its instances, in launch order.
    pub instances: Vec<Instance>,
}

/// An instance as its owner sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instance {
    /// Its id.
    pub instance_id: InstanceId,
    /// Its account.
    pub account_id: AccountId,
    /// The launch that made it.
    pub reservation_id: ReservationId,
    /// Its number in that launch.
    pub launch_index: u32,
    /// Its state.
    pub state: InstanceState,
    /// The step that the controller is at.
    pub step: Step,
    /// Why it is in that state, where that is not plain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state_reason: Option<StateReason>,
    /// What is going wrong just now and being tried again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trouble: Option<String>,
    /// Its type.
    pub instance_type: String,
    /// Its virtual CPUs.
    pub vcpus: u32,
    /// Its memory in MiB.
    pub memory_mib: u64,
    /// Its image.
    pub image_id: ImageId,
    /// That image's name.
    pub image_name: String,
    /// The login that gets the key pair.
    pub default_user: String,
    /// Its key pair.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_name: Option<String>,
    /// Its host, while it holds capacity there or has volumes there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_id: Option<HostId>,
    /// Region.
    pub region: String,
    /// Availability zone.
    pub zone: String,
    /// Its network.
    pub vpc_id: VpcId,
    /// Its subnet.
    pub subnet_id: SubnetId,
    /// Its interface.
    pub interface_id: InterfaceId,
    /// Private address.
    pub private_ip: Ipv4Addr,
    /// Public address.
    pub public_ip: Ipv4Addr,
    /// Its root volume.
    pub root_volume_id: VolumeId,
    /// Size of that in GiB.
    pub root_volume_gib: u64,
    /// Tags.
    pub tags: Tags,
    /// When the launch was accepted.
    pub launched_at: Micros,
    /// When it last began to run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub running_since: Option<Micros>,
    /// Which start this is.
    pub incarnation: u64,
    /// Grows with every accepted change.
    pub generation: u64,
    /// The guest said that it is ready.
    pub guest_ready: bool,
    /// ed25519 host key line that the guest printed on its console.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ssh_host_key: Option<String>,
    /// Form of the user data that the guest did not run, by a line on its console.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_data_not_run: Option<UserDataForm>,
    /// Options of the instance's metadata service.
    #[serde(default, skip_serializing_if = "MetadataOptions::is_default")]
    pub metadata_options: MetadataOptions,
    /// Seconds that it has run, over all starts.
    pub used_seconds: u64,
    /// Seconds that are billed for it: the same with the 60 s minimum of every start.
    pub billed_seconds: u64,
}

/// Lists instances.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DescribeInstances {
    /// These, or all if empty. An unknown one is an error.
    #[serde(default)]
    pub instance_ids: Vec<String>,
    /// Terminated ones too.
    #[serde(default)]
    pub include_terminated: bool,
    /// Every account's. Administrators only.
    #[serde(default)]
    pub all_accounts: bool,
}

/// Instances.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instances {
    /// Oldest first.
    pub instances: Vec<Instance>,
}

/// Starts stopped instances. Those that are pending or running stay as they are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StartInstances {
    /// At least one.
    pub instance_ids: Vec<String>,
}

/// Stops running instances.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StopInstances {
    /// At least one.
    pub instance_ids: Vec<String>,
    /// Without asking the guest first.
    #[serde(default)]
    pub force: bool,
}

/// Reboots running instances: no new minimum, same addresses, same disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RebootInstances {
    /// At least one.
    pub instance_ids: Vec<String>,
}

/// Removes instances for good. Idempotent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TerminateInstances {
    /// At least one.
    pub instance_ids: Vec<String>,
}

/// What a call changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateChanges {
    /// In the order asked.
    pub changes: Vec<StateChange>,
}

/// One instance's change of state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateChange {
    /// The instance.
    pub instance_id: InstanceId,
    /// Before the call.
    pub previous: InstanceState,
    /// After it.
    pub current: InstanceState,
}

/// Gives a stopped instance another type.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModifyInstanceType {
    /// The instance.
    pub instance_id: String,
    /// Its new type.
    pub instance_type: String,
}

/// How long the parts of an instance's latest start took.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DescribeInstanceTiming {
    /// The instance.
    pub instance_id: String,
}

/// The parts of a start, in the order they happened: `api`, `store`, `placement`, `agent.*`, `monitor.*`, `guest`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceTiming {
    /// The instance.
    pub instance_id: InstanceId,
    /// The start.
    pub incarnation: u64,
    /// The parts.
    pub parts: Vec<TimedPart>,
}
