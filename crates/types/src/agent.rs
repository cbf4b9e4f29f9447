//! Controller ↔ agent, HTTP/JSON over mTLS. The agent always dials.
//!
//! ```text
//! agent ── POST /agent/v1/hello     HelloRequest   ─→ HelloResponse      once per connection to a controller
//!       ── GET  /agent/v1/desired?after=VERSION    ─→ Desired            long poll: the whole truth for this host
//!       ── POST /agent/v1/observed  Report         ─→ ReportAck          at once on a change, and every few seconds
//!       ── GET  /agent/v1/requests                 ─→ Vec<HostRequest>   long poll: open a stream
//!       ── GET  /agent/v1/blobs/BLOB               ─→ bytes (zstd)       images
//!       ── GET  /agent/v1/streams/STREAM (Upgrade) ─→ raw bytes          console, tunnels
//! ```
//! `Desired` is level-triggered: it says what the host must look like, over and over; the agent makes it so.
//! Each instance carries a generation. An older generation than the agent has seen is refused, and so is another
//! spec under the same generation; both come back as a refusal in the report.
//! Times travel as ages: how long before the report was sent something happened, on CLOCK_BOOTTIME, beside the
//! boot id, so that no two wall clocks are ever compared.

use crate::ids::{AccountId, BlobId, HostId, ImageId, InstanceId, InterfaceId, ReservationId, VolumeId};
use crate::state::{DesiredState, UnknownName, named_enum};
use crate::user_data::UserDataForm;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

/// The version of this protocol; a controller refuses an agent of another one by name.
pub const PROTOCOL: u32 = 1;

/// What an agent says first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HelloRequest {
    /// [`PROTOCOL`].
    pub protocol: u32,
    /// The program's version.
    pub version: String,
    /// What the host can hold.
    pub host: HostFacts,
}

/// What a host is and can hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFacts {
    /// The host's own id, made once and kept in its state folder; must match its certificate.
    pub host_id: HostId,
    /// The host's name, for people.
    pub hostname: String,
    /// Availability zone that the host stands in.
    pub zone: String,
    /// Logical CPUs.
    pub cpus: u32,
    /// CPU that instances may claim, in milli-CPUs (CPUs × 1000 × the owner's overcommit).
    pub cpu_milli: u64,
    /// Memory that instances may claim, in MiB: the host's memory less what it keeps for itself.
    pub memory_mib: u64,
    /// Disk that volumes may claim by their full size, in GiB (what is free for them × the owner's
    /// overcommit).
    pub disk_gib: u64,
    /// Most vCPUs that one instance can have here.
    pub max_vcpus: u32,
    /// Overhead in MiB that the monitor takes beside guest memory, as measured; counted in every claim.
    pub overhead_mib: u64,
    /// GPUs.
    #[serde(default)]
    pub gpus: u32,
}

/// The controller's welcome.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HelloResponse {
    /// Longest time between two reports, in milliseconds.
    pub report_every_ms: u64,
}

/// What a host must look like.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Desired {
    /// Changes whenever anything below does; the next long poll passes it as `after`.
    pub version: u64,
    /// Every instance that the controller has placed on this host and that is not gone.
    pub instances: Vec<Ensure>,
    /// Orphans to end: the agent removes them with their disks.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub end: Vec<InstanceId>,
}

/// One `ensure(id, generation, spec)`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ensure {
    /// The instance.
    pub instance_id: InstanceId,
    /// Grows with every accepted change.
    pub generation: u64,
    /// What to make of it.
    pub spec: InstanceSpec,
    /// The root volume was made before, as the controller knows: the agent must not make it again.
    /// Not part of the spec: the value may change within one generation.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub volume_made: bool,
}

/// Everything that a host needs to know about an instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceSpec {
    /// The tenant.
    pub account: AccountId,
    /// What it must be: `running`, `stopped` (disk and addresses stay) or `terminated` (nothing stays).
    pub desired: DesiredState,
    /// Which start this is; 1 for the first. A new one takes a new monitor.
    pub incarnation: u64,
    /// Reboots asked for in this incarnation; the agent reboots when it grows past what it has done.
    pub reboots: u64,
    /// Stop without asking the guest first.
    pub force: bool,
    /// Its processor.
    pub cpu: CpuSpec,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// What it boots.
    pub image: ImageSpec,
    /// Its root disk.
    pub root_volume: VolumeSpec,
    /// Its network interface.
    pub interface: InterfaceSpec,
    /// What the metadata service tells the guest.
    pub metadata: MetadataSpec,
}

/// Processor of an instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuSpec {
    /// The family, which names the cgroup above the instance's own.
    pub family: String,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// `cpu.max` in milli-CPUs.
    pub max_milli: u32,
    /// `cpu.weight`, 1 to 10000.
    pub weight: u32,
    /// CPU credits earned per hour, in thousandths of a credit, for burstable types.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credits_per_hour_milli: Option<u32>,
}

