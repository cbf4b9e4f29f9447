//! The one configuration of a machine: the shape of Firecracker's configuration file, for the file, the API and the agent.
//!
//! Names of files (`kernel_image_path`, `path_on_host`, `host_dev_name`, …) are looked up among the handed
//! descriptors first and are paths otherwise; see [`crate::descriptors`].

use serde::{Deserialize, Serialize};

use crate::cpu::template;
use crate::error::{Error, Result};
use crate::layout;

pub use crate::cpu::template::{CpuConfig, Level};
pub use crate::devices::serial::config::SerialConfig;
pub use crate::devices::virtio::balloon::config::{BalloonConfig, BalloonUpdate, StatisticsUpdate};
pub use crate::devices::virtio::block::config::{Drive, DriveFormat, DriveUpdate, IoEngine};
pub use crate::devices::virtio::entropy::config::EntropyConfig;
pub use crate::devices::virtio::mem::config::{MemoryHotplugConfig, MemoryHotplugUpdate};
pub use crate::devices::virtio::net::config::{NetworkInterface, NetworkInterfaceUpdate};
pub use crate::devices::virtio::pmem::config::{PmemConfig, PmemUpdate};
pub use crate::devices::virtio::vsock::config::VsockConfig;
pub use crate::log::LoggerConfig;
pub use crate::metrics::MetricsConfig;
pub use crate::snapshot::requests::LoadSnapshot;

/// Everything about one machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct VmConfig {
    /// What to boot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_source: Option<BootSource>,
    /// CPUs and memory.
    #[serde(default)]
    pub machine_config: MachineConfig,
    /// What the guest's CPUs leave out of what the host has: a template, or the name of a file that holds one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_config: Option<CpuConfig>,
    /// Disks; the root device comes first on the bus.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub drives: Vec<Drive>,
    /// Files in the guest's memory, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pmem: Vec<PmemConfig>,
    /// Network interfaces, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub network_interfaces: Vec<NetworkInterface>,
    /// An entropy device, if present.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entropy: Option<EntropyConfig>,
    /// A balloon, if present.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonConfig>,
    /// Memory that comes and goes, if present.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_hotplug: Option<MemoryHotplugConfig>,
    /// A vsock device, if present.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockConfig>,
    /// COM1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<SerialConfig>,
    /// The DMI strings that the guest sees.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub smbios: Option<SmbiosConfig>,
    /// Where the monitor's lines go, and which.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logger: Option<LoggerConfig>,
    /// Where metrics go.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics: Option<MetricsConfig>,
    /// A snapshot to go on from; then all but `serial`, `logger`, `metrics` and `status` is the snapshot's. `resume_vm` is of no meaning here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<LoadSnapshot>,
    /// Where to append status events (see [`crate::status`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<String>,
}

/// What to boot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    /// An x86_64 ELF `vmlinux` or a bzImage (`vmlinuz`).
    pub kernel_image_path: String,
    /// An initramfs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd_path: Option<String>,
    /// The kernel command line, at most 2047 bytes; [`DEFAULT_BOOT_ARGS`] when left out. What is put behind it: `docs/monitor.md`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_args: Option<String>,
    /// How an ELF kernel is entered.
    #[serde(default)]
    pub boot_protocol: BootProtocol,
}

/// The command line of a guest whose configuration names none.
pub const DEFAULT_BOOT_ARGS: &str = "console=ttyS0 panic=1 pci=off";

/// How an ELF kernel is entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BootProtocol {
    /// Linux's 64-bit entry, or PVH for a kernel whose ELF entry is no physical address and that has a PVH note.
    #[default]
    Auto,
    /// Linux's 64-bit entry.
    Linux64,
    /// PVH; the kernel must have the note.
    Pvh,
}

