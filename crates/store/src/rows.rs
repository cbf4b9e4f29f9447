//! What the store holds, row by row.

use roost_types::agent::{HostFacts, IngressRule, MetadataOptions, Observed, StateReason, TimedPart};
use roost_types::api::{Account, Image, KeyPair, Tags};
use roost_types::metering::UsageEvent;
use roost_types::state::{DesiredState, InstanceState, Step, VolumeState};
use roost_types::{
    AccountId, BlobId, HostId, ImageId, InstanceId, InstanceType, InterfaceId, Micros, ReservationId,
    SubnetId, UserDataForm, VolumeId, VpcId,
};
use serde::{Deserialize, Serialize};
use std::net::Ipv4Addr;

/// An access key. The secret is sealed: the store never sees it open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AccessKeyRow {
    /// `AKIA…`.
    pub access_key_id: String,
    /// The account that signs with it.
    pub account_id: AccountId,
    /// The sealed secret.
    pub sealed_secret: Vec<u8>,
    /// When it was made.
    pub created_at: Micros,
    /// Whether it may sign.
    pub active: bool,
}

/// An account to be made, with its first key and its default network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewAccountRows {
    /// The account.
    pub account: Account,
    /// Its first access key.
    pub key: AccessKeyRow,
    /// Id for its default VPC, 172.31.0.0/16.
    pub vpc_id: VpcId,
    /// Zones and ids for the default subnet in each: the first zone gets 172.31.0.0/20, the next 172.31.16.0/20 …
    pub subnets: Vec<(String, SubnetId)>,
    /// Region of the VPC.
    pub region: String,
}

/// A subnet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubnetRow {
    /// Its id.
    pub subnet_id: SubnetId,
    /// Its VPC.
    pub vpc_id: VpcId,
    /// Its account.
    pub account_id: AccountId,
    /// Its zone.
    pub zone: String,
    /// First address of the block.
    pub network: Ipv4Addr,
    /// Prefix length, 16 to 28.
    pub prefix_len: u8,
    /// Whether a launch that names no subnet goes here.
    pub default_for_zone: bool,
}

/// An image with what only the host needs to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageRow {
    /// What users see.
    pub image: Image,
    /// Kernel.
    pub kernel: BlobId,
    /// Initial RAM disk.
    pub initrd: Option<BlobId>,
    /// Root disk.
    pub root: BlobId,
    /// Bytes of the root disk, uncompressed.
    pub root_bytes: u64,
    /// When it was withdrawn; instances made from it go on.
    pub deregistered_at: Option<Micros>,
}

/// An uploaded file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobRow {
    /// SHA-256 of its bytes as stored.
    pub blob_id: BlobId,
    /// Bytes as stored.
    pub bytes: u64,
    /// Account that uploaded the file.
    pub account_id: AccountId,
    /// When.
    pub created_at: Micros,
}

/// Result of giving up an uploaded file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Released {
    /// The account does not have the file.
    Absent,
    /// Nothing changed: an image of the account that is registered or has instances needs the file.
    Named,
    /// The account no longer has the file.
    Done,
}

/// A host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostRow {
    /// What it is and can hold, as its agent last said.
    pub facts: HostFacts,
    /// When its agent first said hello.
    pub registered_at: Micros,
    /// When its agent last reported; written at most every few seconds.
    pub last_report_at: Micros,
    /// Boot id of its last report.
    pub boot_id: Option<String>,
    /// Sum of its claims in milli-CPUs.
    pub claimed_cpu_milli: u64,
    /// Sum of its claims in MiB.
    pub claimed_memory_mib: u64,
    /// Number of its claims.
    pub claims: u64,
    /// Sum of the sizes of the host's volumes in GiB, those of stopped instances included.
    pub claimed_disk_gib: u64,
}

/// CPU and memory that an instance holds on a host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// The host.
    pub host_id: HostId,
    /// Milli-CPUs, at least 1.
    pub cpu_milli: u64,
    /// MiB, at least 1: guest memory and the monitor's overhead.
    pub memory_mib: u64,
}

/// A launch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReservationRow {
    /// Its id.
    pub reservation_id: ReservationId,
    /// Its account.
    pub account_id: AccountId,
    /// When it was accepted.
    pub created_at: Micros,
}

