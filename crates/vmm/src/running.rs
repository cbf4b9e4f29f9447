//! From the start on: the guest runs or is paused, and only what is open already is used.

mod capture;
pub(crate) mod devices;
mod resize;
mod written;

use std::fs::File;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::CpuId;
use kvm_ioctls::Kvm;
use serde::Serialize;
use vmm_sys_util::eventfd::EventFd;

use crate::boot::code::Code;
use crate::boot::{self, Description, Payload};
use crate::config::{BalloonConfig, BalloonUpdate, OnReset, StatisticsUpdate, VmConfig};
use crate::descriptors::Descriptors;
use crate::devices::cpus::{Count, Cpus};
use crate::devices::power::Power;
use crate::devices::serial::SerialPort;
use crate::devices::virtio::balloon::Balloon;
use crate::devices::virtio::mem::Mem;
use crate::devices::virtio::mmio::{Transport, lock};
use crate::error::{Error, Result};
use crate::event_loop::DeviceThread;
use crate::exit::ExitCode;
use crate::memory::{self, FilePages, Memory};
use crate::preboot::reset_vcpus;
use crate::seccomp;
use crate::snapshot::lazy::Handler;
use crate::snapshot::requests::CreateSnapshot;
use crate::status::{Event, ExitReason, StatusWriter, boottime_ns};
use crate::vcpu::{Stop, VcpuHandle};
use crate::vm::Vm;

/// Everything that a machine is made of. Threads come first: they end before what they use.
pub(crate) struct Parts {
    pub vcpus: Vec<VcpuHandle>,
    #[allow(dead_code)] // owned for its end
    pub devices: DeviceThread,
    pub kvm: Kvm,
    pub vm: Vm,
    /// What the vCPUs can do, if they come from a snapshot; otherwise what KVM says.
    pub tables: Vec<CpuId>,
    pub memory: Memory,
    /// Pages of guest memory that are a file's.
    pub pages: FilePages,
    /// The kernel, for the next reset. A machine from a snapshot may be without.
    pub payload: Option<Payload>,
    /// The kernel's code, until it is in huge pages.
    pub code: Option<Code>,
    /// The file that memory comes from, kept open: it must stay as it is.
    pub memory_file: Option<File>,
    /// The program that fills memory.
    pub handler: Option<Handler>,
    /// The snapshot since which it is noted which pages are written.
    pub base: Option<[u8; 16]>,
    pub description: Description,
    pub transports: Vec<Arc<Transport>>,
    pub balloon: Option<Arc<Mutex<Balloon>>>,
    pub steered: devices::Steered,
    pub mem: Option<Arc<Mutex<Mem>>>,
    pub serial: Arc<SerialPort>,
    pub power: Arc<Power>,
    pub cpus: Option<Arc<Cpus>>,
    pub stops: Receiver<Stop>,
    pub stop_bell: EventFd,
    pub on_reset: OnReset,
    pub descriptors: Descriptors,
    pub config: VmConfig,
    pub api_filter: seccomp::Filter,
}

impl Parts {
    /// No vCPU runs.
    fn create_snapshot(&mut self, request: &CreateSnapshot) -> Result<()> {
        self.base = Some(capture::create(self, request)?);
        Ok(())
    }
}

/// A machine that is built but has not run yet.
pub struct Held(Parts);

/// A machine whose guest has been started.
pub struct Running {
    parts: Parts,
    paused: bool,
    /// The status file says that vCPUs run.
    announced: bool,
    resets: u64,
}

/// Resets of one machine that the status file tells of.
const MAX_RESET_EVENTS: u64 = 1000;

/// How a machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    /// The process exit code.
    pub code: ExitCode,
    /// The kind of end, for the status file.
    pub reason: ExitReason,
    /// For people.
    pub message: String,
}

impl End {
    /// An end by an error.
    #[must_use]
    pub fn error(error: &Error) -> Self {
        Self { code: error.exit_code(), reason: ExitReason::Error, message: error.chain() }
    }

    /// Says it in the log and in the status file.
    pub fn announce(&self, status: &mut StatusWriter) {
        match self.reason {
            ExitReason::PowerOff | ExitReason::Reset | ExitReason::KilledByApi => {
                crate::log::info(&self.message);
            }
            ExitReason::Crash | ExitReason::Error | ExitReason::Seccomp => crate::log::error(&self.message),
        }
        status.append(&Event::Exited {
            boottime_ns: boottime_ns(),
            reason: self.reason,
            code: self.code.code(),
            message: self.message.clone(),
        });
    }
}