/// What an instance boots. Blobs are zstd-compressed files, fetched from the controller and kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageSpec {
    /// The image.
    pub image_id: ImageId,
    /// Kernel: ELF vmlinux or bzImage.
    pub kernel: BlobId,
    /// Initial RAM disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<BlobId>,
    /// Raw root disk, the read-only base of every volume made from it.
    pub root: BlobId,
    /// Kernel command line.
    pub boot_args: String,
    /// Unpacked size of the root disk in bytes, which is the host's limit. Not part of the spec's
    /// comparison.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root_bytes: Option<u64>,
}

/// A volume: a qcow2 overlay on the image's root disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeSpec {
    /// The volume.
    pub volume_id: VolumeId,
    /// Virtual size in GiB; at least the image's.
    pub size_gib: u64,
    /// Removed when the instance terminates.
    pub delete_on_termination: bool,
}

/// A network interface and its addresses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterfaceSpec {
    /// The interface.
    pub interface_id: InterfaceId,
    /// Its hardware address, `06:…`.
    pub mac: String,
    /// Private address, in its subnet; tenants' addresses may overlap.
    pub private_ip: Ipv4Addr,
    /// Prefix length of the subnet.
    pub prefix_len: u8,
    /// The subnet's router, its first address.
    pub gateway: Ipv4Addr,
    /// Public address, unique, mapped 1:1.
    pub public_ip: Ipv4Addr,
    /// What may come in; replies and everything out may pass.
    pub ingress: Vec<IngressRule>,
}

/// A rule of a security group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IngressRule {
    /// `tcp`, `udp` or `icmp`.
    pub protocol: Protocol,
    /// First port; ignored for icmp.
    pub from_port: u16,
    /// Last port; ignored for icmp.
    pub to_port: u16,
    /// Sources.
    pub source: ipnet::Ipv4Net,
}

named_enum! {
    /// An IP protocol that rules name.
    Protocol, "protocol" {
        /// TCP.
        Tcp = "tcp",
        /// UDP.
        Udp = "udp",
        /// ICMP.
        Icmp = "icmp",
    }
}

/// What the metadata service at 169.254.169.254 tells the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MetadataSpec {
    /// The launch that it came from.
    pub reservation_id: ReservationId,
    /// Its number in that launch, from 0.
    pub launch_index: u32,
    /// Host name of the guest.
    pub hostname: String,
    /// Name of the instance type.
    pub instance_type: String,
    /// Region.
    pub region: String,
    /// Availability zone.
    pub zone: String,
    /// Public keys: name and OpenSSH line.
    pub public_keys: Vec<(String, String)>,
    /// User data as given, base64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_data: Option<String>,
    /// Tags.
    pub tags: BTreeMap<String, String>,
    /// Options of the metadata service.
    #[serde(default, skip_serializing_if = "MetadataOptions::is_default")]
    pub options: MetadataOptions,
}

named_enum! {
    /// Whether a request to the metadata service needs a session token.
    HttpTokens, "value of http_tokens" {
        /// Requests with and without a token are answered (IMDSv1 and IMDSv2).
        Optional = "optional",
        /// Requests need a token (IMDSv2 only).
        Required = "required",
    }
}

named_enum! {
    /// Whether the metadata service answers at all.
    HttpEndpoint, "value of http_endpoint" {
        /// The service answers.
        Enabled = "enabled",
        /// The service refuses every request: the guest gets no keys, no name and no user data.
        Disabled = "disabled",
    }
}

/// Options of an instance's metadata service, as EC2's `MetadataOptions`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MetadataOptions {
    /// Session tokens.
    pub http_tokens: HttpTokens,
    /// Whether the service answers.
    pub http_endpoint: HttpEndpoint,
}

impl Default for MetadataOptions {
    fn default() -> Self {
        Self { http_tokens: HttpTokens::Optional, http_endpoint: HttpEndpoint::Enabled }
    }
}

impl MetadataOptions {
    /// Returns true for the options of a launch that names none.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// What an agent sees, all of it, at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The host.
    pub host: HostFacts,
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
    /// One run of the agent: random at its start.
    pub agent_run: String,
    /// Every instance that the agent knows of.
    pub instances: Vec<Observation>,
    /// Current troubles of the host itself for its owner: at most 32 sentences of at most 512 bytes
    /// each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub trouble: Vec<String>,
    /// Instances on the host that the newest [`Desired`] does not name: at most 1024.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub orphans: Vec<Orphan>,
    /// The agent stops, and this is the last that it says: it must not be lost, as it may be the end of the bill.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub last: bool,
}

/// An instance that the host has and the database does not: the database came from a backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Orphan {
    /// The instance.
    pub instance_id: InstanceId,
    /// The tenant.
    pub account: AccountId,
    /// Name of its type.
    pub instance_type: String,
    /// Claimed CPU in milli-CPUs.
    pub cpu_milli: u64,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// State that its agent observes.
    pub state: Observed,
}

impl Orphan {
    /// Converts an instance to an orphan.
    pub fn of(ensure: &Ensure, state: Observed) -> Self {
        let spec = &ensure.spec;
        Self {
            instance_id: ensure.instance_id.clone(),
            account: spec.account.clone(),
            instance_type: spec.metadata.instance_type.clone(),
            // `cpu.weight` is 100 for one claimed CPU.
            cpu_milli: u64::from(spec.cpu.weight) * 10,
            memory_mib: spec.memory_mib,
            state,
        }
    }
}