/// CPUs and memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// vCPUs, 1–32: what the machine starts with.
    pub vcpu_count: u8,
    /// vCPUs that it may come to have while it runs, `vcpu_count`–32. Left out: their number stays as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_vcpu_count: Option<u8>,
    /// Memory, MiB.
    pub mem_size_mib: u64,
    /// ACPI tables for the guest. Without them virtio devices are announced on the command line.
    #[serde(default = "yes")]
    pub acpi: bool,
    /// Ask the host for transparent huge pages behind guest memory.
    #[serde(default = "yes")]
    pub huge_pages: bool,
    /// What a guest's reset does.
    #[serde(default)]
    pub on_reset: OnReset,
    /// Whether vCPUs are threads of cores. Each is a core of its own here; scripts made for Firecracker say so.
    #[serde(default, skip_serializing_if = "is_false")]
    pub smt: bool,
    /// Note which pages are written, for diff snapshots. Writing to a page for the first time costs the guest more then.
    #[serde(default, skip_serializing_if = "is_false")]
    pub track_dirty_pages: bool,
    /// A built-in CPU template; none with `cpu-config`.
    #[serde(default, skip_serializing_if = "Level::is_none")]
    pub cpu_template: Level,
}

const fn yes() -> bool {
    true
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "the shape that serde calls")]
pub(crate) const fn is_false(value: &bool) -> bool {
    !*value
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self {
            vcpu_count: 1,
            max_vcpu_count: None,
            mem_size_mib: 128,
            acpi: true,
            huge_pages: true,
            on_reset: OnReset::Restart,
            smt: false,
            track_dirty_pages: false,
            cpu_template: Level::None,
        }
    }
}

/// `PATCH /machine-config`: what is left out stays as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfigUpdate {
    /// vCPUs that the guest should have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpu_count: Option<u8>,
    /// Memory that the guest should have, MiB: that of the start, and what comes and goes ([`VmConfig::memory_hotplug`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mem_size_mib: Option<u64>,
}

/// What a guest's reset does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnReset {
    /// Start it again in this process, from the kernel and disks that are open.
    #[default]
    Restart,
    /// End the process with [`crate::exit::ExitCode::GuestReset`].
    Exit,
}

/// Limits of a device; what is left out is unlimited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimiter {
    /// Bytes; of a packet without its virtio header.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<TokenBucket>,
    /// Operations: a disk's requests, an interface's packets (as guest and host hand them over: up to 64 KiB each), requests for
    /// random bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ops: Option<TokenBucket>,
}

impl RateLimiter {
    /// These limits after a change, whose buckets replace those that are there; one without size or time removes one. Nothing:
    /// no limit is left.
    #[must_use]
    pub fn changed(limits: Option<Self>, change: Option<Self>) -> Option<Self> {
        let (limits, change) = (limits.unwrap_or_default(), change.unwrap_or_default());
        let bucket = |old: Option<TokenBucket>, new: Option<TokenBucket>| {
            new.or(old).filter(|bucket| bucket.size > 0 && bucket.refill_time > 0)
        };
        let bandwidth = bucket(limits.bandwidth, change.bandwidth);
        let ops = bucket(limits.ops, change.ops);
        (bandwidth.is_some() || ops.is_some()).then_some(Self { bandwidth, ops })
    }
}

/// `size` tokens per `refill_time`; a size or time of 0 is no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenBucket {
    /// Tokens that are there at first, and at most.
    pub size: u64,
    /// Tokens on top that are there once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub one_time_burst: Option<u64>,
    /// Milliseconds that fill an empty bucket.
    pub refill_time: u64,
}

pub(crate) const fn one() -> u8 {
    1
}

/// The DMI strings that the guest sees, each at most 64 printable ASCII characters.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SmbiosConfig {
    /// System manufacturer (type 1). Cloud-init knows EC2 by its UUID and serial number instead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub manufacturer: Option<String>,
    /// System product name, on EC2 the instance type.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub product: Option<String>,
    /// System version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// System serial number; on EC2 equal to the UUID.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// System UUID, `ec2xxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx` on EC2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uuid: Option<String>,
    /// System family.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub family: Option<String>,
    /// Chassis asset tag (type 3); EC2 has `Amazon EC2` or the instance id here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub asset_tag: Option<String>,
}

impl VmConfig {
    /// Parses and checks a configuration file.
    ///
    /// # Errors
    /// [`Error::Config`], naming the field.
    pub fn from_json(text: &str) -> Result<Self> {
        let config: Self = serde_json::from_str(text).map_err(|error| Error::Config(error.to_string()))?;
        config.check()?;
        Ok(config)
    }

