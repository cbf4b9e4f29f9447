//! Which request does what in which phase.

use std::os::fd::OwnedFd;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::json;

use super::http::{Request, Response};
use super::{Machine, Server};
use crate::config::{
    Drive, DriveUpdate, MachineConfig, MachineConfigUpdate, NetworkInterface, NetworkInterfaceUpdate,
    PmemConfig, PmemUpdate, VmConfig,
};
use crate::devices::virtio::mem::config::MemoryHotplugStatus;
use crate::error::{Error, Result};
use crate::log;
use crate::preboot::Preboot;
use crate::running::{End, Metrics, Running};
use crate::snapshot::requests::{CreateSnapshot, LoadSnapshot};
use crate::status::StatusWriter;

/// Longest name of a descriptor, bytes.
const MAX_NAME: usize = 256;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Action {
    action_type: ActionType,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
enum ActionType {
    InstanceStart,
    #[serde(alias = "SendCtrlAltDel")]
    SendPowerButton,
    ForceStop,
    FlushMetrics,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct VmState {
    state: WantedState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
enum WantedState {
    Paused,
    Resumed,
}

/// What can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// Id, state and version.
    Info,
    /// The version.
    Version,
    /// CPUs and memory.
    MachineConfig,
    /// The whole configuration.
    VmConfig,
    /// The balloon's configuration.
    Balloon,
    /// What is known about the guest's memory.
    BalloonStatistics,
    /// Counters of all devices.
    Metrics,
    /// Sets what is booted.
    SetBootSource,
    /// Sets CPUs and memory.
    SetMachineConfig,
    /// Changes CPUs and memory, of a running machine too.
    ChangeMachineConfig,
    /// Sets the CPU template.
    SetCpuConfig,
    /// Adds or replaces a disk.
    SetDrive,
    /// Adds or replaces a file in the guest's memory.
    SetPmem,
    /// Adds or replaces a network interface.
    SetNetworkInterface,
    /// Adds the entropy device.
    SetEntropy,
    /// Adds or replaces the balloon.
    SetBalloon,
    /// Adds or replaces the vsock device.
    SetVsock,
    /// What there is of memory that comes and goes.
    MemoryHotplug,
    /// Adds or replaces memory that comes and goes.
    SetMemoryHotplug,
    /// Changes how much of it the guest should have.
    ChangeMemoryHotplug,
    /// Sets where the console goes.
    SetSerial,
    /// Sets the DMI strings.
    SetSmbios,
    /// Says where the monitor's lines go.
    SetLogger,
    /// Says where metrics go.
    SetMetrics,
    /// Starts, ends, presses the power button.
    Act,
    /// Types on the console.
    SerialInput,
    /// Pauses and resumes.
    ChangeVm,
    /// Hands an open descriptor over.
    HandOver,
    /// Takes a snapshot.
    CreateSnapshot,
    /// Goes on from a snapshot.
    LoadSnapshot,
    /// Changes a disk's image or limits.
    ChangeDrive,
    /// Changes how often the guest may flush a file in its memory.
    ChangePmem,
    /// Changes an interface's limits.
    ChangeNetworkInterface,
    /// Changes how much the guest should do without.
    ChangeBalloon,
    /// Changes how often the guest is asked about its memory.
    ChangeBalloonStatistics,
}

/// Every request that is answered: its method, its path (`{id}` stands for one part of it), and what it asks for. `openapi.json`
/// describes them; a test holds the two together.
pub const ROUTES: &[(&str, &str, Route)] = &[
    ("GET", "/", Route::Info),
    ("GET", "/version", Route::Version),
    ("GET", "/machine-config", Route::MachineConfig),
    ("GET", "/vm/config", Route::VmConfig),
    ("GET", "/balloon", Route::Balloon),
    ("GET", "/balloon/statistics", Route::BalloonStatistics),
    ("GET", "/hotplug/memory", Route::MemoryHotplug),
    ("GET", "/metrics", Route::Metrics),
    ("PUT", "/boot-source", Route::SetBootSource),
    ("PUT", "/machine-config", Route::SetMachineConfig),
    ("PUT", "/cpu-config", Route::SetCpuConfig),
    ("PUT", "/drives/{id}", Route::SetDrive),
    ("PUT", "/pmem/{id}", Route::SetPmem),
    ("PUT", "/network-interfaces/{id}", Route::SetNetworkInterface),
    ("PUT", "/entropy", Route::SetEntropy),
    ("PUT", "/balloon", Route::SetBalloon),
    ("PUT", "/vsock", Route::SetVsock),
    ("PUT", "/hotplug/memory", Route::SetMemoryHotplug),
    ("PUT", "/serial", Route::SetSerial),
    ("PUT", "/smbios", Route::SetSmbios),
    ("PUT", "/logger", Route::SetLogger),
    ("PUT", "/metrics", Route::SetMetrics),
    ("PUT", "/actions", Route::Act),
    ("PUT", "/serial/input", Route::SerialInput),
    ("PUT", "/descriptors/{id}", Route::HandOver),
    ("PUT", "/snapshot/create", Route::CreateSnapshot),
    ("PUT", "/snapshot/load", Route::LoadSnapshot),
    ("PATCH", "/vm", Route::ChangeVm),
    ("PATCH", "/machine-config", Route::ChangeMachineConfig),
    ("PATCH", "/drives/{id}", Route::ChangeDrive),
    ("PATCH", "/pmem/{id}", Route::ChangePmem),
    ("PATCH", "/network-interfaces/{id}", Route::ChangeNetworkInterface),
    ("PATCH", "/hotplug/memory", Route::ChangeMemoryHotplug),
    ("PATCH", "/balloon", Route::ChangeBalloon),
    ("PATCH", "/balloon/statistics", Route::ChangeBalloonStatistics),
];

impl Route {
    /// What a request asks for, and the id in its path.
    fn of<'a>(request: &Request<'a>) -> Result<(Self, &'a str)> {
        let (method, path) = (request.method, request.path);
        let matching = || {
            ROUTES.iter().filter_map(|(method, template, route)| Some((method, route, id(template, path)?)))
        };
        if let Some((_, route, id)) = matching().find(|(allowed, ..)| **allowed == method) {
            return Ok((*route, id));
        }
        let allowed: Vec<&str> = matching().map(|(allowed, ..)| *allowed).collect();
        Err(Error::State(match allowed[..] {
            [] => format!("there is no {method} {path}: no such path"),
            _ => format!("there is no {method} {path}: it takes {}", allowed.join(" and ")),
        }))
    }
}

/// The id in a path, empty if it has none; `None` if the path is another.
fn id<'a>(template: &str, path: &'a str) -> Option<&'a str> {
    match template.strip_suffix("{id}") {
        Some(prefix) => path.strip_prefix(prefix).filter(|id| !id.is_empty() && !id.contains('/')),
        None => (template == path).then_some(""),
    }
}

