//! Every host object's name, derived from the instance id: whoever finds an object knows whose it is, and making
//! it twice makes it once.

use roost_types::ids::{BlobId, InstanceId, VolumeId};
use std::path::{Path, PathBuf};

/// What the names of host-side veth ends begin with; the firewall's wildcard matches it.
pub const VETH_PREFIX: &str = "rv";
/// The uplink inside an instance's network namespace.
pub const UPLINK: &str = "up0";
/// The tap inside an instance's network namespace.
pub const TAP: &str = "tap0";
/// Table inside an instance's network namespace.
pub const INSTANCE_TABLE: &str = "roost";
/// Table of the host that all instances share.
pub const HOST_TABLE: &str = roost_types::forward::HOST_TABLE;

/// Host-side veth end: `rv` and 11 of the id's digits, 13 of the 15 characters that a name may have.
pub fn host_veth(id: &InstanceId) -> String {
    let digits = id.digits();
    format!("{VETH_PREFIX}{}", &digits[..digits.len().min(11)])
}

/// Name of the network namespace, as `ip netns` shows it.
pub fn netns(id: &InstanceId) -> String {
    format!("roost-{id}")
}

/// Hardware address of one end of the veth pair; locally administered, from the id.
/// `end` is 0 for the host's end and 1 for the namespace's.
pub fn veth_mac(id: &InstanceId, end: u8) -> [u8; 6] {
    let mut mac = [0x02, 0, 0, 0, 0, 0];
    for (byte, pair) in mac[1..].iter_mut().zip(id.digits().as_bytes().chunks(2)) {
        let text = std::str::from_utf8(pair).unwrap_or("0");
        *byte = u8::from_str_radix(text, 16).unwrap_or(0);
    }
    mac[0] = 0x02 | (end << 4);
    mac
}

/// Where an agent keeps things.
#[derive(Debug, Clone)]
pub struct Folders {
    /// Durable.
    pub state: PathBuf,
    /// Gone at reboot.
    pub run: PathBuf,
    /// Where `ip netns` looks.
    pub netns: PathBuf,
}

impl Folders {
    /// The agent's own lock.
    pub fn lock(&self) -> PathBuf {
        self.state.join("lock")
    }

    /// The file of the host's troubles, a line each, for `roost doctor`. Any user may read it.
    pub fn troubles(&self) -> PathBuf {
        self.run.join("trouble")
    }

    /// Folder of all instances.
    pub fn instances(&self) -> PathBuf {
        self.state.join("instances")
    }

    /// Folder of one instance.
    pub fn instance(&self, id: &InstanceId) -> PathBuf {
        self.instances().join(id.as_str())
    }

    /// Folder of quarantined instances.
    pub fn quarantine(&self) -> PathBuf {
        self.state.join("quarantine")
    }

    /// A file of one instance.
    pub fn file(&self, id: &InstanceId, name: &str) -> PathBuf {
        self.instance(id).join(name)
    }

    /// Console ring.
    pub fn console(&self, id: &InstanceId) -> PathBuf {
        self.file(id, "console")
    }

    /// The monitor's status file.
    pub fn status(&self, id: &InstanceId) -> PathBuf {
        self.file(id, "status")
    }

    /// The monitor's log.
    pub fn monitor_log(&self, id: &InstanceId) -> PathBuf {
        self.file(id, "monitor.log")
    }

    /// A volume's overlay.
    pub fn volume(&self, id: &VolumeId) -> PathBuf {
        self.volumes().join(format!("{id}.qcow2"))
    }

    /// Folder of volumes.
    pub fn volumes(&self) -> PathBuf {
        self.state.join("volumes")
    }

    /// Folder of unpacked images.
    pub fn images(&self) -> PathBuf {
        self.state.join("images")
    }

    /// An unpacked image.
    pub fn image(&self, blob: &BlobId) -> PathBuf {
        self.images().join(format!("{}.raw", blob.as_str()))
    }

    /// Folder of what an instance has while it runs.
    pub fn running(&self, id: &InstanceId) -> PathBuf {
        self.run.join(id.as_str())
    }

    /// The monitor's API socket.
    pub fn api_socket(&self, id: &InstanceId) -> PathBuf {
        self.running(id).join("api.sock")
    }

    /// The pipe that is typed into the console.
    pub fn console_input(&self, id: &InstanceId) -> PathBuf {
        self.running(id).join("console.in")
    }

    /// The network namespace's file.
    pub fn netns_file(&self, id: &InstanceId) -> PathBuf {
        self.netns.join(netns(id))
    }

    /// The cgroup of an instance below `root`.
    pub fn cgroup(root: &Path, family: &str, id: &InstanceId) -> PathBuf {
        root.join(family).join(id.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_the_kernel_and_tell_instances_apart() {
        let a: InstanceId = "i-0123456789abcdef0".parse().unwrap();
        let b: InstanceId = "i-01234567fffffffff".parse().unwrap();
        assert_eq!(host_veth(&a), "rv0123456789a");
        assert!(host_veth(&a).len() <= 15);
        assert_ne!(host_veth(&a), host_veth(&b));
        assert_eq!(veth_mac(&a, 0), [0x02, 0x01, 0x23, 0x45, 0x67, 0x89]);
        assert_eq!(veth_mac(&a, 1)[0] & 3, 2, "locally administered, unicast");
        assert_ne!(veth_mac(&a, 0), veth_mac(&a, 1));
    }

    #[test]
    fn the_old_short_id_has_names_too() {
        let id: InstanceId = "i-1234abcd".parse().unwrap();
        assert_eq!(host_veth(&id), "rv1234abcd");
        assert_eq!(veth_mac(&id, 0), [0x02, 0x12, 0x34, 0xab, 0xcd, 0]);
    }
}