/// What an agent was last seen to say of an instance, with times by the controller's clock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// The state.
    pub state: Observed,
    /// Newest generation that the agent has accepted.
    pub generation: u64,
    /// The incarnation it speaks of.
    pub incarnation: u64,
    /// Boot of the host.
    pub boot_id: String,
    /// When the state began.
    pub since: Micros,
    /// When the virtual CPUs began to run.
    pub run_began: Option<Micros>,
    /// When they ended, if anybody saw it.
    pub run_ended: Option<Micros>,
    /// When an agent last saw it alive; kept once it is not.
    pub last_seen: Option<Micros>,
    /// The agent's reason.
    pub reason: Option<StateReason>,
    /// The agent refuses our newest spec.
    pub refused: Option<String>,
    /// What fails on the host just now.
    pub trouble: Option<String>,
    /// The guest said that it is ready.
    pub guest_ready: bool,
    /// When that was first heard.
    pub guest_ready_at: Option<Micros>,
    /// Host key line of the guest.
    pub ssh_host_key: Option<String>,
    /// User data that the guest did not run.
    #[serde(default)]
    pub user_data_not_run: Option<UserDataForm>,
}

/// How long the parts of the latest start took.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Timing {
    /// The start.
    pub incarnation: u64,
    /// The controller's own parts: `api`, `store`, `placement`.
    pub controller: Vec<TimedPart>,
    /// The agent's and the monitor's, as reported.
    pub host: Vec<TimedPart>,
    /// From running to the guest's word that it is ready.
    pub guest: Option<TimedPart>,
}

/// An instance, as far as its own row goes. Its lease is not here: it is taken by [`crate::Store::lease`] and
/// given back by [`Change::release_lease`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstanceRow {
    /// Its id.
    pub instance_id: InstanceId,
    /// Its tenant.
    pub account_id: AccountId,
    /// Who asked for it (the account's name, until accounts have users).
    pub owner: String,
    /// Region.
    pub region: String,
    /// Availability zone.
    pub zone: String,
    /// The launch that made it.
    pub reservation_id: ReservationId,
    /// Number in that launch, from 0.
    pub launch_index: u32,
    /// When the launch was accepted.
    pub launched_at: Micros,
    /// What its owner wants of it.
    pub desired: DesiredState,
    /// What the controller is doing about it.
    pub step: Step,
    /// Since when.
    pub step_since: Micros,
    /// What its agent last said.
    pub observed: Option<Seen>,
    /// Why it is in its state.
    pub state_reason: Option<StateReason>,
    /// What goes wrong just now.
    pub trouble: Option<String>,
    /// Grows with every accepted change; one generation has one spec.
    pub generation: u64,
    /// Which start this is, from 1.
    pub incarnation: u64,
    /// When this start was accepted: nothing that an agent says of it dates before.
    pub incarnation_at: Micros,
    /// Reboots asked for in this incarnation.
    pub reboots: u64,
    /// Stop without asking the guest.
    pub force: bool,
    /// The host that has its volume.
    pub host_id: Option<HostId>,
    /// Boot of that host under which this incarnation was first seen.
    pub boot_id: Option<String>,
    /// Beginning of the usage interval that is open now.
    pub open_since: Option<Micros>,
    /// When it last began to run.
    pub running_since: Option<Micros>,
    /// Sequence of the event that opens the open interval: 0, 2 for the second part of this start,
    /// and so on.
    pub segment: u64,
    /// Whether this start continues the one before: the host rebooted, and nobody asked for a
    /// start.
    pub continues: bool,
    /// When its end was asked for: an open interval ends here at the latest.
    pub bill_until: Option<Micros>,
    /// Fruitless runs of this step.
    pub tries: u32,
    /// Not to be swept before.
    pub not_before: Micros,
    /// When this step becomes trouble.
    pub deadline: Option<Micros>,
    /// Its type as it was when accepted: editing the catalogue changes no running instance.
    pub instance_type: InstanceType,
    /// Its image.
    pub image_id: ImageId,
    /// That image's name at launch.
    pub image_name: String,
    /// The login that gets the key.
    pub default_user: String,
    /// Its key pair's name.
    pub key_name: Option<String>,
    /// Public keys, name and OpenSSH line, copied at launch.
    pub public_keys: Vec<(String, String)>,
    /// Base64, as given.
    pub user_data: Option<String>,
    /// Tags.
    pub tags: Tags,
    /// Options of the instance's metadata service.
    pub metadata_options: MetadataOptions,
    /// The client token of its launch.
    pub client_token: Option<String>,
    /// Timing of its latest start.
    pub timing: Timing,
    /// When nothing of it was left.
    pub terminated_at: Option<Micros>,
    /// Counts every write of this row: what [`crate::Store::commit`] compares.
    pub revision: u64,
}

impl InstanceRow {
    /// The state that its owner sees.
    pub fn state(&self) -> InstanceState {
        self.step.state()
    }
}

