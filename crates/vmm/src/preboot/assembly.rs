//! Puts a machine and its devices together around its memory, for a start and for a snapshot alike.

use std::io::IsTerminal;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex};

use kvm_ioctls::Kvm;
use vmm_sys_util::eventfd::EventFd;

use super::Preboot;
use crate::acpi::VirtioWindow;
use crate::boot::Description;
use crate::config::{Drive, NetworkInterface, PmemConfig, RateLimiter, SerialConfig, parse_mac};
use crate::console::ConsoleWriter;
use crate::cpu::model::CpuModel;
use crate::descriptors::Access;
use crate::devices::cpus::{self, Cpus, registers::CpusState};
use crate::devices::power::{self, KeyboardReset, Power};
use crate::devices::serial::{SerialPort, Sink};
use crate::devices::virtio::Interrupt;
use crate::devices::virtio::balloon::Balloon;
use crate::devices::virtio::block::{self, Block};
use crate::devices::virtio::entropy::Entropy;
use crate::devices::virtio::mem::Mem;
use crate::devices::virtio::mmio::page::Pages;
use crate::devices::virtio::mmio::{ACKNOWLEDGE, QUEUE_NOTIFY, Shared, Transport};
use crate::devices::virtio::net::{Limits, Net};
use crate::devices::virtio::pace::Pace;
use crate::devices::virtio::pmem::Pmem;
use crate::devices::virtio::pmem::image::{self, Image};
use crate::devices::virtio::vsock::Vsock;
use crate::error::{Error, Result};
use crate::event_loop::{EventLoop, Notifier};
use crate::layout;
use crate::memory::{self, FilePages, Memory};
use crate::running::Parts;
use crate::running::devices::Steered;
use crate::seccomp::Filters;
use crate::vcpu::{Buses, Stop, VcpuHandle};
use crate::vm::{EmptyVm, Vm, msr_indices};

/// A machine with its devices, before its vCPUs.
pub(super) struct Assembly {
    pub(super) filters: Filters,
    pub(super) kvm: Kvm,
    pub(super) vm: Vm,
    pub(super) buses: Arc<Buses>,
    pub(super) event_loop: EventLoop,
    pub(super) serial: Arc<SerialPort>,
    pub(super) power: Arc<Power>,
    pub(super) balloon: Option<Arc<Mutex<Balloon>>>,
    pub(super) cpus: Option<Arc<Cpus>>,
    pub(super) mem: Option<Arc<Mutex<Mem>>>,
    /// RAM and all files in memory.
    pub(super) reach: Memory,
    pub(super) steered: Steered,
    pub(super) transports: Vec<Arc<Transport>>,
    pub(super) windows: Vec<VirtioWindow>,
    pub(super) notifier: Notifier,
    pub(super) stops: Receiver<Stop>,
    pub(super) stop_bell: EventFd,
}

impl Assembly {
    /// Makes the vCPUs, parked. `first` becomes true at the first exit of the one that the machine starts with.
    pub(super) fn vcpus(&self, model: &CpuModel, first: Option<&Arc<AtomicBool>>) -> Result<Vec<VcpuHandle>> {
        // A snapshot holds the template's MSRs too, whether or not KVM counts them among a vCPU's state.
        let mut msrs = msr_indices(&self.kvm)?;
        msrs.extend(model.template_msrs());
        msrs.sort_unstable();
        msrs.dedup();
        let start = |id| {
            let (notifier, filter) = (self.notifier.try_clone()?, Arc::clone(&self.filters.vcpu));
            let notifier = notifier.telling_first(first.filter(|_| id == 0).cloned());
            VcpuHandle::start(&self.vm, (model, &msrs), id, &self.buses, &self.reach, notifier, filter)
        };
        let vcpus = (0..model.vcpus()).map(start).collect::<Result<Vec<_>>>()?;
        vcpus.iter().try_for_each(VcpuHandle::wait_parked)?;
        Ok(vcpus)
    }
}

