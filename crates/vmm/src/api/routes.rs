//! Which request does what in which phase.

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::json;

use super::http::{Request, Response};
use super::{Machine, Server};
use crate::config::VmConfig;
use crate::error::{Error, Result};
use crate::preboot::Preboot;
use crate::running::{End, Running};
use crate::status::StatusWriter;

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
        status: &mut StatusWriter,
    ) -> (Response, Option<End>) {
        if request.path == "/actions" && request.method == "PUT" {
            return self.action(request.body, status);
        }
        let answer = match request.method {
            "GET" => self.get(request.path),
            "PUT" if request.path == "/serial/input" => {
                self.running().and_then(|r| r.console_input(request.body)).map(|()| Answer::Done)
            }
            "PUT" => self.configure(request.path, request.body),
            "PATCH" => self.change(request),
            _ => Err(unknown(request)),
        };
        let response = match answer {
            Ok(Answer::Done) => Response::no_content(),
            Ok(Answer::Body(body)) => Response::ok(&body),
            Err(error) => Response::fault(&error.chain()),
        };
        (response, None)
    }

    fn action(&mut self, body: &[u8], status: &mut StatusWriter) -> (Response, Option<End>) {
        let result = match json::<Action>(body).map(|action| action.action_type) {
            Ok(ActionType::InstanceStart) => match self.start(status) {
                // A machine whose build failed half-way cannot be tried again: the process may be locked down.
                Err((error, true)) => return (Response::fault(&error.chain()), Some(End::error(&error))),
                Err((error, false)) => Err(error),
                Ok(()) => Ok(()),
            },
            Ok(ActionType::SendPowerButton) => {
                self.running().and_then(|running| running.press_power_button())
            }
            Ok(ActionType::ForceStop) => {
                return (Response::no_content(), Some(self.kill("ended by ForceStop")));
            }
            Err(error) => Err(error),
        };
        (result.map_or_else(|error| Response::fault(&error.chain()), |()| Response::no_content()), None)
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
        match &self.machine {
            Some(Machine::Preboot(preboot)) => preboot.config().clone(),
            Some(Machine::Held(held)) => held.config().clone(),
            Some(Machine::Running(running)) => running.config().clone(),
            None => VmConfig::default(),
        }
    }

    fn get(&mut self, path: &str) -> Result<Answer> {
        let body = match path {
            "/" => json!({
                "id": self.id,
                "state": self.state(),
                "vmm_version": env!("CARGO_PKG_VERSION"),
                "app_name": "roost-vmm",
            }),
            "/version" => json!({ "roost_vmm_version": env!("CARGO_PKG_VERSION") }),
            "/machine-config" => json!(self.config().machine_config),
            "/vm/config" => json!(self.config()),
            "/balloon" => match self.config().balloon {
                Some(balloon) => json!(balloon),
                None => return Err(Error::State("the machine has no balloon".into())),
            },
            "/balloon/statistics" => json!(self.running()?.balloon_statistics()?),
            "/metrics" => match &self.machine {
                Some(Machine::Held(held)) => json!(held.metrics()),
                Some(Machine::Running(running)) => json!(running.metrics()),
                _ => return Err(Error::State("the machine has no devices before it is built".into())),
            },
            _ => return Err(Error::State(format!("there is no GET {path}"))),
        };
        Ok(Answer::Body(body))
    }

    fn state(&self) -> &'static str {
        match &self.machine {
            Some(Machine::Running(running)) if running.paused() => "Paused",
            Some(Machine::Running(_)) => "Running",
            _ => "Not started",
        }
    }

    fn configure(&mut self, path: &str, body: &[u8]) -> Result<Answer> {
        let preboot = self.preboot()?;
        let id_matches = |kind: &str, wanted: &str, id: &str| {
            if wanted == id {
                Ok(())
            } else {
                Err(Error::Config(format!("the path names {kind} {wanted:?}, the body {id:?}")))
            }
        };
        match path {
            "/boot-source" => preboot.set_boot_source(json(body)?)?,
            "/machine-config" => preboot.set_machine_config(json(body)?)?,
            "/entropy" => preboot.set_entropy(json(body)?)?,
            "/balloon" => preboot.set_balloon(json(body)?)?,
            "/vsock" => preboot.set_vsock(json(body)?)?,
            "/serial" => preboot.set_serial(json(body)?)?,
            "/smbios" => preboot.set_smbios(json(body)?)?,
            _ => {
                if let Some(id) = path.strip_prefix("/drives/") {
                    let drive: crate::config::Drive = json(body)?;
                    id_matches("drive", id, &drive.drive_id)?;
                    preboot.set_drive(drive)?;
                } else if let Some(id) = path.strip_prefix("/network-interfaces/") {
                    let interface: crate::config::NetworkInterface = json(body)?;
                    id_matches("interface", id, &interface.iface_id)?;
                    preboot.set_network_interface(interface)?;
                } else {
                    return Err(Error::State(format!("there is no PUT {path}")));
                }
            }
        }
        Ok(Answer::Done)
    }

    /// Changes something of a machine that runs.
    fn change(&mut self, request: &Request<'_>) -> Result<Answer> {
        match request.path {
            "/vm" => return self.change_state(request.body),
            "/balloon" => self.running()?.update_balloon(json(request.body)?)?,
            "/balloon/statistics" => self.running()?.update_balloon_statistics(json(request.body)?)?,
            _ => return Err(unknown(request)),
        }
        Ok(Answer::Done)
    }

    fn change_state(&mut self, body: &[u8]) -> Result<Answer> {
        let wanted: VmState = json(body)?;
        let running = self.running()?;
        match wanted.state {
            WantedState::Paused => running.pause()?,
            WantedState::Resumed => running.resume()?,
        }
        Ok(Answer::Done)
    }
}

fn unknown(request: &Request<'_>) -> Error {
    Error::State(format!("there is no {} {}", request.method, request.path))
}

fn json<T: DeserializeOwned>(body: &[u8]) -> Result<T> {
    serde_json::from_slice(body).map_err(|error| Error::Config(error.to_string()))
}
