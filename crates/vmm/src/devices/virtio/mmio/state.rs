//! What a snapshot holds of a window: its registers, and where the device is in its queues.

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueState};

use super::{Registers, Transport};
use crate::devices::virtio::{Active, F_VERSION_1, SavedInterrupt, VirtioDevice};
use crate::error::{Error, Result};

/// The state.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SavedTransport {
    name: String,
    kind: u32,
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    /// As the guest reads them.
    queues: Vec<SavedQueue>,
    activated: bool,
    /// As the device works on them; nothing if it does not, as after a guest broke one.
    working: Option<Vec<SavedQueue>>,
    interrupt: SavedInterrupt,
    device: serde_json::Value,
}

/// A queue: [`QueueState`] with names that last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SavedQueue {
    max_size: u16,
    size: u16,
    ready: bool,
    next_avail: u16,
    next_used: u16,
    event_idx: bool,
    descriptors: u64,
    available: u64,
    used: u64,
}

impl SavedQueue {
    fn of(queue: &Queue) -> Self {
        let state = queue.state();
        Self {
            max_size: state.max_size,
            size: state.size,
            ready: state.ready,
            next_avail: state.next_avail,
            next_used: state.next_used,
            event_idx: state.event_idx_enabled,
            descriptors: state.desc_table,
            available: state.avail_ring,
            used: state.used_ring,
        }
    }

    fn queue(self) -> std::result::Result<Queue, virtio_queue::Error> {
        Queue::try_from(QueueState {
            max_size: self.max_size,
            next_avail: self.next_avail,
            next_used: self.next_used,
            event_idx_enabled: self.event_idx,
            size: self.size,
            ready: self.ready,
            desc_table: self.descriptors,
            avail_ring: self.available,
            used_ring: self.used,
        })
    }
}

impl Transport {
    /// Reads the state. `device` is this window's, locked, so that it is not at work; no vCPU runs.
    #[must_use]
    pub fn save(&self, device: &dyn VirtioDevice) -> SavedTransport {
        let registers = self.registers();
        let working = |active: &Active| active.queues.iter().map(SavedQueue::of).collect();
        SavedTransport {
            name: device.name().to_owned(),
            kind: self.kind,
            status: registers.status,
            device_features_select: registers.device_features_select,
            driver_features_select: registers.driver_features_select,
            driver_features: registers.driver_features,
            queue_select: registers.queue_select,
            queues: registers.queues.iter().map(SavedQueue::of).collect(),
            activated: registers.active,
            working: device.active().map(working),
            interrupt: self.interrupt.save(),
            device: device.save(),
        }
    }

    /// Takes a state over, and lets the device go on where it was. No vCPU has run.
    ///
    /// # Errors
    /// [`Error::Snapshot`] for the state of another device, or of one that could do more.
    pub fn restore(&self, saved: &SavedTransport) -> Result<()> {
        let name = super::lock(&self.device).name().to_owned();
        let refuse = |why: String| Err(Error::Snapshot(format!("device {name:?}: {why}")));
        if (saved.kind, &saved.name) != (self.kind, &name) {
            return refuse(format!("there is {:?} (kind {}) in its place", saved.name, saved.kind));
        }
        let missing = saved.driver_features & !self.features;
        if missing != 0 {
            return refuse(format!("its driver uses features {missing:#x}, which are not there"));
        }
        let sizes: Vec<u16> = saved.queues.iter().map(|queue| queue.max_size).collect();
        let working: Vec<u16> = saved.working.iter().flatten().map(|queue| queue.max_size).collect();
        if sizes != self.queue_sizes || saved.working.is_some() && working != sizes {
            return refuse(format!("it has queues of {:?}, not of {sizes:?}", self.queue_sizes));
        }
        if let Err(why) = super::lock(&self.device).restore(&saved.device) {
            return refuse(why);
        }
        let queues = |saved: &[SavedQueue]| {
            let queues: std::result::Result<Vec<Queue>, _> =
                saved.iter().map(|queue| queue.queue()).collect();
            queues.map_err(|error| Error::Snapshot(format!("device {name:?}: a queue: {error}")))
        };
        let mut registers = self.registers();
        *registers = Registers {
            status: saved.status,
            device_features_select: saved.device_features_select,
            driver_features_select: saved.driver_features_select,
            driver_features: saved.driver_features & (self.features | F_VERSION_1),
            queue_select: saved.queue_select,
            queues: queues(&saved.queues)?,
            active: saved.activated,
        };
        self.interrupt.restore(&saved.interrupt);
        if let Some(working) = &saved.working {
            self.activate_with(&mut registers, queues(working)?);
        }
        self.show(&registers);
        self.show_config();
        Ok(())
    }

    /// Raises the interrupt again if there may be something to look at.
    ///
    /// # Errors
    /// The host's.
    pub fn remind(&self) -> std::io::Result<()> {
        if self.registers().active && self.interrupt.may_be_due() {
            self.interrupt.line().write(1)
        } else {
            Ok(())
        }
    }
}