    /// Checks what types cannot say.
    ///
    /// # Errors
    /// [`Error::Config`], naming the field, its value and what is allowed.
    pub fn check(&self) -> Result<()> {
        if let Some(snapshot) = &self.snapshot {
            snapshot.memory()?;
            let own = Self {
                snapshot: Some(snapshot.clone()),
                serial: self.serial.clone(),
                logger: self.logger.clone(),
                metrics: self.metrics.clone(),
                status: self.status.clone(),
                ..Self::default()
            };
            if *self != own {
                return Err(Error::Config(
                    "snapshot: a machine from a snapshot is the snapshot's; only serial, logger, metrics and status can stand beside it"
                        .into(),
                ));
            }
        }
        self.machine_config.check()?;
        template::check(self)?;
        if let Some(boot) = &self.boot_source {
            boot.check()?;
        }
        for drive in &self.drives {
            drive.check()?;
        }
        for interface in &self.network_interfaces {
            interface.check()?;
            interface.check_vhost(self.machine_config.track_dirty_pages)?;
        }
        if let Some(serial) = &self.serial {
            serial.check()?;
        }
        if let Some(smbios) = &self.smbios {
            smbios.check()?;
        }
        if let Some(balloon) = &self.balloon {
            balloon.check(self.machine_config.mem_size_mib)?;
        }
        if let Some(hotplug) = &self.memory_hotplug {
            hotplug.check(self.machine_config.mem_size_mib)?;
        }
        if let Some(vsock) = &self.vsock {
            vsock.check()?;
        }
        crate::devices::virtio::pmem::config::check(&self.pmem, &self.drives)?;
        unique("drives: drive_id", self.drives.iter().map(|d| &d.drive_id))?;
        unique("network-interfaces: iface_id", self.network_interfaces.iter().map(|n| &n.iface_id))?;
        if self.drives.iter().filter(|d| d.is_root_device).count() > 1 {
            return Err(Error::Config("drives: more than one has is_root_device".into()));
        }
        let devices = self.virtio_devices();
        if devices > layout::MAX_VIRTIO_DEVICES {
            return Err(Error::Config(format!(
                "{devices} devices, at most {} fit one machine",
                layout::MAX_VIRTIO_DEVICES
            )));
        }
        Ok(())
    }

    /// How many virtio devices the machine has.
    #[must_use]
    pub fn virtio_devices(&self) -> usize {
        let single = [
            self.entropy.is_some(),
            self.balloon.is_some(),
            self.vsock.is_some(),
            self.memory_hotplug.is_some(),
        ];
        self.drives.len()
            + self.pmem.len()
            + self.network_interfaces.len()
            + single.into_iter().filter(|there| *there).count()
    }
}

pub(crate) fn unique<'a>(what: &str, names: impl Iterator<Item = &'a String>) -> Result<()> {
    let mut seen = std::collections::BTreeSet::new();
    for name in names {
        if !seen.insert(name) {
            return Err(Error::Config(format!("{what} {name:?} is there twice")));
        }
    }
    Ok(())
}

impl MachineConfig {
    /// vCPUs that are made at the start: those that the machine has, and those that it may come to have.
    #[must_use]
    pub fn vcpus(&self) -> u8 {
        self.max_vcpu_count.unwrap_or(self.vcpu_count)
    }

    /// Checks the numbers.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn check(&self) -> Result<()> {
        if self.vcpu_count == 0 || self.vcpu_count > layout::MAX_VCPUS {
            return Err(Error::Config(format!(
                "machine-config: vcpu_count {} is outside 1–{}",
                self.vcpu_count,
                layout::MAX_VCPUS
            )));
        }
        if let Some(max) = self.max_vcpu_count {
            if max < self.vcpu_count || max > layout::MAX_VCPUS {
                return Err(Error::Config(format!(
                    "machine-config: max_vcpu_count {max} is outside {}–{}, from vcpu_count up",
                    self.vcpu_count,
                    layout::MAX_VCPUS
                )));
            }
            if !self.acpi {
                return Err(Error::Config(format!(
                    "machine-config: max_vcpu_count {max} without acpi: CPUs come and go by ACPI alone"
                )));
            }
        }
        if self.mem_size_mib < layout::MIN_MEMORY_MIB || self.mem_size_mib > layout::MAX_MEMORY_MIB {
            return Err(Error::Config(format!(
                "machine-config: mem_size_mib {} is outside {}–{}",
                self.mem_size_mib,
                layout::MIN_MEMORY_MIB,
                layout::MAX_MEMORY_MIB
            )));
        }
        if self.smt {
            return Err(Error::Config(
                "machine-config: smt true: each vCPU is a core of its own, only false is there".into(),
            ));
        }
        Ok(())
    }
}