/// Most orphans in [`Report::orphans`].
pub const ORPHANS: usize = 1024;
/// Most sentences in [`Report::trouble`].
pub const TROUBLES: usize = 32;
/// Longest sentence in [`Report::trouble`], in bytes.
pub const SENTENCE_BYTES: usize = 512;

/// Cuts a sentence to [`SENTENCE_BYTES`] at the end of a character.
pub fn bounded(sentence: &str) -> String {
    sentence[..sentence.floor_char_boundary(SENTENCE_BYTES)].to_owned()
}

named_enum! {
    /// What an agent sees of an instance.
    Observed, "observed state" {
        /// Work towards `running` goes on.
        Preparing = "preparing",
        /// Its virtual CPUs run.
        Running = "running",
        /// The guest was asked to stop, or the host is clearing up.
        Stopping = "stopping",
        /// No monitor, no cgroup, no tap; disk and addresses stay.
        Stopped = "stopped",
        /// Nothing is left.
        Absent = "absent",
        /// It could not be made to run; `reason` says why. Nothing but its disk is left.
        Failed = "failed",
    }
}

/// One instance as its agent sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Observation {
    /// The instance.
    pub instance_id: InstanceId,
    /// The newest generation that the agent has accepted.
    pub generation: u64,
    /// The incarnation that this is about.
    pub incarnation: u64,
    /// What it sees.
    pub state: Observed,
    /// Why, for `failed` and for a `stopped` that nobody asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<StateReason>,
    /// How long ago this state began, in microseconds.
    pub age_us: u64,
    /// How long ago this incarnation's virtual CPUs began to run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run_began_age_us: Option<u64>,
    /// How long ago they ended, where an agent saw it or has the monitor's own durable word for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run_ended_age_us: Option<u64>,
    /// How long ago an agent last saw this incarnation alive (durably recorded), this boot of the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_seen_age_us: Option<u64>,
    /// Refusal of the newest `ensure`: an older generation, or another spec under the same one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
    /// A step that fails and is being tried again: what failed last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trouble: Option<String>,
    /// The guest said that it is ready (a line on its console); a status check, not a state.
    pub guest_ready: bool,
    /// ed25519 host key line that the guest printed on its console.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ssh_host_key: Option<String>,
    /// Form of the user data that the guest did not run, by a line on its console.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_data_not_run: Option<UserDataForm>,
    /// CPU time that the instance has used in this incarnation, from `cpu.stat`, microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_usage_us: Option<u64>,
    /// How long each part of the latest start took.
    pub timing: Vec<TimedPart>,
}

impl Observation {
    /// The bare word: in this state as of now, and nothing else is known.
    pub const fn new(instance_id: InstanceId, generation: u64, incarnation: u64, state: Observed) -> Self {
        Self {
            instance_id,
            generation,
            incarnation,
            state,
            reason: None,
            age_us: 0,
            run_began_age_us: None,
            run_ended_age_us: None,
            last_seen_age_us: None,
            refused: None,
            trouble: None,
            guest_ready: false,
            ssh_host_key: None,
            user_data_not_run: None,
            cpu_usage_us: None,
            timing: Vec::new(),
        }
    }
}

/// Why a state was reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateReason {
    /// EC2-like code such as `Client.InstanceInitiatedShutdown` or `Server.InternalError`.
    pub code: String,
    /// A sentence.
    pub message: String,
}

/// One part of a start and how long it took.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimedPart {
    /// Such as `agent.network` or `monitor.build`.
    pub part: String,
    /// Microseconds.
    pub took_us: u64,
}

/// The controller's answer to a report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReportAck {
    /// The version of `Desired` that is current.
    pub version: u64,
}

/// Something that the controller wants of an agent now, on behalf of a waiting user.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostRequest {
    /// The stream to dial: `/agent/v1/streams/STREAM`, with `Upgrade: roost-stream`.
    pub stream: String,
    /// The instance.
    pub instance_id: InstanceId,
    /// What to connect it to.
    pub target: StreamTarget,
}

/// What a stream is connected to on the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum StreamTarget {
    /// Console output from an absolute offset of the stream of all bytes ever written; follows until closed if
    /// `follow`, else ends at what there is. With `input`, bytes sent the other way are typed into the console.
    /// The agent first sends one JSON line, [`ConsoleHeader`], then raw bytes.
    Console {
        /// Where to begin; the ring holds the last 64 KiB.
        offset: u64,
        /// Go on with what comes.
        follow: bool,
        /// Type what is received.
        input: bool,
    },
    /// A TCP connection to a port of the instance's private address, from inside its network namespace.
    /// The agent first sends one JSON line, [`TunnelHeader`].
    Tcp {
        /// 1 to 65535.
        port: u16,
    },
}

/// First line of a console stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleHeader {
    /// Offset of the first byte that follows.
    pub offset: u64,
    /// Bytes between the wanted offset and that, already overwritten.
    pub lost: u64,
    /// Set when there is no console to show.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// First line of a TCP stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelHeader {
    /// Why the connection could not be made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}