/// An answer: nothing to say, or a body.
enum Answer {
    Done,
    Body(serde_json::Value),
}

impl Server {
    /// Answers one request. `Some`: the machine has ended.
    pub(super) fn handle(
        &mut self,
        request: &Request<'_>,
        handed: Option<OwnedFd>,
        status: &mut StatusWriter,
    ) -> (Response, Option<End>) {
        let mut end = None;
        let answer = Route::of(request).and_then(|(route, id)| match route {
            Route::HandOver => self.hand_over(id, handed).map(|()| Answer::Done),
            _ => self.answer(route, id, request.body, status, &mut end),
        });
        let response = match answer {
            Ok(Answer::Done) => Response::no_content(),
            Ok(Answer::Body(body)) => Response::ok(&body),
            Err(error) => {
                let why = error.chain();
                log::debug(|| format!("{} {}: refused: {why}", request.method, request.path));
                return (Response::fault(&why), end);
            }
        };
        log::debug(|| format!("{} {}: done", request.method, request.path));
        (response, end)
    }

    fn act(&mut self, body: &[u8], status: &mut StatusWriter, end: &mut Option<End>) -> Result<()> {
        match json::<Action>(body)?.action_type {
            ActionType::InstanceStart => self.start(status).map_err(|(error, fatal)| {
                // A machine whose build failed half-way cannot be tried again: the process may be locked down.
                if fatal {
                    *end = Some(End::error(&error));
                }
                error
            }),
            ActionType::FlushMetrics => self.flush_metrics(),
            ActionType::SendPowerButton => self.running()?.press_power_button(),
            ActionType::ForceStop => {
                *end = Some(self.kill("ended by ForceStop"));
                Ok(())
            }
        }
    }