impl BootSource {
    fn check(&self) -> Result<()> {
        let args = self.boot_args.as_deref().unwrap_or_default();
        if let Some(bad) = args.chars().find(|c| !c.is_ascii() || c.is_ascii_control()) {
            return Err(Error::Config(format!(
                "boot-source: boot_args holds {bad:?}; printable ASCII is allowed"
            )));
        }
        if args.len() >= layout::CMDLINE_MAX {
            return Err(Error::Config(format!(
                "boot-source: boot_args has {} bytes, at most {} are allowed",
                args.len(),
                layout::CMDLINE_MAX - 1
            )));
        }
        Ok(())
    }
}

impl SmbiosConfig {
    fn check(&self) -> Result<()> {
        let strings = [
            ("manufacturer", &self.manufacturer),
            ("product", &self.product),
            ("version", &self.version),
            ("serial", &self.serial),
            ("family", &self.family),
            ("asset_tag", &self.asset_tag),
        ];
        for (field, value) in strings {
            let Some(value) = value else { continue };
            if value.is_empty() || value.len() > 64 || value.bytes().any(|b| !(0x20..0x7f).contains(&b)) {
                return Err(Error::Config(format!(
                    "smbios: {field} {value:?} is not 1–64 printable ASCII characters"
                )));
            }
        }
        if let Some(uuid) = &self.uuid {
            parse_uuid(uuid)?;
        }
        Ok(())
    }
}

/// Parses `06:00:ac:1f:00:05`.
///
/// # Errors
/// [`Error::Config`] for anything else, and for multicast addresses.
pub fn parse_mac(text: &str) -> Result<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    let parsed = mac.iter_mut().all(|byte| {
        let part = parts.next().filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()));
        part.and_then(|p| u8::from_str_radix(p, 16).ok()).map(|b| *byte = b).is_some()
    });
    if !parsed || parts.next().is_some() || mac[0] & 1 == 1 {
        return Err(Error::Config(format!(
            "network-interfaces: guest_mac {text:?} is not a unicast address of the form 06:00:ac:1f:00:05"
        )));
    }
    Ok(mac)
}

