//! The virtio-mmio transport (virtio 1.2, 4.2): registers in, calls to the device out.
//!
//! ```text
//!            ACKNOWLEDGE · DRIVER · FEATURES_OK            DRIVER_OK
//!   reset ───────────────────────────────────▶ configuring ─────────▶ active
//!     ▲                                                                 │
//!     └───────────────── 0 written to Status ◀──────────────────────────┘
//! ```

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::EventFd;

use page::Page;

use super::{Active, F_EVENT_IDX, F_VERSION_1, Interrupt, VirtioDevice};
use crate::bus::{BusDevice, Outcome};
use crate::log::Limited;
use crate::memory::Memory;

const MAGIC: u32 = 0x7472_6976; // "virt"
const VERSION: u32 = 2;
const VENDOR: u32 = 0x5453_4f52; // "ROST"
/// Offsets of registers that others write, too.
pub(super) const INTERRUPT_STATUS: u64 = 0x60;
pub(super) const STATUS: u64 = 0x70;
pub(super) const GENERATION: u64 = 0xfc;
/// Where the configuration space begins.
const CONFIG: u64 = 0x100;
/// Offset of the register that rings a queue's bell.
pub const QUEUE_NOTIFY: u64 = 0x50;
/// Offset of the register that acknowledges an interrupt, and the acknowledgement that KVM takes.
pub const ACKNOWLEDGE: (u64, u32) = (INTERRUPT_ACK, super::STATUS_USED);
const INTERRUPT_ACK: u64 = 0x64;

const STATUS_ACKNOWLEDGE: u32 = 1;
const STATUS_DRIVER: u32 = 2;
const STATUS_DRIVER_OK: u32 = 4;
const STATUS_FEATURES_OK: u32 = 8;
pub(super) const NEEDS_RESET: u32 = 64;
const STATUS_FAILED: u32 = 128;

/// A device that threads share.
pub type Shared = Arc<Mutex<dyn VirtioDevice>>;

/// Locks a device. A thread that panicked ends the process, so a poisoned lock is never seen in earnest.
pub fn lock(device: &Shared) -> MutexGuard<'_, dyn VirtioDevice + 'static> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Registers {
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    queues: Vec<Queue>,
    active: bool,
}

impl Registers {
    fn fresh(queue_sizes: &[u16]) -> Self {
        Self {
            status: 0,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues: fresh_queues(queue_sizes),
            active: false,
        }
    }
}

/// One device's window.
pub struct Transport {
    registers: Mutex<Registers>,
    device: Shared,
    kind: u32,
    features: u64,
    queue_sizes: Vec<u16>,
    bells: Vec<EventFd>,
    interrupt: Arc<Interrupt>,
    page: Page,
    memory: Memory,
}

impl Transport {
    /// `bells` are eventfds, one per queue, that the device thread waits on.
    pub fn new(device: Shared, memory: Memory, interrupt: Arc<Interrupt>, bells: Vec<EventFd>) -> Self {
        let (kind, features, queue_sizes) = {
            let device = lock(&device);
            (device.kind(), device.features() | F_VERSION_1, device.queue_sizes().to_vec())
        };
        let registers = Registers::fresh(&queue_sizes);
        let page = interrupt.page().clone();
        for (offset, value) in [(0x00, MAGIC), (0x04, VERSION), (0x08, kind), (0x0c, VENDOR)] {
            page.set(offset, value);
        }
        // No shared memory regions: their length reads as all ones.
        (0xb0..=0xbc).step_by(4).for_each(|offset| page.set(offset, u32::MAX));
        let transport = Self {
            registers: Mutex::new(registers),
            device,
            kind,
            features,
            queue_sizes,
            bells,
            interrupt,
            page,
            memory,
        };
        transport.show(&transport.registers());
        transport.show_config();
        transport
    }

