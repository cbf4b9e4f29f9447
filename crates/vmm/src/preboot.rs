//! Before the start: the configuration may be changed, files may be opened, nothing of a guest exists.
//!
//! ```text
//!   Preboot ──build, restore──▶ Held ──start──▶ Running
//!            (files opened, VM made,           (vCPUs run)
//!             threads parked behind
//!             their filters)
//! ```
//! What is illegal in a phase is no method of its type.

mod assembly;
mod restore;

use std::cell::RefCell;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::time::Duration;

use vm_memory::{Address, GuestMemoryBackend};

use crate::acpi::{Processors, VirtioWindow};
use crate::boot::ahead::Image;
use crate::boot::cmdline::CommandLine;
use crate::boot::{self, Description, Payload};
use crate::config::{
    BalloonConfig, BootSource, DEFAULT_BOOT_ARGS, Drive, EntropyConfig, MachineConfig, MachineConfigUpdate,
    MemoryHotplugConfig, NetworkInterface, PmemConfig, SerialConfig, SmbiosConfig, VmConfig, VsockConfig,
};
use crate::cpu::cpuid::{Identity, keeps_time_by_kvmclock};
use crate::cpu::model::CpuModel;
use crate::cpu::registers::Entry;
use crate::cpu::template::{CpuConfig, CpuTemplate, Level};
use crate::descriptors::{Access, Descriptors};
use crate::devices::virtio::entropy::host_random;
use crate::devices::virtio::pmem;
use crate::error::{Error, Result};
use crate::layout;
use crate::memory::{self, FilePages, Memory, Range, Tracking};
use crate::running::{Held, Parts};
use crate::status::StatusWriter;
use crate::threads;
use crate::vcpu::VcpuHandle;
use crate::vm::EmptyVm;
use assembly::Assembly;

/// Name of the handed `/dev/kvm`.
pub const KVM_NAME: &str = "kvm";
/// Name of the handed `/dev/userfaultfd`.
pub const USERFAULTFD_NAME: &str = "userfaultfd";

/// Longest CPU template that is read; one with every leaf of a large server's CPU has 100 KB.
const MAX_TEMPLATE: u64 = 1 << 20;

/// The controller before the start.
#[derive(Debug)]
pub struct Preboot {
    config: VmConfig,
    descriptors: Descriptors,
    /// KVM's machine, made ahead: the first build takes it.
    empty: RefCell<Option<EmptyVm>>,
}

impl Preboot {
    /// Starts from a configuration, which may be empty.
    #[must_use]
    pub const fn new(config: VmConfig, descriptors: Descriptors) -> Self {
        Self { config, descriptors, empty: RefCell::new(None) }
    }

    /// Makes KVM's machine now, while nobody waits for it. Where that fails, the build will say why.
    pub fn prepare(&self) {
        self.empty.replace(self.empty_vm().ok());
    }

    /// The same with another configuration. What was made ahead goes with it.
    fn with(&self, config: VmConfig) -> Self {
        Self { config, descriptors: self.descriptors.clone(), empty: RefCell::new(self.empty.take()) }
    }

    fn empty_vm(&self) -> Result<EmptyVm> {
        EmptyVm::new(self.handed_kvm()?)
    }

    fn handed_kvm(&self) -> Result<Option<OwnedFd>> {
        self.descriptors.has(KVM_NAME).then(|| self.descriptors.handed(KVM_NAME, "KVM")).transpose()
    }

    /// KVM's machine, and what the work comes to: both at once where the machine has not been made ahead. The work can ask whether KVM is
    /// not done after so long.
    fn while_made<T: Send>(
        &self,
        work: impl FnOnce(&dyn Fn(Duration) -> bool) -> Result<T> + Send,
    ) -> Result<(EmptyVm, T)> {
        let (empty, done) = match self.empty.take() {
            Some(empty) => (Ok(empty), work(&|_| false)),
            None => {
                let handed = self.handed_kvm()?;
                threads::meanwhile(threads::LOADER, || EmptyVm::new(handed), work)?
            }
        };
        match done {
            Ok(done) => Ok((empty?, done)),
            Err(error) => {
                // The next build takes it.
                self.empty.replace(empty.ok());
                Err(error)
            }
        }
    }

    /// The configuration as it is.
    #[must_use]
    pub const fn config(&self) -> &VmConfig {
        &self.config
    }

    /// The same, to note what changes beside the machine.
    pub(crate) const fn config_mut(&mut self) -> &mut VmConfig {
        &mut self.config
    }

    /// The descriptors that the configuration's names are looked up among.
    #[must_use]
    pub const fn descriptors(&self) -> &Descriptors {
        &self.descriptors
    }

    /// Changes the configuration, if the result makes sense; otherwise it stays as it was.
    fn change(&mut self, change: impl FnOnce(&mut VmConfig)) -> Result<()> {
        let mut config = self.config.clone();
        change(&mut config);
        config.check()?;
        self.config = config;
        Ok(())
    }

