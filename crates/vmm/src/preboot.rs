//! Before the start: the configuration may be changed, files may be opened, nothing of a guest exists.
//!
//! ```text
//!   Preboot ──build, restore──▶ Held ──start──▶ Running
//!            (files opened, VM made,           (vCPUs run)
//!             threads parked behind
//!             their filters)
//! ```
//! What is illegal in a phase is no method of its type.

use std::io::IsTerminal;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kvm_ioctls::Kvm;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::acpi::{Processors, VirtioWindow};
use crate::boot::{self, Description, Payload};
use crate::config::{
    self, BalloonConfig, BootSource, DEFAULT_BOOT_ARGS, Drive, MachineConfig, MachineConfigUpdate,
    MemoryHotplugConfig, NetworkInterface, RateLimiter, SerialConfig, SmbiosConfig, VmConfig, VsockConfig,
    parse_mac,
};
use crate::console::ConsoleWriter;
use crate::cpu::registers::Entry;
use crate::descriptors::{Access, Descriptors};
use crate::devices::cpus::{self, Cpus, registers::CpusState};
use crate::devices::power::{self, KeyboardReset, Power};
use crate::devices::serial::{SerialPort, Sink};
use crate::devices::virtio::Interrupt;
use crate::devices::virtio::balloon::Balloon;
use crate::devices::virtio::block::{self, Block};
use crate::devices::virtio::entropy::{Entropy, host_random};
use crate::devices::virtio::mem::Mem;
use crate::devices::virtio::mmio::{QUEUE_NOTIFY, Shared, Transport};
use crate::devices::virtio::net::tap::TapDevice;
use crate::devices::virtio::net::{Limits, Net};
use crate::devices::virtio::pace::Pace;
use crate::devices::virtio::vsock::Vsock;
use crate::error::{Error, Result};
use crate::event_loop::{EventLoop, Notifier};
use crate::layout;
use crate::memory::{self, FilePages, Memory, Range, Tracking};
use crate::running::devices::Steered;
use crate::running::{Held, Parts};
use crate::seccomp::Filters;
use crate::snapshot::lazy::Handler;
use crate::snapshot::requests::{BackendType, LoadSnapshot};
use crate::snapshot::{self, MemoryFile, SavedMachine};
use crate::status::StatusWriter;
use crate::vcpu::{Buses, Stop, VcpuHandle};
use crate::vm::{CpuModel, Vm, msr_indices, open_kvm};

/// Name of the handed `/dev/kvm`.
pub const KVM_NAME: &str = "kvm";
/// Name of the handed `/dev/userfaultfd`.
pub const USERFAULTFD_NAME: &str = "userfaultfd";

/// The controller before the start.
#[derive(Debug)]
pub struct Preboot {
    config: VmConfig,
    descriptors: Descriptors,
}

impl Preboot {
    /// Starts from a configuration, which may be empty.
    #[must_use]
    pub const fn new(config: VmConfig, descriptors: Descriptors) -> Self {
        Self { config, descriptors }
    }

    /// The configuration as it is.
    #[must_use]
    pub const fn config(&self) -> &VmConfig {
        &self.config
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
        self.change(|config| config.machine_config = machine)
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

    /// Adds an interface, or replaces the one of the same id.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn set_network_interface(&mut self, interface: NetworkInterface) -> Result<()> {
        self.change(|config| put(&mut config.network_interfaces, interface, |i| i.iface_id.clone()))
    }

