//! CLI ↔ controller: `POST /v1/ACTION` with a JSON body, signed with SigV4 (service `roost`).
//!
//! Names are EC2's. A failure is an [`crate::error::ErrorBody`] with EC2's code. Besides the actions:
//!
//! ```text
//! PUT /v1/blobs/BLOB                                     upload a zstd-compressed file; BLOB = its SHA-256, signed
//! HEAD /v1/blobs/BLOB                                    is it there already?
//! GET /v1/instances/ID/console?offset=N&follow=B&input=B (Upgrade: roost-stream)  as StreamTarget::Console
//! GET /v1/instances/ID/tcp/PORT                          (Upgrade: roost-stream)  as StreamTarget::Tcp
//! GET /v1/health                                         unsigned: is the controller up?
//! ```

use crate::agent::{HostFacts, StateReason, TimedPart};
use crate::ids::{
    AccountId, BlobId, HostId, ImageId, InstanceId, InterfaceId, KeyPairId, ReservationId, SubnetId,
    VolumeId, VpcId,
};
use crate::instance_type::InstanceType;
use crate::money::{Currency, Money};
use crate::state::{InstanceState, Step, UnknownName, VolumeState, named_enum};
use crate::time::Micros;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

/// Most instances that one launch may ask for.
pub const MAX_LAUNCH_COUNT: u32 = 1000;
/// Most bytes of user data before base64, as on EC2.
pub const MAX_USER_DATA: usize = 16 * 1024;
/// Service name in the credential scope of a signature.
pub const SIGNING_SERVICE: &str = "roost";

/// An action: its name on the wire, its request and its response.
pub trait Action: Serialize + for<'de> Deserialize<'de> {
    /// The last segment of the path.
    const NAME: &'static str;
    /// What a success answers.
    type Response: Serialize + for<'de> Deserialize<'de>;
}

macro_rules! actions {
    ($($request:ident => $response:ty;)*) => {
        $(impl Action for $request {
            const NAME: &'static str = stringify!($request);
            type Response = $response;
        })*
        /// Every action there is.
        pub const ACTIONS: &[&str] = &[$(stringify!($request)),*];
    };
}

actions! {
    GetCallerIdentity => CallerIdentity;
    CreateAccount => NewAccount;
    DescribeAccounts => Accounts;
    CreateKeyPair => NewKeyPair;
    ImportKeyPair => KeyPair;
    DescribeKeyPairs => KeyPairs;
    DeleteKeyPair => Done;
    RegisterImage => Image;
    DescribeImages => Images;
    DeregisterImage => Done;
    DescribeInstanceTypes => InstanceTypes;
    DescribeHosts => Hosts;
    RunInstances => Reservation;
    DescribeInstances => Instances;
    StartInstances => StateChanges;
    StopInstances => StateChanges;
    RebootInstances => Done;
    TerminateInstances => StateChanges;
    ModifyInstanceType => Done;
    DescribeInstanceTiming => InstanceTiming;
    DescribeVolumes => Volumes;
    GetBill => Bill;
}

/// Tags of a resource.
pub type Tags = BTreeMap<String, String>;

/// Nothing to say but that it is done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {}

/// Who am I?
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GetCallerIdentity {}

/// Who the caller is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallerIdentity {
    /// The account.
    pub account_id: AccountId,
    /// Its name.
    pub account_name: String,
    /// Whether it may make accounts, register images and see every account's bill.
    pub admin: bool,
    /// Region of the controller.
    pub region: String,
}

/// Makes an account with an access key. Administrators only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateAccount {
    /// 1 to 64 characters of `a-z A-Z 0-9 . _ -`; unique.
    pub name: String,
    /// Whether it may administrate.
    #[serde(default)]
    pub admin: bool,
}

/// A new account; the secret is shown this once.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewAccount {
    /// The account.
    pub account: Account,
    /// `AKIA…`.
    pub access_key_id: String,
    /// 40 characters.
    pub secret_access_key: String,
}

impl fmt::Debug for NewAccount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NewAccount")
            .field("account", &self.account)
            .field("access_key_id", &self.access_key_id)
            .finish_non_exhaustive()
    }
}

/// An account.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Account {
    /// Twelve digits.
    pub account_id: AccountId,
    /// Its name.
    pub name: String,
    /// Whether it may administrate.
    pub admin: bool,
    /// When it was made.
    pub created_at: Micros,
}

/// Lists accounts. Administrators see all, others their own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DescribeAccounts {}

/// Accounts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accounts {
    /// By name.
    pub accounts: Vec<Account>,
}

/// Makes an ed25519 key pair.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateKeyPair {
    /// 1 to 255 printable characters; unique in the account.
    pub key_name: String,
}

/// A new key pair; the private key is shown this once and not kept.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewKeyPair {
    /// The key pair.
    pub key_pair: KeyPair,
    /// OpenSSH private key (PEM).
    pub private_key: String,
}

impl fmt::Debug for NewKeyPair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NewKeyPair").field("key_pair", &self.key_pair).finish_non_exhaustive()
    }
}

