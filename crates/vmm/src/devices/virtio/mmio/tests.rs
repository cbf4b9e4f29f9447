//! The transport as a driver sees it.

use proptest::prelude::*;

use super::page::Pages;
use super::*;
use crate::devices::virtio::testing::{AVAILABLE, DESCRIPTORS, USED};

#[derive(Default)]
struct Log {
    activations: Vec<(u64, Vec<bool>)>,
    resets: u32,
}

struct Probe {
    log: Arc<Mutex<Log>>,
    refuse: bool,
}

impl VirtioDevice for Probe {
    fn kind(&self) -> u32 {
        42
    }
    fn name(&self) -> &str {
        "probe"
    }
    fn features(&self) -> u64 {
        0b101
    }
    fn queue_sizes(&self) -> &[u16] {
        &[256, 16]
    }
    fn config(&self) -> Vec<u8> {
        vec![1, 2, 3, 4, 5]
    }
    fn activate(&mut self, active: Active) -> Result<(), String> {
        if self.refuse {
            return Err("not today".into());
        }
        let ready = active.queues.iter().map(QueueT::ready).collect();
        self.log.lock().unwrap().activations.push((active.features, ready));
        Ok(())
    }
    fn reset(&mut self) {
        self.log.lock().unwrap().resets += 1;
    }
    fn queue_event(&mut self, _queue: usize) -> bool {
        false
    }
    fn active(&self) -> Option<&Active> {
        None
    }
    fn metrics(&self) -> serde_json::Value {
        serde_json::Value::Null
    }
}

struct Guest {
    transport: Transport,
    log: Arc<Mutex<Log>>,
    bells: Vec<EventFd>,
    interrupt: Arc<Interrupt>,
}

impl Guest {
    fn new(refuse: bool) -> Self {
        let log = Arc::new(Mutex::new(Log::default()));
        let device: Shared = Arc::new(Mutex::new(Probe { log: Arc::clone(&log), refuse }));
        let event = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let bells = vec![event(), event()];
        let theirs = bells.iter().map(|bell| bell.try_clone().unwrap()).collect();
        let interrupt = Arc::new(Interrupt::new(event(), Pages::new(1).unwrap().page(0)));
        let memory = crate::memory::create(2).unwrap();
        let transport = Transport::new(device, memory, Arc::clone(&interrupt), theirs);
        Self { transport, log, bells, interrupt }
    }

