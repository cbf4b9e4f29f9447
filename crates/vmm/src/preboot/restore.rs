//! A machine from a snapshot.

use std::fs::File;
use std::time::Duration;

use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend};

use super::{Preboot, USERFAULTFD_NAME};
use crate::boot::Payload;
use crate::config::VmConfig;
use crate::cpu::model::CpuModel;
use crate::cpu::template::msrs::ARCH_CAPABILITIES;
use crate::descriptors::{Access, Descriptors};
use crate::error::{Error, Result};
use crate::layout;
use crate::memory::{self, FilePages, Memory};
use crate::running::{Held, Parts};
use crate::snapshot::lazy::Handler;
use crate::snapshot::requests::{BackendType, LoadSnapshot};
use crate::snapshot::{self, MemoryFile, SavedMachine};
use crate::vm::EmptyVm;
use crate::vmclock;

/// What there is of a snapshot before there is a machine.
struct Image {
    saved: SavedMachine,
    /// The snapshot's, as the request changes it.
    config: VmConfig,
    memory: Memory,
    pages: FilePages,
    memory_file: Option<File>,
    handler: Option<Handler>,
}

impl Image {
    /// Reads the state, and has the memory come from where the request says.
    fn open(request: &LoadSnapshot, ours: &VmConfig, descriptors: &Descriptors) -> Result<Self> {
        let mut file = descriptors.file(&request.snapshot_path, "state file", Access::Read)?;
        let saved = snapshot::read(&mut file)?;
        let config = request.apply(saved.config.clone(), ours)?;
        let backend = request.memory()?;
        let (memory, pages) = (super::memory(&config)?, FilePages::default());
        let (mut memory_file, mut handler) = (None, None);
        match backend.backend_type {
            BackendType::File => {
                let file = descriptors.file(&backend.backend_path, "memory file", Access::Read)?;
                let file = MemoryFile::open(file, saved.id, memory::bytes(&memory))?;
                memory::map_all(&memory, &pages, &file)?;
                memory_file = Some(file);
            }
            BackendType::Uffd => {
                let stream = descriptors.stream(&backend.backend_path, "page-fault handler")?;
                let handed = descriptors.has(USERFAULTFD_NAME);
                let name = if handed { USERFAULTFD_NAME } else { "/dev/userfaultfd" };
                let device = descriptors.file(name, "userfaultfd", Access::Read).ok();
                handler = Some(Handler::connect(&memory, stream, device)?);
            }
        }
        Ok(Self { saved, config, memory, pages, memory_file, handler })
    }
}

impl Preboot {
    /// Makes the machine of a snapshot, paused where it was, all threads parked behind their filters. Its configuration is the
    /// snapshot's, as the request changes it.
    ///
    /// # Errors
    /// Any; nothing is left behind then.
    pub fn restore(&self, request: &LoadSnapshot) -> Result<Held> {
        let (ours, descriptors) = (&self.config, &self.descriptors);
        let (empty, image) = self.while_made(|_| Image::open(request, ours, descriptors))?;
        self.with(image.config.clone()).load(request, empty, image)
    }

    fn load(&self, request: &LoadSnapshot, empty: EmptyVm, image: Image) -> Result<Held> {
        let Image { saved, memory, pages, memory_file, handler, .. } = image;
        let assembly = self.assemble(empty, &memory, &pages)?;
        let told = saved.vcpus.iter().filter_map(|vcpu| vcpu.msr(ARCH_CAPABILITIES));
        let model = CpuModel::of_snapshot(&assembly.kvm, &self.config, &saved.cpuid, told)?;
        let description = self.description(&assembly, &model)?;

        if saved.devices.len() != assembly.transports.len() {
            return Err(Error::Snapshot(format!("the state holds {} devices", saved.devices.len())));
        }
        for (transport, state) in assembly.transports.iter().zip(&saved.devices) {
            transport.restore(state)?;
        }
        let passed = if request.clock_realtime { saved.age() } else { Duration::ZERO };
        assembly.serial.restore(saved.serial).map_err(Error::io("serial port"))?;
        assembly.vm.restore(&saved.vm, passed)?;
        if let (Some(cpus), Some(state)) = (&assembly.cpus, saved.cpus)
            && !cpus.restore(state)
        {
            return Err(Error::Snapshot("the state of its CPUs cannot be".into()));
        }
        model.check_addresses(assembly.reach.last_addr().raw_value())?;
        if saved.vcpus.len() != usize::from(model.vcpus()) {
            return Err(Error::Snapshot(format!("the state holds {} CPUs", saved.vcpus.len())));
        }
        let vcpus = assembly.vcpus(&model, None)?;
        for (vcpu, state) in vcpus.iter().zip(saved.vcpus) {
            vcpu.load(state, passed)?;
        }
        // What was raised before the interrupt controllers had their state is gone; an interrupt too many does no harm.
        for transport in &assembly.transports {
            transport.remind().map_err(Error::io("raising a device's interrupt"))?;
        }
        // The guest learns that it is not the only one that comes from this snapshot.
        memory
            .write_slice(&description.generation_id, GuestAddress(layout::VMGENID_START))
            .map_err(Error::memory("VM generation id"))?;
        vmclock::disrupt(&memory)?;
        assembly
            .power
            .restore(saved.power_events)
            .map_err(Error::io("raising the generation's interrupt"))?;
        // Without its kernel the guest can do all but reset itself.
        let cmdline = self.cmdline(&assembly.windows, &model)?;
        let payload = self.payload().ok().map(|payload| Payload { cmdline, pages: pages.clone(), ..payload });
        let parts = self.parts(assembly, vcpus, memory, pages, description)?;
        Ok(Held::new(Parts {
            payload,
            memory_file,
            handler,
            tables: model.into_tables(),
            base: Some(saved.id),
            ..parts
        }))
    }
}