/// Counters of all devices.
#[derive(Debug, Serialize)]
pub struct Metrics {
    /// Times that the guest reset itself.
    pub resets: u64,
    /// How many vCPUs the guest should have, and has.
    pub vcpus: Count,
    /// COM1.
    pub serial: crate::devices::serial::SerialMetrics,
    /// virtio devices by name.
    pub devices: serde_json::Map<String, serde_json::Value>,
}

impl Held {
    pub(crate) const fn new(parts: Parts) -> Self {
        Self(parts)
    }

    /// Locks the calling thread down (the main thread's filter).
    ///
    /// # Errors
    /// [`Error::Seccomp`].
    pub fn lock_down(&self) -> Result<()> {
        seccomp::install(&self.0.api_filter)
    }

    /// The configuration that the machine was built from.
    #[must_use]
    pub const fn config(&self) -> &VmConfig {
        &self.0.config
    }

    /// The same, to note what changes beside the machine.
    pub(crate) const fn config_mut(&mut self) -> &mut VmConfig {
        &mut self.0.config
    }

    /// The descriptors that names in requests are looked up among.
    #[must_use]
    pub const fn descriptors(&self) -> &Descriptors {
        &self.0.descriptors
    }

    /// Rings when a vCPU has stopped by itself.
    #[must_use]
    pub const fn stop_bell(&self) -> &EventFd {
        &self.0.stop_bell
    }

    /// The program that fills memory, if one does.
    #[must_use]
    pub const fn handler(&self) -> Option<&Handler> {
        self.0.handler.as_ref()
    }

    /// Counters.
    #[must_use]
    pub fn metrics(&self) -> Metrics {
        metrics(&self.0, 0)
    }

    /// Takes a snapshot into the two files that the request names. Afterwards the machine is as before.
    ///
    /// # Errors
    /// [`Error::NotHanded`] for names that are not there, [`Error::Io`], [`Error::Kvm`]. The files hold nothing that could be
    /// loaded then.
    pub fn create_snapshot(&mut self, request: &CreateSnapshot) -> Result<()> {
        self.0.create_snapshot(request)
    }

    /// Lets the vCPUs run.
    ///
    /// # Errors
    /// A vCPU thread has ended.
    pub fn start(self, status: &mut StatusWriter) -> Result<Running> {
        let mut running = self.paused();
        running.resume(status)?;
        Ok(running)
    }

    /// The machine as one whose guest is paused: what a snapshot was made from.
    #[must_use]
    pub fn paused(self) -> Running {
        Running { parts: self.0, paused: true, announced: false, resets: 0 }
    }
}

impl Running {
    /// The configuration that the machine was built from.
    #[must_use]
    pub const fn config(&self) -> &VmConfig {
        &self.parts.config
    }

    /// The same, to note what changes beside the machine.
    pub(crate) const fn config_mut(&mut self) -> &mut VmConfig {
        &mut self.parts.config
    }

    /// The descriptors that names in requests are looked up among.
    #[must_use]
    pub const fn descriptors(&self) -> &Descriptors {
        &self.parts.descriptors
    }

    /// Whether the guest is paused.
    #[must_use]
    pub const fn paused(&self) -> bool {
        self.paused
    }

    /// Counters.
    #[must_use]
    pub fn metrics(&self) -> Metrics {
        metrics(&self.parts, self.resets)
    }

    /// Rings when a vCPU has stopped by itself: call [`Running::take_stop`] then.
    #[must_use]
    pub const fn stop_bell(&self) -> &EventFd {
        &self.parts.stop_bell
    }

    /// Parks all vCPUs.
    ///
    /// # Errors
    /// A vCPU thread has ended.
    pub fn pause(&mut self) -> Result<()> {
        if !self.paused {
            self.park()?;
            self.paused = true;
        }
        Ok(())
    }

    fn park(&self) -> Result<()> {
        for vcpu in &self.parts.vcpus {
            vcpu.pause()?;
        }
        self.parts.vcpus.iter().try_for_each(VcpuHandle::wait_paused)
    }

    /// Lets all vCPUs go on.
    ///
    /// # Errors
    /// A vCPU thread has ended.
    pub fn resume(&mut self, status: &mut StatusWriter) -> Result<()> {
        // Read before they go: on a busy host this thread may be the next to run only after they have run for long.
        let now = boottime_ns();
        if self.paused {
            self.run_plugged()?;
            self.paused = false;
        }
        if !self.announced {
            status.append(&Event::VcpusRunning { boottime_ns: now });
            self.announced = true;
        }
        Ok(())
    }