    fn read(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.transport.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn write(&self, offset: u64, value: u32) {
        assert_eq!(self.transport.write(offset, &value.to_le_bytes()), Outcome::Done);
    }

    fn status(&self, value: u32) -> u32 {
        self.write(0x70, value);
        self.read(0x70)
    }

    fn negotiate(&self, low: u32, high: u32) -> u32 {
        self.status(1);
        self.status(3);
        for (select, half) in [(0, low), (1, high)] {
            self.write(0x24, select);
            self.write(0x20, half);
        }
        self.status(11)
    }

    fn set_up_queue(&self, queue: u32, descriptors: u64) {
        self.write(0x30, queue);
        self.write(0x38, 16);
        for (offset, address) in [(0x80, descriptors), (0x90, AVAILABLE), (0xa0, USED)] {
            self.write(offset, address as u32);
            self.write(offset + 4, (address >> 32) as u32);
        }
        self.write(0x44, 1);
    }
}

#[test]
fn a_driver_finds_the_device() {
    let guest = Guest::new(false);
    assert_eq!(guest.read(0), u32::from_le_bytes(*b"virt"));
    assert_eq!((guest.read(4), guest.read(8)), (2, 42));
    guest.write(0x14, 0);
    assert_eq!(guest.read(0x10), 0b101);
    guest.write(0x14, 1);
    assert_eq!(guest.read(0x10), 1, "VIRTIO_F_VERSION_1");
    for (queue, size) in [(0, 256), (1, 16), (2, 0), (u32::MAX, 0)] {
        guest.write(0x30, queue);
        assert_eq!(guest.read(0x34), size);
    }
    let mut config = [9; 8];
    guest.transport.read(0x102, &mut config);
    assert_eq!(config, [3, 4, 5, 0, 0, 0, 0, 0]);
}

#[test]
fn the_standard_sequence_activates_the_device_once() {
    let guest = Guest::new(false);
    assert_eq!(guest.negotiate(0b100, 1), 11);
    guest.set_up_queue(0, DESCRIPTORS);
    assert_eq!(guest.status(15), 15);
    assert_eq!(guest.status(15), 15);
    assert_eq!(guest.log.lock().unwrap().activations, [(1 << 32 | 0b100, vec![true, false])]);
    guest.write(0x30, 0);
    assert_eq!(guest.read(0x44), 1, "the driver still reads which queues are ready");
    assert!(guest.bells[0].read().is_ok(), "what was queued before is looked at");
    guest.write(0x50, 1);
    assert_eq!(guest.bells[1].read().unwrap(), 2);
    guest.write(0x50, 7);
    // The bit for used buffers stays while a driver is at work; KVM takes what acknowledges it.
    guest.interrupt.used();
    assert_eq!(guest.read(0x60), 1);
    guest.write(0x64, 1);
    assert_eq!(guest.read(0x60), 1);
    guest.interrupt.config_changed(&[6, 7]);
    assert_eq!((guest.read(0x60), guest.read(0xfc), guest.read(0x100) & 0xffff), (3, 1, 0x0706));
    guest.write(0x64, 3);
    assert_eq!(guest.read(0x60), 1);
    assert_eq!((guest.status(0), guest.read(0x60)), (0, 0));
    assert_eq!(guest.read(0x100), 0x0403_0201, "whoever begins finds what there is now");
    assert_eq!(guest.log.lock().unwrap().resets, 1);
    assert_eq!(guest.read(0x44), 0);
}

#[test]
fn features_that_do_not_fit_are_not_accepted() {
    assert_eq!(Guest::new(false).negotiate(0b100, 0), 3, "without VIRTIO_F_VERSION_1");
    assert_eq!(Guest::new(false).negotiate(0b010, 1), 3, "one that was not offered");
    let guest = Guest::new(false);
    guest.negotiate(0, 0);
    assert_eq!(guest.status(15), 3, "no DRIVER_OK without FEATURES_OK");
    assert!(guest.log.lock().unwrap().activations.is_empty());
}

#[test]
fn queues_outside_of_memory_and_failing_devices_need_a_reset() {
    for (refuse, descriptors) in [(false, 0xffff_0000), (true, DESCRIPTORS)] {
        let guest = Guest::new(refuse);
        guest.negotiate(0, 1);
        guest.set_up_queue(0, descriptors);
        assert_eq!(guest.status(15), 15 | 64);
        assert_eq!(guest.read(0x60) & 2, 2, "a configuration change is announced");
        assert!(guest.log.lock().unwrap().activations.is_empty());
        assert_eq!(guest.status(0), 0);
    }
}

#[test]
fn a_queue_that_is_ready_does_not_change() {
    let guest = Guest::new(false);
    guest.negotiate(0, 1);
    guest.set_up_queue(0, DESCRIPTORS);
    guest.write(0x80, 0xdead_0000);
    assert_eq!(guest.status(15), 15);
}

proptest! {
    /// Any accesses of any size, in any order: no panic, and the magic stays.
    #[test]
    fn a_register_sweep_is_survived(
        accesses in proptest::collection::vec((0..0x1000_u64, proptest::collection::vec(any::<u8>(), 0..9), any::<bool>()), 0..200)
    ) {
        let guest = Guest::new(false);
        for (offset, data, write) in accesses {
            let offset = if data.len() == 4 { offset & 0xfc } else { offset };
            if write {
                guest.transport.write(offset, &data);
            } else {
                guest.transport.read(offset, &mut data.clone());
            }
        }
        prop_assert_eq!(guest.read(0), u32::from_le_bytes(*b"virt"));
    }
}