/// Parses the textual form of a UUID into its bytes as printed.
///
/// # Errors
/// [`Error::Config`] for anything else.
pub fn parse_uuid(text: &str) -> Result<[u8; 16]> {
    let error = || Error::Config(format!("smbios: uuid {text:?} is not of the form 8-4-4-4-12 hex digits"));
    let lengths: Vec<usize> = text.split('-').map(str::len).collect();
    let digits: Vec<u8> = text.bytes().filter(|b| *b != b'-').collect();
    if lengths != [8, 4, 4, 4, 12] || !digits.iter().all(u8::is_ascii_hexdigit) {
        return Err(error());
    }
    let mut uuid = [0; 16];
    for (byte, pair) in uuid.iter_mut().zip(digits.chunks(2)) {
        let pair = std::str::from_utf8(pair).map_err(|_| error())?;
        *byte = u8::from_str_radix(pair, 16).map_err(|_| error())?;
    }
    Ok(uuid)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FULL: &str = r#"{"boot-source":{"kernel_image_path":"kernel","initrd_path":"initrd","boot_args":"console=ttyS0"},
        "machine-config":{"vcpu_count":2,"mem_size_mib":1024},
        "drives":[{"drive_id":"root","path_on_host":"root","format":"qcow2","backing":"base","is_root_device":true,"is_read_only":false}],
        "network-interfaces":[{"iface_id":"eth0","guest_mac":"06:00:ac:1f:00:05","host_dev_name":"tap0"}],
        "entropy":{},"balloon":{"amount_mib":512,"deflate_on_oom":true,"stats_polling_interval_s":5,"free_page_reporting":true},
        "vsock":{"guest_cid":3,"uds_path":"sockets/v.sock"},"serial":{"output":"console"},
        "smbios":{"manufacturer":"Amazon EC2","uuid":"ec2a0001-0002-0003-0004-000000000005"},"status":"status"}"#;

    #[test]
    fn the_documented_file_parses_and_survives_a_round_trip() {
        let config = VmConfig::from_json(FULL).unwrap();
        assert_eq!(config.machine_config.vcpu_count, 2);
        assert_eq!(config.drives[0].format, DriveFormat::Qcow2);
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(VmConfig::from_json(&text).unwrap(), config);
    }

    #[test]
    fn bad_configurations_are_refused_with_the_field_named() {
        let cases = [
            (r#"{"machine-config":{"vcpu_count":1,"mem_size_mib":64,"cpu_flavour":1}}"#, "cpu_flavour"),
            (r#"{"machine-config":{"vcpu_count":0,"mem_size_mib":64}}"#, "vcpu_count 0"),
            (r#"{"machine-config":{"vcpu_count":33,"mem_size_mib":64}}"#, "vcpu_count 33"),
            (r#"{"machine-config":{"vcpu_count":1,"mem_size_mib":0}}"#, "mem_size_mib 0"),
            (r#"{"machine-config":{"vcpu_count":2,"mem_size_mib":64,"smt":true}}"#, "smt true"),
            (
                r#"{"drives":[{"drive_id":"a","path_on_host":"a"},{"drive_id":"a","path_on_host":"b"}]}"#,
                "twice",
            ),
            (r#"{"drives":[{"drive_id":"a","path_on_host":"a","backing":"b"}]}"#, "backing"),
            (r#"{"drives":[{"drive_id":"a","path_on_host":"a","format":"vmdk"}]}"#, "vmdk"),
            (r#"{"drives":[{"drive_id":"a","path_on_host":"a","num_queues":0}]}"#, "num_queues 0"),
            (r#"{"drives":[{"drive_id":"a","path_on_host":"a","num_queues":17}]}"#, "num_queues 17"),
            (
                r#"{"network-interfaces":[{"iface_id":"e","host_dev_name":"t","guest_mac":"01:00:00:00:00:00"}]}"#,
                "guest_mac",
            ),
            (
                r#"{"network-interfaces":[{"iface_id":"e","host_dev_name":"t","guest_mac":"6:0:0:0:0:0"}]}"#,
                "guest_mac",
            ),
            (
                r#"{"network-interfaces":[{"iface_id":"e","host_dev_name":"t","num_queue_pairs":9}]}"#,
                "num_queue_pairs 9 is outside 1–8",
            ),
            (r#"{"smbios":{"uuid":"ec2"}}"#, "uuid"),
            (r#"{"serial":{"output":"ring","serial_out_path":"file"}}"#, "one of them"),
            (r#"{"balloon":{"amount_mib":129}}"#, "amount_mib 129 is outside 0–128"),
            (r#"{"balloon":{"deflate_on_oom":true}}"#, "amount_mib"),
            (r#"{"vsock":{"guest_cid":2,"uds_path":"v"}}"#, "guest_cid 2"),
            (r#"{"vsock":{"guest_cid":3,"uds_path":"v/"}}"#, "uds_path"),
            (
                r#"{"balloon":{"amount_mib":1,"stats_polling_interval_s":65536}}"#,
                "stats_polling_interval_s 65536",
            ),
            (r#"{"smbios":{"serial":"ä"}}"#, "serial"),
            (r#"{"boot-source":{"kernel_image_path":"k","boot_args":"a\nb"}}"#, "boot_args"),
        ];
        for (text, word) in cases {
            let error = VmConfig::from_json(text).unwrap_err().to_string();
            assert!(error.contains(word), "{text} gave {error:?}");
        }
    }

    #[test]
    fn uuid_bytes_are_in_print_order() {
        let uuid = parse_uuid("00112233-4455-6677-8899-aabbccddeeff").unwrap();
        assert_eq!(uuid[..4], [0x00, 0x11, 0x22, 0x33]);
        assert_eq!(uuid[15], 0xff);
    }
}