    /// Takes a snapshot of the paused machine; see [`Held::create_snapshot`].
    ///
    /// # Errors
    /// [`Error::State`] if it is not paused, and as there.
    pub fn create_snapshot(&mut self, request: &CreateSnapshot) -> Result<()> {
        if !self.paused {
            return Err(Error::State(
                "a snapshot is taken of a paused machine; this one runs (PATCH /vm {\"state\": \"Paused\"})"
                    .into(),
            ));
        }
        // CPUs that the guest has let go of are spare ones in a snapshot.
        self.park_let_go()?;
        self.parts.create_snapshot(request)
    }

    /// Presses the power button.
    ///
    /// # Errors
    /// [`Error::State`] for a guest without ACPI, which has no button.
    pub fn press_power_button(&self) -> Result<()> {
        if !self.parts.description.acpi {
            return Err(Error::State("the machine has no ACPI, so no power button".into()));
        }
        self.parts.power.press_button().map_err(Error::io("raising the power button's interrupt"))
    }

    /// Gives the guest console input.
    ///
    /// # Errors
    /// [`Error::State`] when there is no room for it.
    pub fn console_input(&self, bytes: &[u8]) -> Result<()> {
        self.parts.serial.input(bytes).map_err(|room| {
            Error::State(format!(
                "{} bytes of console input, but there is room for {room}: the guest does not read",
                bytes.len()
            ))
        })
    }

    fn balloon(&self) -> Result<(BalloonConfig, MutexGuard<'_, Balloon>)> {
        let balloon = self.parts.config.balloon.zip(self.parts.balloon.as_ref());
        let (config, balloon) = balloon.ok_or_else(|| {
            Error::State("the machine has no balloon; one is added before the start (PUT /balloon)".into())
        })?;
        Ok((config, balloon.lock().unwrap_or_else(PoisonError::into_inner)))
    }

    /// Says how much memory the guest should do without.
    ///
    /// # Errors
    /// [`Error::Config`] when that is more than it has, [`Error::State`] without a balloon.
    pub fn update_balloon(&mut self, update: BalloonUpdate) -> Result<()> {
        let (config, mut balloon) = self.balloon()?;
        let config = BalloonConfig { amount_mib: update.amount_mib, ..config };
        config.check(self.parts.config.machine_config.mem_size_mib)?;
        balloon.set_target(config.amount_mib);
        drop(balloon);
        self.parts.config.balloon = Some(config);
        Ok(())
    }

    /// What the balloon holds and what the guest says about its memory.
    ///
    /// # Errors
    /// [`Error::State`] without a balloon or without statistics.
    pub fn balloon_statistics(&self) -> Result<serde_json::Map<String, serde_json::Value>> {
        let (config, balloon) = self.balloon()?;
        if config.stats_polling_interval_s == 0 {
            return Err(Error::State(
                "the balloon has no statistics: stats_polling_interval_s was 0 at the start".into(),
            ));
        }
        Ok(balloon.statistics())
    }

    /// Sets how often the guest is asked for statistics.
    ///
    /// # Errors
    /// [`Error::Config`] for what the balloon was not started for, [`Error::State`] without a balloon.
    pub fn update_balloon_statistics(&mut self, update: StatisticsUpdate) -> Result<()> {
        let (config, mut balloon) = self.balloon()?;
        let config = config.with_interval(update)?;
        config.check(self.parts.config.machine_config.mem_size_mib)?;
        balloon
            .set_interval(config.stats_polling_interval_s)
            .map_err(Error::io("setting the balloon's timer"))?;
        drop(balloon);
        self.parts.config.balloon = Some(config);
        Ok(())
    }