/// Imports a public key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImportKeyPair {
    /// 1 to 255 printable characters; unique in the account.
    pub key_name: String,
    /// One OpenSSH line (`ssh-ed25519 …`).
    pub public_key: String,
}

/// A key pair as the controller knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyPair {
    /// Its id.
    pub key_pair_id: KeyPairId,
    /// Its name.
    pub key_name: String,
    /// `SHA256:…`.
    pub fingerprint: String,
    /// OpenSSH public key line.
    pub public_key: String,
    /// When it was made or imported.
    pub created_at: Micros,
}

/// Lists key pairs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DescribeKeyPairs {}

/// Key pairs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyPairs {
    /// By name.
    pub key_pairs: Vec<KeyPair>,
}

/// Forgets a key pair; instances that have it keep it. Idempotent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeleteKeyPair {
    /// Its name.
    pub key_name: String,
}

/// Makes an image of uploaded blobs. Administrators' images are public, others' are their own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegisterImage {
    /// Unique in the account.
    pub name: String,
    /// A sentence.
    #[serde(default)]
    pub description: String,
    /// Uploaded kernel.
    pub kernel: BlobId,
    /// Uploaded initial RAM disk.
    #[serde(default)]
    pub initrd: Option<BlobId>,
    /// Uploaded raw root disk.
    pub root: BlobId,
    /// Size of the root disk in bytes, uncompressed.
    pub root_bytes: u64,
    /// Kernel command line.
    pub boot_args: String,
    /// The login that gets the key pair.
    pub default_user: String,
}

/// An image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Its id.
    pub image_id: ImageId,
    /// Its owner.
    pub owner: AccountId,
    /// Its name.
    pub name: String,
    /// A sentence.
    pub description: String,
    /// Whether every account may launch it.
    pub public: bool,
    /// Smallest root volume, in GiB.
    pub min_volume_gib: u64,
    /// Kernel command line.
    pub boot_args: String,
    /// The login that gets the key pair.
    pub default_user: String,
    /// When it was registered.
    pub created_at: Micros,
}

/// Lists images that the caller may launch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DescribeImages {}

/// Images.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Images {
    /// By name.
    pub images: Vec<Image>,
}

/// Withdraws an image: nothing new can be launched from it; what runs goes on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeregisterImage {
    /// Its id or its name.
    pub image: String,
}

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
    /// Instances that hold capacity.
    pub instances: u64,
    /// When its agent last reported.
    pub last_report_at: Micros,
    /// Whether that is recent enough to place on it.
    pub alive: bool,
}

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

/// Starts stopped instances.
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

named_enum! {
    /// What a bill is grouped by.
    BillBy, "bill grouping" {
        /// One line per resource.
        Instance = "instance",
        /// One line per account.
        Account = "account",
        /// One line per instance type or volume type.
        Type = "type",
        /// One line per day, UTC.
        Day = "day",
    }
}

/// Computes a bill from the usage log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GetBill {
    /// From here; the beginning of this month, UTC, if absent.
    #[serde(default)]
    pub since: Option<Micros>,
    /// Up to here; now if absent.
    #[serde(default)]
    pub until: Option<Micros>,
    /// Grouping.
    pub by: BillBy,
    /// Every account's. Administrators only.
    #[serde(default)]
    pub all_accounts: bool,
}

/// A bill. The sum of the lines is the total, exactly.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bill {
    /// From here.
    pub since: Micros,
    /// Up to here.
    pub until: Micros,
    /// Currency of every amount.
    pub currency: Currency,
    /// The lines.
    pub lines: Vec<BillLine>,
    /// Their sum.
    pub total: Money,
}

/// One line of a bill.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BillLine {
    /// What the line is about: a resource, an account, a type or a day.
    pub group: String,
    /// `instance-seconds` or `volume-gib-seconds`.
    pub meter: String,
    /// Instance type or volume type; empty where the group holds several.
    pub sku: String,
    /// Units that were used.
    #[serde(with = "text_u128")]
    pub used: u128,
    /// Units that are charged: used, and the 60 s minimum of every start.
    #[serde(with = "text_u128")]
    pub billed: u128,
    /// The charge.
    pub amount: Money,
}

mod text_u128 {
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(value: &u128, out: S) -> Result<S::Ok, S::Error> {
        out.serialize_str(&value.to_string())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(input: D) -> Result<u128, D::Error> {
        String::deserialize(input)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_parameter_is_refused_by_name() {
        let error = serde_json::from_str::<StopInstances>(r#"{"instance_ids":[],"fore":true}"#).unwrap_err();
        assert!(error.to_string().contains("`fore`"), "{error}");
    }

    #[test]
    fn secrets_do_not_show_in_debug_output() {
        let account = NewAccount {
            account: Account {
                account_id: "123456789012".parse().unwrap(),
                name: "a".into(),
                admin: false,
                created_at: Micros(0),
            },
            access_key_id: "AKIA".into(),
            secret_access_key: "hush".into(),
        };
        assert!(!format!("{account:?}").contains("hush"));
    }
}