    /// Builds if need be, and starts. The flag says whether the failure ends the process.
    fn start(&mut self, status: &mut StatusWriter) -> std::result::Result<(), (Error, bool)> {
        let held = match self.machine.take() {
            Some(Machine::Preboot(preboot)) => match self.build(&preboot, status) {
                Ok(held) => held,
                Err(error) => {
                    let fatal = !matches!(error, Error::Config(_) | Error::Open { .. } | Error::Kernel(_));
                    self.machine = Some(Machine::Preboot(preboot));
                    return Err((error, fatal));
                }
            },
            Some(Machine::Held(held)) => held,
            other => {
                self.machine = other;
                return Err((Error::State("the machine has been started already".into()), false));
            }
        };
        let running = held.start(status).map_err(|error| (error, true))?;
        self.machine = Some(Machine::Running(running));
        self.begin_metrics();
        Ok(())
    }

    /// Gives a descriptor a name.
    fn hand_over(&self, name: &str, descriptor: Option<OwnedFd>) -> Result<()> {
        let descriptor = descriptor.ok_or_else(|| {
            Error::State(format!("descriptors: none came with the request for {name:?} (SCM_RIGHTS, one)"))
        })?;
        if name.len() > MAX_NAME {
            return Err(Error::Config(format!(
                "descriptors: the name has {} bytes, at most {MAX_NAME} are allowed",
                name.len()
            )));
        }
        let machine = self.machine.as_ref().ok_or_else(|| Error::State("there is no machine".into()))?;
        machine.descriptors().insert(name, descriptor)
    }

    fn create_snapshot(&mut self, request: &CreateSnapshot) -> Result<()> {
        match &mut self.machine {
            Some(Machine::Held(held)) => held.create_snapshot(request),
            _ => self.running()?.create_snapshot(request),
        }
    }

    /// Makes the machine of a snapshot in place of the one that was being configured.
    fn load_snapshot(&mut self, body: &[u8], status: &mut StatusWriter, end: &mut Option<End>) -> Result<()> {
        let request: LoadSnapshot = json(body)?;
        let Some(Machine::Preboot(preboot)) = &self.machine else {
            return Err(Error::State(
                "a snapshot is loaded in place of a start, and this machine is built already".into(),
            ));
        };
        let held = preboot.restore(&request)?;
        match self.take_over(held, status) {
            Ok(held) => {
                self.machine = Some(Machine::Running(held.paused()));
                self.resume_due = request.resume_vm;
                self.begin_metrics();
            }
            // The process may be locked down: nothing else can be tried.
            Err(error) => {
                *end = Some(End::error(&error));
                return Err(error);
            }
        }
        Ok(())
    }

    fn running(&mut self) -> Result<&mut Running> {
        match &mut self.machine {
            Some(Machine::Running(running)) => Ok(running),
            _ => Err(Error::State("the machine has not been started".into())),
        }
    }