    /// The device behind the window.
    #[must_use]
    pub const fn device(&self) -> &Shared {
        &self.device
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As after power-on.
    pub fn reset(&self) {
        let mut registers = self.registers();
        self.reset_locked(&mut registers);
    }

    fn reset_locked(&self, registers: &mut Registers) {
        lock(&self.device).reset();
        self.interrupt.reset();
        *registers = Registers::fresh(&self.queue_sizes);
        self.show(registers);
        self.show_config();
    }

    /// Shows what the guest reads of the registers that it writes.
    fn show(&self, registers: &Registers) {
        let queue = registers.queues.get(registers.queue_select as usize);
        self.page.set(0x10, half(self.features, registers.device_features_select));
        self.page.set(0x34, queue.map_or(0, |queue| u32::from(queue.max_size())));
        self.page.set(0x44, queue.map_or(0, |queue| u32::from(queue.ready())));
        self.interrupt.show_status(registers.status);
    }

    fn show_config(&self) {
        self.interrupt.show_config(&lock(&self.device).config());
    }

    fn write_register(&self, offset: u64, value: u32) {
        let mut registers = self.registers();
        let configuring = registers.status & (STATUS_DRIVER_OK | STATUS_FEATURES_OK) == STATUS_FEATURES_OK;
        let negotiating =
            registers.status & (STATUS_DRIVER | STATUS_FEATURES_OK | STATUS_DRIVER_OK) == STATUS_DRIVER;
        match offset {
            0x14 => registers.device_features_select = value,
            0x20 if negotiating => match registers.driver_features_select {
                0 => registers.driver_features = registers.driver_features >> 32 << 32 | u64::from(value),
                1 => {
                    registers.driver_features =
                        registers.driver_features & 0xffff_ffff | u64::from(value) << 32;
                }
                _ => {}
            },
            0x24 => registers.driver_features_select = value,
            0x30 => registers.queue_select = value,
            QUEUE_NOTIFY => {
                // Only without an ioeventfd for this value.
                if let Some(bell) = self.bells.get(value as usize) {
                    let _ = bell.write(1);
                }
            }
            INTERRUPT_ACK => self.interrupt.acknowledge(value),
            STATUS => {
                self.write_status(&mut registers, value);
                // A driver that begins finds what changed while there was none.
                self.show_config();
            }
            _ if configuring => {
                let select = registers.queue_select as usize;
                if let Some(queue) = registers.queues.get_mut(select) {
                    write_queue_register(queue, offset, value);
                }
            }
            _ => {}
        }
        self.show(&registers);
    }

    fn write_status(&self, registers: &mut Registers, value: u32) {
        if value == 0 {
            self.reset_locked(registers);
            return;
        }
        let added = value & !registers.status;
        // Bits are only ever added, in the order of virtio 1.2, 3.1.1.
        if value & STATUS_FAILED != 0 {
            registers.status |= STATUS_FAILED;
            return;
        }
        if added & STATUS_ACKNOWLEDGE != 0 {
            registers.status |= STATUS_ACKNOWLEDGE;
        }
        if added & STATUS_DRIVER != 0 && registers.status & STATUS_ACKNOWLEDGE != 0 {
            registers.status |= STATUS_DRIVER;
        }
        if added & STATUS_FEATURES_OK != 0 && registers.status & STATUS_DRIVER != 0 {
            let driver = registers.driver_features;
            if driver & !self.features == 0 && driver & F_VERSION_1 != 0 {
                registers.status |= STATUS_FEATURES_OK;
            }
        }
        if added & STATUS_DRIVER_OK != 0 && registers.status & STATUS_FEATURES_OK != 0 {
            registers.status |= STATUS_DRIVER_OK;
            self.activate(registers);
        }
    }

    fn activate(&self, registers: &mut Registers) {
        if registers.active {
            return;
        }
        let mut queues = std::mem::replace(&mut registers.queues, fresh_queues(&self.queue_sizes));
        for queue in &mut queues {
            queue.set_event_idx(registers.driver_features & F_EVENT_IDX != 0);
        }
        registers.queues = queues_for_reading(&queues);
        self.activate_with(registers, queues);
    }

    /// Gives the device its queues.
    fn activate_with(&self, registers: &mut Registers, queues: Vec<Queue>) {
        let mut device = lock(&self.device);
        if queues.iter().any(|queue| queue.ready() && !queue.is_valid(&self.memory)) {
            static LOG: Limited = Limited::new();
            LOG.line(|| format!("{}: the guest's queues are invalid", device.name()));
            self.interrupt.needs_reset();
            return;
        }
        let active = Active {
            memory: self.memory.clone(),
            queues,
            features: registers.driver_features,
            interrupt: Arc::clone(&self.interrupt),
        };
        self.interrupt.start();
        match device.activate(active) {
            Ok(()) => {
                registers.active = true;
                drop(device);
                // What the guest queued before is looked at now, and what the backend has is fetched.
                for bell in &self.bells {
                    let _ = bell.write(1);
                }
            }
            Err(error) => {
                static LOG: Limited = Limited::new();
                LOG.line(|| format!("{}: cannot be activated: {error}", device.name()));
                self.interrupt.needs_reset();
            }
        }
    }
}

fn fresh_queues(sizes: &[u16]) -> Vec<Queue> {
    // Sizes are constants of the devices: powers of two that Queue takes.
    sizes.iter().filter_map(|size| Queue::new(*size).ok()).collect()
}

/// After activation the guest may still read which queues are ready.
fn queues_for_reading(queues: &[Queue]) -> Vec<Queue> {
    queues.iter().filter_map(|queue| Queue::try_from(queue.state()).ok()).collect()
}

fn write_queue_register(queue: &mut Queue, offset: u64, value: u32) {
    // virtio 1.2, 4.2.3.2: a queue is set up while QueueReady is 0.
    if queue.ready() && offset != 0x44 {
        return;
    }
    match offset {
        0x38 => queue.set_size(u16::try_from(value).unwrap_or(0)),
        0x44 => queue.set_ready(value == 1),
        0x80 => queue.set_desc_table_address(Some(value), None),
        0x84 => queue.set_desc_table_address(None, Some(value)),
        0x90 => queue.set_avail_ring_address(Some(value), None),
        0x94 => queue.set_avail_ring_address(None, Some(value)),
        0xa0 => queue.set_used_ring_address(Some(value), None),
        0xa4 => queue.set_used_ring_address(None, Some(value)),
        _ => {}
    }
}

const fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => (features & 0xffff_ffff) as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

impl BusDevice for Transport {
    /// Only where KVM does not let the guest read by itself.
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.page.read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) -> Outcome {
        if offset < CONFIG
            && offset.is_multiple_of(4)
            && let Ok(bytes) = <[u8; 4]>::try_from(data)
        {
            self.write_register(offset, u32::from_le_bytes(bytes));
        } else if offset >= CONFIG {
            let at = usize::try_from(offset - CONFIG).unwrap_or(usize::MAX);
            lock(&self.device).write_config(at, data);
            self.show_config();
        }
        Outcome::Done
    }
}

pub mod page;
mod state;
#[cfg(test)]
mod tests;

pub use state::SavedTransport;
