//! What snapshot requests say, in the shape of Firecracker's published API.

use serde::{Deserialize, Serialize};

use crate::config::{DriveFormat, SerialConfig, VmConfig, is_false};
use crate::error::{Error, Result};

/// Which pages a snapshot has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum SnapshotType {
    /// All.
    #[default]
    Full,
    /// Those that were written since the snapshot before it.
    Diff,
}

/// `PUT /snapshot/create`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateSnapshot {
    /// Which pages.
    #[serde(default)]
    pub snapshot_type: SnapshotType,
    /// The state file, opened for writing.
    pub snapshot_path: String,
    /// The memory file, opened for reading and writing.
    pub mem_file_path: String,
}

/// `PUT /snapshot/load`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoadSnapshot {
    /// The state file.
    pub snapshot_path: String,
    /// The memory file, the older way of saying it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mem_file_path: Option<String>,
    /// Where memory comes from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mem_backend: Option<MemoryBackend>,
    /// Note which pages are written, for diff snapshots.
    #[serde(default, alias = "enable_diff_snapshots")]
    pub track_dirty_pages: bool,
    /// Let the guest go on at once.
    #[serde(default)]
    pub resume_vm: bool,
    /// Set the guest's clocks forward by the time that has passed since the snapshot.
    #[serde(default)]
    pub clock_realtime: bool,
    /// Other taps.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub network_overrides: Vec<NetworkOverride>,
    /// Other images. Their content must be what the guest knows: a copy taken with the snapshot.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub drive_overrides: Vec<DriveOverride>,
    /// Other files in the guest's memory. Their content must be what the guest knows, and their size the same.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pmem_overrides: Vec<PmemOverride>,
    /// Another place for vsock's sockets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_override: Option<VsockOverride>,
    /// Another console.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial_override: Option<SerialConfig>,
}

/// Where memory comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryBackend {
    /// The kind.
    pub backend_type: BackendType,
    /// The memory file, or the socket of a page-fault handler.
    pub backend_path: String,
}

/// Kinds of memory backends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum BackendType {
    /// A memory file, mapped privately.
    File,
    /// A program on a unix socket that answers page faults (userfaultfd).
    Uffd,
}

/// Another tap for an interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkOverride {
    /// The interface.
    pub iface_id: String,
    /// Its tap from now on.
    pub host_dev_name: String,
    /// Whether the host's kernel moves its packets, if that is another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vhost: Option<bool>,
}

/// Another image for a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriveOverride {
    /// The disk.
    pub drive_id: String,
    /// Its image from now on.
    pub path_on_host: String,
    /// Its format, if it is another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<DriveFormat>,
    /// The base below it, if it is another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backing: Option<String>,
    /// For whoever opens it in the monitor's place (`roost-vmm jail`): the guest does not write to it.
    #[serde(default, skip_serializing_if = "is_false")]
    pub is_read_only: bool,
}

/// Another file in the guest's memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PmemOverride {
    /// The device.
    pub id: String,
    /// Its file from now on.
    pub path_on_host: String,
    /// As of a disk.
    #[serde(default, skip_serializing_if = "is_false")]
    pub read_only: bool,
}

/// Another place for vsock's sockets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockOverride {
    /// As in the device's configuration.
    pub uds_path: String,
}

impl LoadSnapshot {
    /// The configuration of the machine that is made: the snapshot's, with what this request and the configuration of this
    /// process (where its console and its status go) say otherwise.
    ///
    /// # Errors
    /// [`Error::Config`] for a device that the snapshot does not have.
    pub fn apply(&self, snapshot: VmConfig, own: &VmConfig) -> Result<VmConfig> {
        let mut config = snapshot;
        let missing = |field: &str, id: &str| Error::Config(format!("{field} {id:?} is not in the snapshot"));
        for change in &self.network_overrides {
            let found = config.network_interfaces.iter_mut().find(|found| found.iface_id == change.iface_id);
            let found = found.ok_or_else(|| missing("network_overrides: iface_id", &change.iface_id))?;
            found.host_dev_name = change.host_dev_name.clone();
            found.vhost = change.vhost.unwrap_or(found.vhost);
        }
        for change in &self.drive_overrides {
            let found = config.drives.iter_mut().find(|found| found.drive_id == change.drive_id);
            let drive = found.ok_or_else(|| missing("drive_overrides: drive_id", &change.drive_id))?;
            drive.path_on_host = change.path_on_host.clone();
            drive.format = change.format.unwrap_or(drive.format);
            drive.backing = change.backing.clone().or_else(|| drive.backing.clone());
        }
        for change in &self.pmem_overrides {
            let found = config.pmem.iter_mut().find(|found| found.id == change.id);
            found.ok_or_else(|| missing("pmem_overrides: id", &change.id))?.path_on_host =
                change.path_on_host.clone();
        }
        if let Some(change) = &self.vsock_override {
            let vsock = config.vsock.as_mut();
            vsock.ok_or_else(|| missing("vsock_override: uds_path", &change.uds_path))?.uds_path =
                change.uds_path.clone();
        }
        config.serial = self.serial_override.clone().or_else(|| own.serial.clone()).or(config.serial);
        config.status = own.status.clone();
        config.logger = own.logger.clone();
        config.metrics = own.metrics.clone();
        config.machine_config.track_dirty_pages = self.track_dirty_pages;
        config.check()?;
        Ok(config)
    }

    /// Where memory comes from, said in one of the two ways.
    ///
    /// # Errors
    /// [`Error::Config`] if it is said twice or not at all.
    pub fn memory(&self) -> Result<MemoryBackend> {
        match (&self.mem_file_path, &self.mem_backend) {
            (Some(path), None) => {
                Ok(MemoryBackend { backend_type: BackendType::File, backend_path: path.clone() })
            }
            (None, Some(backend)) => Ok(backend.clone()),
            _ => Err(Error::Config(
                "mem_backend {\"backend_type\", \"backend_path\"} or mem_file_path: exactly one of them"
                    .into(),
            )),
        }
    }
}