    fn preboot(&mut self) -> Result<&mut Preboot> {
        match &mut self.machine {
            Some(Machine::Preboot(preboot)) => Ok(preboot),
            _ => Err(Error::State("the machine is built already, its configuration cannot change".into())),
        }
    }

    fn config(&self) -> VmConfig {
        self.machine.as_ref().map_or_else(VmConfig::default, |machine| machine.config().clone())
    }

    fn answer(
        &mut self,
        route: Route,
        id: &str,
        body: &[u8],
        status: &mut StatusWriter,
        end: &mut Option<End>,
    ) -> Result<Answer> {
        let told = |value| Ok(Answer::Body(value));
        match route {
            Route::Info => {
                return told(json!({
                    "id": self.id,
                    "state": self.state(),
                    "vmm_version": env!("CARGO_PKG_VERSION"),
                    "app_name": "roost-vmm",
                }));
            }
            Route::Version => {
                return told(json!({
                    "roost_vmm_version": env!("CARGO_PKG_VERSION"),
                    // Its SDKs look at this one. The version is the one whose paths and bodies are here.
                    "firecracker_version": "1.17.0",
                }));
            }
            Route::MachineConfig => return told(json!(self.machine_config())),
            Route::VmConfig => return told(json!(self.config())),
            Route::Balloon => {
                let none = || Error::State("the machine has no balloon".into());
                return told(json!(self.config().balloon.ok_or_else(none)?));
            }
            Route::BalloonStatistics => return told(json!(self.running()?.balloon_statistics()?)),
            Route::MemoryHotplug => return told(json!(self.memory_hotplug()?)),
            Route::Metrics => return told(json!(self.metrics()?)),
            Route::SetBootSource => self.preboot()?.set_boot_source(json(body)?)?,
            Route::SetMachineConfig => self.preboot()?.set_machine_config(json(body)?)?,
            Route::SetCpuConfig => self.preboot()?.set_cpu_config(json(body)?)?,
            Route::SetDrive => self.set_drive(id, body)?,
            Route::SetPmem => self.set_pmem(id, body)?,
            Route::SetNetworkInterface => self.set_network_interface(id, body)?,
            Route::SetEntropy => self.preboot()?.set_entropy(json(body)?)?,
            Route::SetBalloon => self.preboot()?.set_balloon(json(body)?)?,
            Route::SetVsock => self.preboot()?.set_vsock(json(body)?)?,
            Route::SetMemoryHotplug => self.preboot()?.set_memory_hotplug(json(body)?)?,
            Route::SetSerial => self.preboot()?.set_serial(json(body)?)?,
            Route::SetSmbios => self.preboot()?.set_smbios(json(body)?)?,
            Route::SetLogger => self.set_logger(json(body)?)?,
            Route::SetMetrics => self.set_metrics(json(body)?)?,
            Route::SerialInput => self.running()?.console_input(body)?,
            Route::ChangeVm => self.change_vm(body, status)?,
            Route::CreateSnapshot => self.create_snapshot(&json(body)?)?,
            Route::LoadSnapshot => self.load_snapshot(body, status, end)?,
            Route::ChangeMachineConfig => self.change_machine_config(body)?,
            Route::ChangeDrive => self.change_drive(id, body)?,
            Route::ChangePmem => self.change_pmem(id, body)?,
            Route::ChangeNetworkInterface => self.change_network_interface(id, body)?,
            Route::ChangeMemoryHotplug => self.running()?.update_memory_hotplug(json(body)?)?,
            Route::ChangeBalloon => self.running()?.update_balloon(json(body)?)?,
            Route::ChangeBalloonStatistics => self.running()?.update_balloon_statistics(json(body)?)?,
            Route::Act => self.act(body, status, end)?,
            // Taken with its descriptor, before.
            Route::HandOver => {}
        }
        Ok(Answer::Done)
    }