    /// Sets what is booted.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn set_boot_source(&mut self, boot: BootSource) -> Result<()> {
        self.change(|config| config.boot_source = Some(boot))
    }

    /// Sets CPUs and memory.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn set_machine_config(&mut self, machine: MachineConfig) -> Result<()> {
        self.change(|config| {
            // The template that was named last counts.
            if !machine.cpu_template.is_none() {
                config.cpu_config = None;
            }
            config.machine_config = machine;
        })
    }

    /// Sets the CPU template, in place of any other.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn set_cpu_config(&mut self, template: CpuTemplate) -> Result<()> {
        self.change(|config| {
            config.cpu_config = Some(CpuConfig::Template(template));
            config.machine_config.cpu_template = Level::None;
        })
    }

    /// Changes some of it.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn change_machine_config(&mut self, update: MachineConfigUpdate) -> Result<()> {
        self.change(|config| {
            let machine = &mut config.machine_config;
            machine.vcpu_count = update.vcpu_count.unwrap_or(machine.vcpu_count);
            machine.mem_size_mib = update.mem_size_mib.unwrap_or(machine.mem_size_mib);
        })
    }

    /// Adds a disk, or replaces the one of the same id.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn set_drive(&mut self, drive: Drive) -> Result<()> {
        self.change(|config| put(&mut config.drives, drive, |d| d.drive_id.clone()))
    }

    /// Adds a file to the guest's memory, or replaces the one of the same id.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn set_pmem(&mut self, pmem: PmemConfig) -> Result<()> {
        self.change(|config| put(&mut config.pmem, pmem, |p| p.id.clone()))
    }

    /// Adds an interface, or replaces the one of the same id.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn set_network_interface(&mut self, interface: NetworkInterface) -> Result<()> {
        self.change(|config| put(&mut config.network_interfaces, interface, |i| i.iface_id.clone()))
    }

    /// Adds the entropy device, or replaces it.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn set_entropy(&mut self, entropy: EntropyConfig) -> Result<()> {
        self.change(|config| config.entropy = Some(entropy))
    }

    /// Adds the balloon, or replaces it.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn set_balloon(&mut self, balloon: BalloonConfig) -> Result<()> {
        self.change(|config| config.balloon = Some(balloon))
    }

    /// Adds memory that comes and goes, or replaces it.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn set_memory_hotplug(&mut self, hotplug: MemoryHotplugConfig) -> Result<()> {
        self.change(|config| config.memory_hotplug = Some(hotplug))
    }

    /// Adds the vsock device, or replaces it.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn set_vsock(&mut self, vsock: VsockConfig) -> Result<()> {
        self.change(|config| config.vsock = Some(vsock))
    }

    /// Sets where the console goes.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn set_serial(&mut self, serial: SerialConfig) -> Result<()> {
        self.change(|config| config.serial = Some(serial))
    }

    /// Sets the DMI strings.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn set_smbios(&mut self, smbios: SmbiosConfig) -> Result<()> {
        self.change(|config| config.smbios = Some(smbios))
    }

    /// The status file that the configuration names.
    ///
    /// # Errors
    /// [`Error::Open`].
    pub fn open_status(&self) -> Result<StatusWriter> {
        let file = match &self.config.status {
            Some(name) => Some(self.descriptors.file(name, "status file", Access::Append)?),
            None => None,
        };
        Ok(StatusWriter::new(file))
    }

    /// Opens every file, makes the machine, loads the kernel, starts all threads (parked, behind their filters).
    /// The calling thread is not locked down yet: [`Held::lock_down`] does that.
    ///
    /// # Errors
    /// Any; nothing is left behind then.
    pub fn build(&self) -> Result<Held> {
        let config = &self.config;
        config.check()?;
        if let Some(request) = &config.snapshot {
            return self.restore(request);
        }
        if let Some(CpuConfig::Named(name)) = &config.cpu_config {
            let template = self.read_template(name)?;
            let config = VmConfig { cpu_config: Some(CpuConfig::Template(template)), ..config.clone() };
            return self.with(config).build();
        }
        let machine = &config.machine_config;
        let payload = self.payload()?;
        let memory = self.memory()?;
        if machine.huge_pages {
            memory::use_small_pages(&memory);
        }
        let pages = payload.pages.clone();
        // Where it is noted which pages are written, KVM has no huge ones.
        let moves = machine.huge_pages && !machine.track_dirty_pages;
        let (empty, image) = self.while_made(|waits| {
            let mut image = Image::load(&memory, payload, moves)?;
            image.move_while(&memory, waits)?;
            Ok(image)
        })?;
        let Image { mut payload, files, code } = image;
        let assembly = self.assemble(empty, &memory, &pages)?;
        let model = CpuModel::new(&assembly.kvm, config)?;
        payload.cmdline = self.cmdline(&assembly.windows, &model)?;
        let description = self.description(&assembly, &model)?;
        let entry = boot::enter(&memory, &payload.cmdline, &description, files)?;
        if machine.huge_pages {
            memory::use_huge_pages(&memory);
        }
        model.check_addresses(assembly.reach.last_addr().raw_value())?;
        let vcpus = assembly.vcpus(&model, code.as_ref().map(|code| &code.runs))?;
        reset_vcpus(&vcpus, entry)?;
        let parts = self.parts(assembly, vcpus, memory, pages, description)?;
        Ok(Held::new(Parts { payload: Some(payload), code, ..parts }))
    }

    fn read_template(&self, name: &str) -> Result<CpuTemplate> {
        let file = self.descriptors.file(name, "CPU template", Access::Read)?;
        let mut text = String::new();
        file.take(MAX_TEMPLATE)
            .read_to_string(&mut text)
            .map_err(Error::io(format!("reading the CPU template {name:?}")))?;
        CpuTemplate::from_json(&text)
    }

    /// Where memory that comes and goes is, if there is any.
    fn hotplug(&self) -> Option<(MemoryHotplugConfig, Range)> {
        hotplug(&self.config)
    }

    fn memory(&self) -> Result<Memory> {
        memory(&self.config)
    }

    fn description(&self, assembly: &Assembly, model: &CpuModel) -> Result<Description> {
        let mut generation_id = [0; 16];
        host_random(&mut generation_id);
        Ok(Description {
            processors: Processors {
                count: self.config.machine_config.vcpu_count,
                max: self.config.machine_config.max_vcpu_count,
            },
            identity: Identity::of(&model.table(0)?),
            windows: assembly.windows.clone(),
            acpi: self.config.machine_config.acpi,
            smbios: self.config.smbios.clone().unwrap_or_default(),
            generation_id,
        })
    }

    fn payload(&self) -> Result<Payload> {
        let boot = self.config.boot_source.as_ref();
        let boot =
            boot.ok_or_else(|| Error::Config("boot-source is missing: what should be booted?".into()))?;
        let initrd = match &boot.initrd_path {
            Some(name) => Some(self.descriptors.file(name, "initrd", Access::Read)?),
            None => None,
        };
        Ok(Payload {
            kernel: self.descriptors.file(&boot.kernel_image_path, "kernel", Access::Read)?,
            initrd,
            cmdline: String::new(),
            protocol: boot.boot_protocol,
            pages: FilePages::default(),
        })
    }

    fn cmdline(&self, windows: &[VirtioWindow], model: &CpuModel) -> Result<String> {
        let boot_args = self.config.boot_source.as_ref().and_then(|boot| boot.boot_args.as_deref());
        let mut line = CommandLine::new(boot_args.unwrap_or(DEFAULT_BOOT_ARGS));
        if let Some(root) = self.config.drives.iter().find(|drive| drive.is_root_device)
            && !line.says("root=")
        {
            line.add(if root.is_read_only { "root=/dev/vda ro" } else { "root=/dev/vda rw" });
        }
        line.add(&pmem::config::root_words(&self.config.pmem, line.kernel()));
        if !self.config.machine_config.acpi {
            for window in windows {
                let size = layout::VIRTIO_MMIO_SIZE >> 10;
                line.add(&format!("virtio_mmio.device={size}K@{:#x}:{}", window.address, window.gsi));
            }
        }
        if keeps_time_by_kvmclock(model.table(0)?.as_slice()) {
            line.trust_clock();
        }
        Ok(line.finish())
    }
}