    /// Handles what a vCPU reported. `Some`: the machine has ended.
    pub fn take_stop(&mut self, status: &mut StatusWriter) -> Option<End> {
        let _ = self.parts.stop_bell.read();
        if let Err(error) = self.park_let_go() {
            return Some(End::error(&error));
        }
        // A vCPU that waits for a page that nobody will bring cannot be parked.
        if self.parts.handler.as_ref().is_some_and(Handler::is_gone) {
            let message =
                "the page-fault handler has closed its connection: nobody brings the guest's memory".into();
            return Some(End { code: ExitCode::HostIo, reason: ExitReason::Error, message });
        }
        let stop = match self.parts.stops.try_recv().map_or_else(|_| self.move_code(), |stop| Ok(Some(stop)))
        {
            Ok(stop) => stop?,
            Err(error) => return Some(End::error(&error)),
        };
        if let Err(error) = self.park() {
            return Some(End::error(&error));
        }
        // Once parked, nothing new can arrive; of several reports the first counts.
        while self.parts.stops.try_recv().is_ok() {}
        let end = |code, reason, message: String| Some(End { code, reason, message });
        let ended = match stop {
            Stop::Reset if self.parts.on_reset == OnReset::Restart && self.parts.payload.is_some() => {
                match self.restart() {
                    Ok(()) => {
                        self.resets += 1;
                        // A guest that resets in a loop must not fill the host's disk.
                        if self.resets <= MAX_RESET_EVENTS {
                            status.append(&Event::GuestReset { boottime_ns: boottime_ns() });
                        }
                        None
                    }
                    Err(error) => Some(End::error(&error)),
                }
            }
            Stop::Reset => end(ExitCode::GuestReset, ExitReason::Reset, "the guest reset itself".into()),
            Stop::PowerOff => end(ExitCode::PowerOff, ExitReason::PowerOff, "the guest powered off".into()),
            Stop::Crash(report) => {
                end(ExitCode::GuestCrash, ExitReason::Crash, format!("the guest crashed: {report}"))
            }
            Stop::Kvm(error) => Some(End::error(&error)),
        };
        ended.map(|end| self.flush_for(end))
    }

    /// Moves the kernel's code into huge pages once the guest runs. Returns what a vCPU reported meanwhile; all are parked then.
    fn move_code(&mut self) -> Result<Option<Stop>> {
        let Some(mut code) = self.parts.code.take_if(|code| code.is_due()) else { return Ok(None) };
        self.park()?;
        while let Some(piece) = code.take_piece() {
            memory::huge::move_to(&self.parts.memory, &self.parts.pages, &piece)?;
        }
        let stop = self.parts.stops.try_recv().ok();
        if stop.is_none() && !self.paused {
            self.run_plugged()?;
        }
        Ok(stop)
    }

    /// Ends the machine from outside, at once; the guest is not asked.
    pub fn kill(&mut self, why: &str) -> End {
        // A vCPU that waits for a page may not be parked before it comes.
        if self.parts.handler.is_none() {
            let _ = self.park();
        }
        self.flush_for(End {
            code: ExitCode::Killed,
            reason: ExitReason::KilledByApi,
            message: why.to_owned(),
        })
    }

    /// Puts all disks on stable storage before the process ends.
    fn flush_for(&self, mut end: End) -> End {
        for transport in &self.parts.transports {
            let mut device = lock(transport.device());
            if let Err(error) = device.flush() {
                end.message.push_str(&format!("; disk {:?} could not be flushed: {error}", device.name()));
                if end.code == ExitCode::PowerOff {
                    (end.code, end.reason) = (ExitCode::HostIo, ExitReason::Error);
                }
            }
        }
        end
    }

    /// What a reset line does: everything goes back to the state after power-on, and the kernel is loaded again from
    /// the descriptors that are open. vCPUs are parked.
    fn restart(&mut self) -> Result<()> {
        let parts = &mut self.parts;
        let Some(payload) = &mut parts.payload else {
            return Err(Error::State("there is no kernel to start again".into()));
        };
        for transport in &parts.transports {
            transport.reset();
        }
        parts.serial.reset().map_err(Error::io("resetting the serial port"))?;
        parts.power.reset();
        if let Some(cpus) = &parts.cpus {
            cpus.reset();
            parts.description.processors.count = cpus.count().wanted;
        }
        if let Some(mem) = &parts.mem {
            mem.lock().unwrap_or_else(PoisonError::into_inner).power_on();
        }
        for pmem in &parts.steered.pmem {
            let pmem = pmem.lock().unwrap_or_else(PoisonError::into_inner);
            pmem.power_on().map_err(Error::io("clearing a pmem file's copies"))?;
        }
        memory::clear(&parts.memory, &parts.pages)?;
        let entry = boot::load(&parts.memory, payload, &parts.description)?;
        // Nothing of an older snapshot is in this memory.
        (parts.base, parts.memory_file) = (None, None);
        parts.vm.reset_chips()?;
        reset_vcpus(&parts.vcpus, entry)?;
        // Whoever paused the machine in the moment of its reset resumes it.
        if self.paused {
            return Ok(());
        }
        self.run_plugged()
    }
}

fn metrics(parts: &Parts, resets: u64) -> Metrics {
    let devices = parts.transports.iter().map(|transport| {
        let device = lock(transport.device());
        (device.name().to_owned(), device.metrics())
    });
    Metrics {
        resets,
        vcpus: resize::count(parts),
        serial: parts.serial.metrics(),
        devices: devices.collect(),
    }
}