    /// What is wanted now, which a running machine may not have yet.
    fn machine_config(&self) -> MachineConfig {
        match &self.machine {
            Some(Machine::Running(running)) => running.machine_config(),
            _ => self.config().machine_config,
        }
    }

    fn memory_hotplug(&self) -> Result<MemoryHotplugStatus> {
        let status = match &self.machine {
            Some(Machine::Running(running)) => running.memory_hotplug(),
            _ => self.config().memory_hotplug.map(|config| MemoryHotplugStatus {
                config,
                plugged_size_mib: 0,
                requested_size_mib: 0,
            }),
        };
        status.ok_or_else(|| Error::State("the machine has no memory that comes and goes".into()))
    }

    fn change_machine_config(&mut self, body: &[u8]) -> Result<()> {
        let update: MachineConfigUpdate = json(body)?;
        match &mut self.machine {
            Some(Machine::Preboot(preboot)) => preboot.change_machine_config(update),
            Some(Machine::Running(running)) => running.resize(update),
            _ => Err(Error::State(
                "the machine is built but not started: CPUs and memory change before, or while it runs"
                    .into(),
            )),
        }
    }

    fn state(&self) -> &'static str {
        match &self.machine {
            Some(Machine::Running(running)) if running.paused() => "Paused",
            Some(Machine::Running(_)) => "Running",
            _ => "Not started",
        }
    }

    pub(super) fn metrics(&self) -> Result<Metrics> {
        match &self.machine {
            Some(Machine::Held(held)) => Ok(held.metrics()),
            Some(Machine::Running(running)) => Ok(running.metrics()),
            _ => Err(Error::State("the machine has no devices before it is built".into())),
        }
    }

    fn set_drive(&mut self, id: &str, body: &[u8]) -> Result<()> {
        let drive: Drive = json(body)?;
        same_id("drives: drive_id", id, &drive.drive_id)?;
        self.preboot()?.set_drive(drive)
    }

    fn set_pmem(&mut self, id: &str, body: &[u8]) -> Result<()> {
        let pmem: PmemConfig = json(body)?;
        same_id("pmem: id", id, &pmem.id)?;
        self.preboot()?.set_pmem(pmem)
    }

    fn set_network_interface(&mut self, id: &str, body: &[u8]) -> Result<()> {
        let interface: NetworkInterface = json(body)?;
        same_id("network-interfaces: iface_id", id, &interface.iface_id)?;
        self.preboot()?.set_network_interface(interface)
    }

    fn change_drive(&mut self, id: &str, body: &[u8]) -> Result<()> {
        let update: DriveUpdate = json(body)?;
        same_id("drives: drive_id", id, &update.drive_id)?;
        self.running()?.update_drive(&update)
    }

    fn change_pmem(&mut self, id: &str, body: &[u8]) -> Result<()> {
        let update: PmemUpdate = json(body)?;
        same_id("pmem: id", id, &update.id)?;
        self.running()?.update_pmem(&update)
    }

    fn change_network_interface(&mut self, id: &str, body: &[u8]) -> Result<()> {
        let update: NetworkInterfaceUpdate = json(body)?;
        same_id("network-interfaces: iface_id", id, &update.iface_id)?;
        self.running()?.update_network_interface(&update)
    }

    fn change_vm(&mut self, body: &[u8], status: &mut StatusWriter) -> Result<()> {
        let wanted: VmState = json(body)?;
        let running = self.running()?;
        match wanted.state {
            WantedState::Paused => running.pause(),
            WantedState::Resumed => running.resume(status),
        }
    }
}

fn same_id(field: &str, in_path: &str, in_body: &str) -> Result<()> {
    if in_path == in_body {
        return Ok(());
    }
    Err(Error::Config(format!("{field} {in_body:?} is not the path's {in_path:?}")))
}

fn json<T: DeserializeOwned>(body: &[u8]) -> Result<T> {
    serde_json::from_slice(body).map_err(|error| Error::Config(error.to_string()))
}