/// Where memory that comes and goes is, if there is any.
fn hotplug(config: &VmConfig) -> Option<(MemoryHotplugConfig, Range)> {
    let hotplug = config.memory_hotplug?;
    let MemoryHotplugConfig { total_size_mib, block_size_mib, .. } = hotplug;
    let mem_size_mib = config.machine_config.mem_size_mib;
    Some((hotplug, memory::hotplug_range(mem_size_mib, total_size_mib, block_size_mib)))
}

fn memory(config: &VmConfig) -> Result<Memory> {
    let machine = &config.machine_config;
    let tracking = if machine.track_dirty_pages { Tracking::On } else { Tracking::Off };
    memory::create_with(machine.mem_size_mib, hotplug(config).map(|(_, range)| range), tracking)
}

/// Puts all vCPUs into the state after power-on, the first one at the kernel's entry.
///
/// # Errors
/// [`Error::Kvm`].
pub(crate) fn reset_vcpus(vcpus: &[VcpuHandle], entry: Entry) -> Result<()> {
    for (index, vcpu) in vcpus.iter().enumerate() {
        vcpu.reset((index == 0).then_some(entry))?;
    }
    Ok(())
}

fn put<T>(list: &mut Vec<T>, item: T, key: impl Fn(&T) -> String) {
    match list.iter().position(|other| key(other) == key(&item)) {
        Some(index) => list[index] = item,
        None => list.push(item),
    }
}