/// A network interface. Released addresses may be given to another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InterfaceRow {
    /// Its id.
    pub interface_id: InterfaceId,
    /// Its account.
    pub account_id: AccountId,
    /// Its VPC.
    pub vpc_id: VpcId,
    /// Its subnet.
    pub subnet_id: SubnetId,
    /// The instance it belongs to.
    pub instance_id: InstanceId,
    /// Hardware address.
    pub mac: String,
    /// Private address.
    pub private_ip: Ipv4Addr,
    /// Prefix length of the subnet.
    pub prefix_len: u8,
    /// The subnet's router.
    pub gateway: Ipv4Addr,
    /// Public address.
    pub public_ip: Ipv4Addr,
    /// What may come in.
    pub ingress: Vec<IngressRule>,
    /// When its addresses were given back.
    pub released_at: Option<Micros>,
}

/// A volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeRow {
    /// Its id.
    pub volume_id: VolumeId,
    /// Its account.
    pub account_id: AccountId,
    /// Its zone.
    pub zone: String,
    /// The host that has it.
    pub host_id: Option<HostId>,
    /// What it is attached to.
    pub instance_id: Option<InstanceId>,
    /// Its state.
    pub state: VolumeState,
    /// Its type, such as `gp3`.
    pub volume_type: String,
    /// Its size in GiB.
    pub size_gib: u64,
    /// Whether it goes with its instance.
    pub delete_on_termination: bool,
    /// When it was made.
    pub created_at: Micros,
    /// Whether its usage interval is open.
    pub metered: bool,
}

/// An instance with its rows of other tables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstanceRecord {
    /// Itself.
    pub row: InstanceRow,
    /// Its network interface.
    pub interface: InterfaceRow,
    /// Its root volume.
    pub volume: VolumeRow,
}

/// What a launch writes, all or nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// The reservation.
    pub reservation: ReservationRow,
    /// Client token and hash of the parameters.
    pub token: Option<(String, String)>,
    /// The instances, in launch order, each on its host.
    pub instances: Vec<NewInstance>,
    /// Public addresses come from here: network and prefix length.
    pub public_pool: (Ipv4Addr, u8),
    /// How long a released address stays unassigned.
    pub address_rest: Micros,
}

/// One instance of a launch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewInstance {
    /// Its row; `host_id` is the claimed host.
    pub row: InstanceRow,
    /// What it takes of that host.
    pub claim: Claim,
    /// Id of its interface, whose addresses the store allots.
    pub interface_id: InterfaceId,
    /// Hardware address of that.
    pub mac: String,
    /// What may come in there.
    pub ingress: Vec<IngressRule>,
    /// Its subnet.
    pub subnet_id: SubnetId,
    /// Its root volume.
    pub volume_id: VolumeId,
    /// Type of that.
    pub volume_type: String,
    /// Size of that in GiB.
    pub volume_gib: u64,
}

/// What became of a launch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Launched {
    /// It was written.
    New(Vec<InstanceRecord>),
    /// Its client token was used before: nothing was written.
    Repeated {
        /// Hash of the first call's parameters.
        parameter_hash: String,
        /// What the first call made.
        reservation_id: ReservationId,
    },
}

/// What happens to an instance's claim.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum ClaimChange {
    /// It stays as it is.
    #[default]
    Keep,
    /// It is taken; it must fit.
    Take(Claim),
    /// Claims without a check of room: the claimed object exists already.
    Hold(Claim),
    /// It is given back; giving back none is fine.
    Release,
}

/// One change of one instance with all that belongs to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The row as it shall be. Its `revision` is the one that was read; the written one is one higher.
    pub row: InstanceRow,
    /// Its claim.
    pub claim: ClaimChange,
    /// Events for the usage log. An event that is there already, the same, is skipped.
    pub usage: Vec<UsageEvent>,
    /// Until when it was seen running. Proofs only grow.
    pub proof: Option<Micros>,
    /// New state of its root volume.
    pub volume: Option<VolumeState>,
    /// Gives its addresses back.
    pub release_addresses: bool,
    /// Gives the row's lease back.
    pub release_lease: bool,
}

impl Change {
    /// A change of nothing but the row.
    pub fn of(row: InstanceRow) -> Self {
        Self {
            row,
            claim: ClaimChange::Keep,
            usage: Vec::new(),
            proof: None,
            volume: None,
            release_addresses: false,
            release_lease: false,
        }
    }
}

/// Which instances to list.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct InstanceFilter {
    /// Of this account.
    pub account_id: Option<AccountId>,
    /// Of this reservation.
    pub reservation_id: Option<ReservationId>,
    /// On this host.
    pub host_id: Option<HostId>,
    /// Gone ones too, if they are gone since this time at the earliest.
    pub gone_since: Option<Micros>,
}

/// Which usage events to read.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct UsageFilter {
    /// Of this account.
    pub account_id: Option<AccountId>,
    /// Of this resource.
    pub resource: Option<String>,
}

/// A key pair with its owner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyPairRow {
    /// Its account.
    pub account_id: AccountId,
    /// What users see.
    pub key_pair: KeyPair,
}