impl Preboot {
    /// Makes the machine and its devices around this memory, as after power-on.
    pub(super) fn assemble(&self, empty: EmptyVm, memory: &Memory, pages: &FilePages) -> Result<Assembly> {
        let filters = Filters::new()?;
        let images = self.images()?;
        let shown = Pages::new(self.config.virtio_devices())?;
        let (vm, kvm) = Vm::new(empty, memory, &images, shown.clone())?;
        let reach = image::reach(memory, &images)?;

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
        for pmem in self.pmem(&images)? {
            if let Some((range, discards)) = pmem.discards() {
                buses.mmio.insert(range.start, range.size, discards);
            }
            let pmem = Arc::new(Mutex::new(pmem));
            devices.push(Arc::clone(&pmem) as _);
            steered.pmem.push(pmem);
        }
        for (index, device) in devices.into_iter().enumerate() {
            let window = VirtioWindow {
                address: layout::VIRTIO_MMIO_START + layout::VIRTIO_MMIO_SIZE * index as u64,
                gsi: layout::VIRTIO_GSIS[index],
            };
            let interrupt = Arc::new(Interrupt::new(vm.interrupt_line(window.gsi)?, shown.page(index)));
            let queues = crate::devices::virtio::mmio::lock(&device).queue_sizes().len();
            let bells: Vec<EventFd> = (0..queues)
                .map(|queue| vm.bell(window.address + QUEUE_NOTIFY, u32::try_from(queue).unwrap_or(0)))
                .collect::<Result<_>>()?;
            let (register, value) = ACKNOWLEDGE;
            vm.swallow(window.address + register, value)?;
            connect(&device, &reach, &bells, &interrupt)?;
            event_loop.add_device(&device, &bells)?;
            let transport = Arc::new(Transport::new(device, reach.clone(), interrupt, bells));
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
            reach,
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
    pub(super) fn parts(
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
            code: None,
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

    fn serial(&self, vm: &Vm, event_loop: &mut EventLoop) -> Result<Arc<SerialPort>> {
        let stand_alone = SerialConfig {
            output: Some("stdout".into()),
            input: std::io::stdin().is_terminal().then(|| "stdin".into()),
            ..SerialConfig::default()
        };
        let config = self.config.serial.as_ref().unwrap_or(&stand_alone);
        let stream = |number, what| {
            let borrowed = crate::descriptors::take_standard(number);
            borrowed.map(std::fs::File::from).map_err(Error::io(what))
        };
        let sink = match (config.output.as_deref(), config.serial_out_path.as_deref()) {
            (None, None) => Sink::Null,
            (None, Some(name)) => Sink::File(self.descriptors.output(name, "console")?),
            (Some("stdout"), _) if !self.descriptors.has("stdout") => {
                Sink::Terminal(stream(1, "duplicating stdout")?)
            }
            (Some(name), _) => {
                let file = self.descriptors.file(name, "console", Access::CreateReadWrite)?;
                let ring = ConsoleWriter::new(&file).map_err(Error::io(format!("console {name:?}")))?;
                Sink::Ring(ring)
            }
        };
        let line = vm.interrupt_line(layout::SERIAL_GSI)?;
        let serial =
            Arc::new(SerialPort::new(line, sink, config.rate_limiter).map_err(Error::io("serial port"))?);
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
    /// comes and goes and files in memory are put behind them.
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
        if let Some(config) = &self.config.entropy {
            let pace = pace(config.rate_limiter, "entropy")?;
            devices.push(Arc::new(Mutex::new(Entropy::new(pace))));
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

    /// The files that the guest finds in its memory, each at its place.
    fn images(&self) -> Result<Vec<Arc<Image>>> {
        let opened = self.config.pmem.iter().map(|pmem| pmem.open(&self.descriptors));
        let opened = opened.collect::<Result<Vec<_>>>()?;
        let sizes: Vec<u64> = opened.iter().map(|(_, bytes)| image::region_size(*bytes)).collect();
        let mem_size_mib = self.config.machine_config.mem_size_mib;
        let starts = memory::file_starts(mem_size_mib, self.hotplug().map(|(_, range)| range), &sizes);
        let starts = starts
            .ok_or_else(|| Error::Config("pmem: all files together are too large for a guest".into()))?;
        let placed = opened.into_iter().zip(starts).zip(&self.config.pmem);
        placed
            .map(|(((file, bytes), start), pmem)| {
                Image::new(file, bytes, start, pmem.read_only).map(Arc::new)
            })
            .collect()
    }

    fn pmem(&self, images: &[Arc<Image>]) -> Result<Vec<Pmem>> {
        let one = |(config, image): (&PmemConfig, &Arc<Image>)| {
            let pace = pace(config.rate_limiter, &config.id)?;
            Pmem::new(config, Arc::clone(image), pace).map_err(Error::io("a pmem device's eventfd"))
        };
        self.config.pmem.iter().zip(images).map(one).collect()
    }

    fn block(&self, drive: &Drive) -> Result<Block> {
        let opened = block::config::open(drive, &self.descriptors)?;
        let pace = pace(drive.rate_limiter, &drive.drive_id)?;
        Block::new(drive, opened, pace).map_err(Error::io("a disk's eventfd"))
    }

    fn net(&self, interface: &NetworkInterface, index: usize) -> Result<Net> {
        let taps = interface.open(&self.descriptors)?;
        let mac = match &interface.guest_mac {
            Some(mac) => parse_mac(mac)?,
            None => [0x06, 0, 0, 0, 0, u8::try_from(index + 1).unwrap_or(u8::MAX)],
        };
        let limits = Limits {
            rx: pace(interface.rx_rate_limiter, &interface.iface_id)?,
            tx: pace(interface.tx_rate_limiter, &interface.iface_id)?,
        };
        let net = Net::new(interface.iface_id.clone(), mac, interface.mtu, taps, limits);
        Ok(net.with_kernel(interface.open_vhost(&self.descriptors)?))
    }
}

/// Tells the host's kernel about a device whose queues it serves.
fn connect(device: &Shared, memory: &Memory, bells: &[EventFd], interrupt: &Interrupt) -> Result<()> {
    let mut device = crate::devices::virtio::mmio::lock(device);
    let connected = device.connect(memory, bells, interrupt);
    connected.map_err(|source| Error::Io {
        what: format!("connecting {:?} with the kernel", device.name()),
        source,
    })
}

/// The limits of a device, with their timer.
fn pace(limits: Option<RateLimiter>, id: &str) -> Result<Pace> {
    Pace::new(limits).map_err(Error::io(format!("a timer for the limits of {id:?}")))
}