    /// Adds the entropy device.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn set_entropy(&mut self, entropy: config::Entropy) -> Result<()> {
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
        let machine = &config.machine_config;
        let mut payload = self.payload()?;
        let memory = self.memory()?;
        let pages = payload.pages.clone();
        let assembly = self.assemble(&memory, &pages)?;
        payload.cmdline = self.cmdline(&assembly.windows);
        let description = self.description(&assembly);
        let entry = boot::load(&memory, &mut payload, &description)?;
        if machine.huge_pages {
            memory::use_huge_pages(&memory);
        }
        let model = CpuModel::new(&assembly.kvm, machine.vcpus())?;
        let vcpus = assembly.vcpus(&memory, &model)?;
        reset_vcpus(&vcpus, entry)?;
        let parts = self.parts(assembly, vcpus, memory, pages, description)?;
        Ok(Held::new(Parts { payload: Some(payload), ..parts }))
    }

    /// Makes the machine of a snapshot, paused where it was, all threads parked behind their filters. Its configuration is the
    /// snapshot's, as the request changes it.
    ///
    /// # Errors
    /// Any; nothing is left behind then.
    pub fn restore(&self, request: &LoadSnapshot) -> Result<Held> {
        let mut file = self.descriptors.file(&request.snapshot_path, "state file", Access::Read)?;
        let saved = snapshot::read(&mut file)?;
        let config = request.apply(saved.config.clone(), &self.config)?;
        Self { config, descriptors: self.descriptors.clone() }.load(request, saved)
    }

    fn load(&self, request: &LoadSnapshot, saved: SavedMachine) -> Result<Held> {
        let backend = request.memory()?;
        let machine = &self.config.machine_config;

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
                let device = self
                    .descriptors
                    .has(USERFAULTFD_NAME)
                    .then(|| self.descriptors.file(USERFAULTFD_NAME, "userfaultfd", Access::Read));
                (None, Some(Handler::connect(&memory, stream, device.transpose()?)?))
            }
        };
        let assembly = self.assemble(&memory, &pages)?;
        let description = self.description(&assembly);
        let model = CpuModel::new(&assembly.kvm, machine.vcpus())?.of_snapshot(&saved.cpuid)?;

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
        let vcpus = assembly.vcpus(&memory, &model)?;
        for (vcpu, state) in vcpus.iter().zip(saved.vcpus) {
            vcpu.load(state, passed)?;
        }
        // The guest learns that it is not the only one that comes from this snapshot.
        memory
            .write_slice(&description.generation_id, GuestAddress(layout::VMGENID_START))
            .map_err(Error::memory("VM generation id"))?;
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
            tables: model.tables,
            base: Some(saved.id),
            ..parts
        }))
    }

    /// Where memory that comes and goes is, if there is any.
    fn hotplug(&self) -> Option<(MemoryHotplugConfig, Range)> {
        let config = self.config.memory_hotplug?;
        let MemoryHotplugConfig { total_size_mib, block_size_mib, .. } = config;
        let mem_size_mib = self.config.machine_config.mem_size_mib;
        Some((config, memory::hotplug_range(mem_size_mib, total_size_mib, block_size_mib)))
    }

    fn memory(&self) -> Result<Memory> {
        let machine = &self.config.machine_config;
        let tracking = if machine.track_dirty_pages { Tracking::On } else { Tracking::Off };
        memory::create_with(machine.mem_size_mib, self.hotplug().map(|(_, range)| range), tracking)
    }

    fn description(&self, assembly: &Assembly) -> Description {
        let mut generation_id = [0; 16];
        host_random(&mut generation_id);
        Description {
            processors: Processors {
                count: self.config.machine_config.vcpu_count,
                max: self.config.machine_config.max_vcpu_count,
            },
            windows: assembly.windows.clone(),
            acpi: self.config.machine_config.acpi,
            smbios: self.config.smbios.clone().unwrap_or_default(),
            generation_id,
        }
    }

    /// Makes the machine and its devices around this memory, as after power-on.
    fn assemble(&self, memory: &Memory, pages: &FilePages) -> Result<Assembly> {
        let filters = Filters::new()?;
        let handed =
            self.descriptors.has(KVM_NAME).then(|| self.descriptors.handed(KVM_NAME, "KVM")).transpose()?;
        let kvm = open_kvm(handed)?;
        let vm = Vm::new(&kvm, memory)?;

        let mut buses = Buses::default();
        let mut event_loop = EventLoop::new()?;
        let serial = self.serial(&vm, &mut event_loop)?;
        let power = Arc::new(Power::new(vm.interrupt_line(layout::GED_GSI)?));
        buses.ports.insert(u64::from(layout::SERIAL_PORT), 8, Arc::clone(&serial) as _);
        buses.ports.insert(u64::from(layout::POWER_PORT), u64::from(power::SIZE), Arc::clone(&power) as _);
        buses.ports.insert(u64::from(layout::I8042_COMMAND_PORT), 1, Arc::new(KeyboardReset));

        let (notifier, stops, stop_bell) = Notifier::new()?;
        let machine = &self.config.machine_config;
        let cpus = machine.max_vcpu_count.map(|max| {
            let state = CpusState::new(machine.vcpu_count, max);
            Ok(Arc::new(Cpus::new(state, Arc::clone(&power), notifier.bell()?)))
        });
        let cpus = cpus.transpose()?;
        if let Some(cpus) = &cpus {
            buses.ports.insert(u64::from(layout::CPUS_PORT), u64::from(cpus::SIZE), Arc::clone(cpus) as _);
        }

        let balloon = self.balloon(pages)?;
        let mut steered = Steered::default();
        let mut transports = Vec::new();
        let mut windows = Vec::new();
        let mem = self
            .hotplug()
            .map(|(config, range)| Arc::new(Mutex::new(Mem::new(config, range, pages.clone()))));
        let mut devices = self.virtio_devices(balloon.as_ref(), &mut steered)?;
        devices.extend(mem.clone().map(|mem| mem as Shared));
        for (index, device) in devices.into_iter().enumerate() {
            let window = VirtioWindow {
                address: layout::VIRTIO_MMIO_START + layout::VIRTIO_MMIO_SIZE * index as u64,
                gsi: layout::VIRTIO_GSIS[index],
            };
            let interrupt = Arc::new(Interrupt::new(vm.interrupt_line(window.gsi)?));
            let queues = crate::devices::virtio::mmio::lock(&device).queue_sizes().len();
            let bells: Vec<EventFd> = (0..queues)
                .map(|queue| vm.bell(window.address + QUEUE_NOTIFY, u32::try_from(queue).unwrap_or(0)))
                .collect::<Result<_>>()?;
            event_loop.add_device(&device, &bells)?;
            let transport = Arc::new(Transport::new(device, memory.clone(), interrupt, bells));
            buses.mmio.insert(window.address, layout::VIRTIO_MMIO_SIZE, Arc::clone(&transport) as _);
            transports.push(transport);
            windows.push(window);
        }
        let buses = Arc::new(buses);
        Ok(Assembly {
            filters,
            kvm,
            vm,
            buses,
            event_loop,
            mem,
            serial,
            power,
            cpus,
            balloon,
            transports,
            windows,
            notifier,
            stops,
            stop_bell,
            steered,
        })
    }

    /// Puts the parts together; the device thread starts.
    fn parts(
        &self,
        assembly: Assembly,
        vcpus: Vec<VcpuHandle>,
        memory: Memory,
        pages: FilePages,
        description: Description,
    ) -> Result<Parts> {
        let devices = assembly.event_loop.start(Arc::clone(&assembly.filters.devices))?;
        self.descriptors.lock();
        Ok(Parts {
            vcpus,
            devices,
            kvm: assembly.kvm,
            tables: Vec::new(),
            vm: assembly.vm,
            memory,
            pages,
            payload: None,
            memory_file: None,
            handler: None,
            base: None,
            description,
            transports: assembly.transports,
            balloon: assembly.balloon,
            mem: assembly.mem,
            steered: assembly.steered,
            serial: assembly.serial,
            power: assembly.power,
            cpus: assembly.cpus,
            stops: assembly.stops,
            stop_bell: assembly.stop_bell,
            on_reset: self.config.machine_config.on_reset,
            descriptors: self.descriptors.clone(),
            config: self.config.clone(),
            api_filter: assembly.filters.api,
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

    fn cmdline(&self, windows: &[VirtioWindow]) -> String {
        let boot_args = self.config.boot_source.as_ref().and_then(|boot| boot.boot_args.as_deref());
        let mut cmdline = boot_args.unwrap_or(DEFAULT_BOOT_ARGS).to_owned();
        if let Some(root) = self.config.drives.iter().find(|drive| drive.is_root_device)
            && !cmdline.split(' ').any(|word| word.starts_with("root="))
        {
            cmdline.push_str(" root=/dev/vda ");
            cmdline.push_str(if root.is_read_only { "ro" } else { "rw" });
        }
        if !self.config.machine_config.acpi {
            for window in windows {
                let size = layout::VIRTIO_MMIO_SIZE >> 10;
                cmdline
                    .push_str(&format!(" virtio_mmio.device={size}K@{:#x}:{}", window.address, window.gsi));
            }
        }
        cmdline.trim_start().to_owned()
    }

    fn serial(&self, vm: &Vm, event_loop: &mut EventLoop) -> Result<Arc<SerialPort>> {
        let stand_alone = SerialConfig {
            output: Some("stdout".into()),
            input: std::io::stdin().is_terminal().then(|| "stdin".into()),
        };
        let config = self.config.serial.as_ref().unwrap_or(&stand_alone);
        let stream = |number, what| {
            let borrowed = crate::descriptors::take_standard(number);
            borrowed.map(std::fs::File::from).map_err(Error::io(what))
        };
        let sink = match config.output.as_deref() {
            None => Sink::Null,
            Some("stdout") if !self.descriptors.has("stdout") => Sink::File(stream(1, "duplicating stdout")?),
            Some(name) => {
                let file = self.descriptors.file(name, "console", Access::CreateReadWrite)?;
                let ring = ConsoleWriter::new(&file).map_err(Error::io(format!("console {name:?}")))?;
                Sink::Ring(ring)
            }
        };
        let line = vm.interrupt_line(layout::SERIAL_GSI)?;
        let serial = Arc::new(SerialPort::new(line, sink).map_err(Error::io("serial port"))?);
        let input = match config.input.as_deref() {
            None => None,
            Some("stdin") if !self.descriptors.has("stdin") => Some(stream(0, "duplicating stdin")?),
            Some(name) => Some(self.descriptors.file(name, "console input", Access::Read)?),
        };
        if let Some(file) = input {
            event_loop.add_input(&serial, file)?;
        }
        Ok(serial)
    }

    /// The devices in the order of their windows: the root disk, the other disks, interfaces, entropy, balloon, vsock; memory that
    /// comes and goes is put behind them.
    fn virtio_devices(
        &self,
        balloon: Option<&Arc<Mutex<Balloon>>>,
        steered: &mut Steered,
    ) -> Result<Vec<Shared>> {
        let mut devices: Vec<Shared> = Vec::new();
        let mut drives: Vec<&Drive> = self.config.drives.iter().collect();
        drives.sort_by_key(|drive| !drive.is_root_device);
        for drive in drives {
            let disk = Arc::new(Mutex::new(self.block(drive)?));
            devices.push(Arc::clone(&disk) as _);
            steered.disks.push(disk);
        }
        for (index, interface) in self.config.network_interfaces.iter().enumerate() {
            let net = Arc::new(Mutex::new(self.net(interface, index)?));
            devices.push(Arc::clone(&net) as _);
            steered.interfaces.push(net);
        }
        if self.config.entropy.is_some() {
            devices.push(Arc::new(Mutex::new(Entropy::default())));
        }
        if let Some(balloon) = balloon {
            devices.push(Arc::clone(balloon) as _);
        }
        if let Some(config) = &self.config.vsock {
            let folder = self.descriptors.folder(config.place().0, "folder of vsock sockets")?;
            let vsock = Vsock::new(config, folder).map_err(Error::io("the vsock device's epoll"))?;
            devices.push(Arc::new(Mutex::new(vsock)));
        }
        Ok(devices)
    }

    fn balloon(&self, pages: &FilePages) -> Result<Option<Arc<Mutex<Balloon>>>> {
        let Some(config) = &self.config.balloon else { return Ok(None) };
        let balloon = Balloon::new(config, pages.clone()).map_err(Error::io("the balloon's timer"))?;
        Ok(Some(Arc::new(Mutex::new(balloon))))
    }

    fn block(&self, drive: &Drive) -> Result<Block> {
        let opened = block::config::open(drive, &self.descriptors)?;
        let pace = pace(drive.rate_limiter, &drive.drive_id)?;
        Block::new(drive, opened, pace).map_err(Error::io("a disk's eventfd"))
    }

    fn net(&self, interface: &NetworkInterface, index: usize) -> Result<Net> {
        let name = &interface.host_dev_name;
        let tap = if self.descriptors.has(name) {
            TapDevice::from_fd(self.descriptors.handed(name, "tap")?)
        } else {
            TapDevice::open(name)
        };
        let tap = tap.map_err(Error::io(format!("tap {name:?}")))?;
        let mac = match &interface.guest_mac {
            Some(mac) => parse_mac(mac)?,
            None => [0x06, 0, 0, 0, 0, u8::try_from(index + 1).unwrap_or(u8::MAX)],
        };
        let limits = Limits {
            rx: pace(interface.rx_rate_limiter, &interface.iface_id)?,
            tx: pace(interface.tx_rate_limiter, &interface.iface_id)?,
        };
        Ok(Net::new(interface.iface_id.clone(), mac, interface.mtu, tap, limits))
    }
}

/// A machine with its devices, before its vCPUs.
struct Assembly {
    filters: Filters,
    kvm: Kvm,
    vm: Vm,
    buses: Arc<Buses>,
    event_loop: EventLoop,
    serial: Arc<SerialPort>,
    power: Arc<Power>,
    balloon: Option<Arc<Mutex<Balloon>>>,
    cpus: Option<Arc<Cpus>>,
    mem: Option<Arc<Mutex<Mem>>>,
    steered: Steered,
    transports: Vec<Arc<Transport>>,
    windows: Vec<VirtioWindow>,
    notifier: Notifier,
    stops: Receiver<Stop>,
    stop_bell: EventFd,
}

impl Assembly {
    /// Makes the vCPUs, parked.
    fn vcpus(&self, memory: &Memory, model: &CpuModel) -> Result<Vec<VcpuHandle>> {
        let msrs = msr_indices(&self.kvm)?;
        (0..model.topology.vcpus)
            .map(|id| {
                let (notifier, filter) = (self.notifier.try_clone()?, Arc::clone(&self.filters.vcpu));
                VcpuHandle::start(&self.vm, (model, &msrs), id, &self.buses, memory, notifier, filter)
            })
            .collect()
    }
}

/// The limits of a device, with their timer.
fn pace(limits: Option<RateLimiter>, id: &str) -> Result<Pace> {
    Pace::new(limits).map_err(Error::io(format!("a timer for the limits of {id:?}")))
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
