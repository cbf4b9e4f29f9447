//! Changes of disks, interfaces and files in memory while the machine runs or is paused.

use std::sync::{Arc, Mutex, PoisonError};

use super::Running;
use crate::config::{DriveUpdate, NetworkInterfaceUpdate, PmemUpdate};
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::block::{self, Block};
use crate::devices::virtio::net::Net;
use crate::devices::virtio::pmem::Pmem;
use crate::error::{Error, Result};

/// The devices whose settings may change, with their types.
#[derive(Clone, Default)]
pub(crate) struct Steered {
    pub disks: Vec<Arc<Mutex<Block>>>,
    pub interfaces: Vec<Arc<Mutex<Net>>>,
    pub pmem: Vec<Arc<Mutex<Pmem>>>,
}

/// Does something with the device of this name.
fn with<D: VirtioDevice, T>(devices: &[Arc<Mutex<D>>], id: &str, act: impl FnOnce(&mut D) -> T) -> Option<T> {
    for device in devices {
        let mut device = device.lock().unwrap_or_else(PoisonError::into_inner);
        if device.name() == id {
            return Some(act(&mut device));
        }
    }
    None
}

impl Running {
    /// Changes a disk's limits, puts another image in place of its own, or looks at its own again, which may have grown.
    ///
    /// # Errors
    /// [`Error::Config`] for a disk that is not there, or with the field; [`Error::NotHanded`] for an image that was not handed over;
    /// [`Error::Disk`] for one that cannot be used. The disk is as it was then.
    pub fn update_drive(&mut self, update: &DriveUpdate) -> Result<()> {
        let id = &update.drive_id;
        let missing = || Error::Config(format!("drives: there is no drive_id {id:?}"));
        let place = self.parts.config.drives.iter().position(|drive| drive.drive_id == *id);
        let place = place.ok_or_else(missing)?;
        let drive = update.apply(&self.parts.config.drives[place])?;
        let changed = with(&self.parts.steered.disks, id, |disk| {
            if update.path_on_host.is_some() {
                disk.replace(|| block::config::open(&drive, &self.parts.descriptors))?;
            }
            if let Some(change) = update.rate_limiter {
                disk.change_limits(change);
            }
            Ok(())
        });
        changed.ok_or_else(missing)??;
        self.parts.config.drives[place] = drive;
        Ok(())
    }

    /// Changes an interface's limits.
    ///
    /// # Errors
    /// [`Error::Config`] for an interface that is not there, or whose packets the host's kernel moves.
    pub fn update_network_interface(&mut self, update: &NetworkInterfaceUpdate) -> Result<()> {
        let id = &update.iface_id;
        let missing = || Error::Config(format!("network-interfaces: there is no iface_id {id:?}"));
        let interfaces = &mut self.parts.config.network_interfaces;
        let config = interfaces.iter_mut().find(|interface| interface.iface_id == *id).ok_or_else(missing)?;
        let changed = update.apply(config);
        changed.check_vhost(false)?;
        let change = |net: &mut Net| net.change_limits(update.rx_rate_limiter, update.tx_rate_limiter);
        with(&self.parts.steered.interfaces, id, change).ok_or_else(missing)?;
        *config = changed;
        Ok(())
    }

    /// Changes how often the guest may flush a file.
    ///
    /// # Errors
    /// [`Error::Config`] for a file that is not there.
    pub fn update_pmem(&mut self, update: &PmemUpdate) -> Result<()> {
        let id = &update.id;
        let missing = || Error::Config(format!("pmem: there is no id {id:?}"));
        let config = self.parts.config.pmem.iter_mut().find(|pmem| pmem.id == *id).ok_or_else(missing)?;
        let change = |pmem: &mut Pmem| pmem.change_limits(update.rate_limiter.unwrap_or_default());
        with(&self.parts.steered.pmem, id, change).ok_or_else(missing)?;
        *config = update.apply(config);
        Ok(())
    }
}
