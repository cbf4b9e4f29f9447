//! A machine from a snapshot.

use std::time::Duration;

use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend};

use super::{Preboot, USERFAULTFD_NAME};
use crate::cpu::model::CpuModel;
use crate::cpu::template::msrs::ARCH_CAPABILITIES;
use crate::descriptors::Access;
use crate::error::{Error, Result};
use crate::layout;
use crate::memory::{self, FilePages};
use crate::running::{Held, Parts};
use crate::snapshot::lazy::Handler;
use crate::snapshot::requests::{BackendType, LoadSnapshot};
use crate::snapshot::{self, MemoryFile, SavedMachine};
use crate::vmclock;

impl Preboot {
    /// Makes the machine of a snapshot, paused where it was, all threads parked behind their filters. Its configuration is the
    /// snapshot's, as the request changes it.
    ///
    /// # Errors
    /// Any; nothing is left behind then.
    pub fn restore(&self, request: &LoadSnapshot) -> Result<Held> {
        let mut file = self.descriptors.file(&request.snapshot_path, "state file", Access::Read)?;
        let saved = snapshot::read(&mut file)?;
        let config = request.apply(saved.config.clone(), &self.config)?;
        self.with(config).load(request, saved)
    }

    fn load(&self, request: &LoadSnapshot, saved: SavedMachine) -> Result<Held> {
        let backend = request.memory()?;
        let memory = self.memory()?;
        let pages = FilePages::default();
        let (memory_file, handler) = match backend.backend_type {
            BackendType::File => {
                let file = self.descriptors.file(&backend.backend_path, "memory file", Access::Read)?;
                let file = MemoryFile::open(file, saved.id, memory::bytes(&memory))?;
                memory::map_all(&memory, &pages, &file)?;
                (Some(file), None)
            }
            BackendType::Uffd => {
                let stream = self.descriptors.stream(&backend.backend_path, "page-fault handler")?;
                let name = if self.descriptors.has(USERFAULTFD_NAME) {
                    USERFAULTFD_NAME
                } else {
                    "/dev/userfaultfd"
                };
                let device = self.descriptors.file(name, "userfaultfd", Access::Read).ok();
                (None, Some(Handler::connect(&memory, stream, device)?))
            }
        };
        let empty = self.empty.take().map_or_else(|| self.empty_vm(), Ok)?;
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
        let payload = self.payload().ok().map(|mut payload| {
            payload.cmdline = self.cmdline(&assembly.windows);
            payload.pages = pages.clone();
            payload
        });
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
