//! A device behind its registers: any access, in any order, with rings that mostly hold.
#![no_main]

use std::sync::{Arc, Mutex};

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use roost_vmm::bus::BusDevice;
use roost_vmm::config::{BalloonConfig, Drive, IoEngine};
use roost_vmm::devices::virtio::Interrupt;
use roost_vmm::devices::virtio::balloon::Balloon;
use roost_vmm::devices::virtio::block::Block;
use roost_vmm::devices::virtio::block::config::Opened;
use roost_vmm::devices::virtio::entropy::Entropy;
use roost_vmm::devices::virtio::mmio::page::Pages;
use roost_vmm::devices::virtio::mmio::{Shared, Transport, lock};
use roost_vmm::devices::virtio::pace::Pace;
use roost_vmm::memory::FilePages;
use roost_vmm_fuzz::guest::{self, Batch, Ring, Setup};
use roost_vmm_fuzz::host::Disk;
use vmm_sys_util::eventfd::EventFd;

#[derive(Arbitrary, Debug)]
enum Kind {
    Block { read_only: bool },
    Entropy,
    Balloon { statistics: bool },
}

#[derive(Arbitrary, Debug)]
enum Step {
    /// A whole word at a register.
    Register(u8, u32),
    Read(u16, u8),
    Write(u16, Vec<u8>),
    /// What a driver does: negotiation with these features, queues, `DRIVER_OK`.
    Start {
        features: u64,
        setup: Setup,
    },
    Reset,
    Fill(u8, Batch),
    Ring(u8),
    Timer(u8),
}

fuzz_target!(|input: (Kind, Vec<Step>)| {
    let (kind, steps) = input;
    let memory = guest::memory();
    let device: Shared = match kind {
        Kind::Block { read_only } => {
            let drive: Drive = serde_json::from_str(r#"{"drive_id":"disk","path_on_host":"disk"}"#).unwrap();
            let drive = Drive { is_read_only: read_only, io_engine: IoEngine::Sync, ..drive };
            let opened = Opened { image: Box::new(Disk::new(8)), raw: None };
            Arc::new(Mutex::new(Block::new(&drive, opened, Pace::new(None).unwrap()).unwrap()))
        }
        Kind::Entropy => Arc::new(Mutex::new(Entropy::new(Pace::new(None).unwrap()))),
        Kind::Balloon { statistics } => {
            let config = BalloonConfig {
                stats_polling_interval_s: statistics.into(),
                free_page_reporting: true,
                ..BalloonConfig::default()
            };
            Arc::new(Mutex::new(Balloon::new(&config, FilePages::default()).unwrap()))
        }
    };
    let line = || EventFd::new(0).unwrap();
    let queues = lock(&device).queue_sizes().len() as u64;
    let bells = (0..queues).map(|_| line()).collect();
    let transport = Transport::new(
        Arc::clone(&device),
        memory.clone(),
        Arc::new(Interrupt::new(line(), Pages::new(1).unwrap().page(0))),
        bells,
    );
    let put = |offset: u64, value: u32| {
        let _ = transport.write(offset, &value.to_le_bytes());
    };
    let mut rings: Vec<Ring> = Vec::new();
    for step in steps.into_iter().take(64) {
        match step {
            Step::Register(register, value) => put(4 * u64::from(register % 64), value),
            Step::Read(offset, length) => {
                transport.read(offset.into(), &mut vec![0xaa; usize::from(length % 9)]);
            }
            Step::Write(offset, bytes) => {
                let _ = transport.write(offset.into(), &bytes[..bytes.len().min(8)]);
            }
            Step::Start { features, setup } => {
                for (offset, value) in [(0x70, 0), (0x70, 1), (0x70, 3)] {
                    put(offset, value);
                }
                for half in [0, 1] {
                    put(0x24, half);
                    // VERSION_1 is always there.
                    put(0x20, ((features | 1 << 32) >> (32 * half)) as u32);
                }
                put(0x70, 11);
                rings = (0..queues).map(|number| Ring::new(&memory, setup, number)).collect();
                for (number, ring) in rings.iter().enumerate() {
                    put(0x30, number as u32);
                    put(0x38, ring.size.into());
                    for (offset, address) in [0x80, 0x90, 0xa0].into_iter().zip(ring.addresses()) {
                        put(offset, address as u32);
                    }
                    put(0x44, 1);
                }
                put(0x70, 15);
            }
            Step::Reset => transport.reset(),
            Step::Fill(queue, batch) => {
                if let Some(ring) = rings.get_mut(usize::from(queue)) {
                    ring.write(&memory, &batch);
                }
            }
            Step::Ring(queue) => {
                put(0x50, queue.into());
                lock(&device).queue_event(queue.into());
            }
            // Timers that have not rung must not be waited for.
            Step::Timer(queue) => {
                let _ = lock(&device).timers().get(usize::from(queue));
            }
        }
    }
    let _ = lock(&device).metrics();
});
