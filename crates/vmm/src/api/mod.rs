//! The API: HTTP/1.1 on a unix socket, in the shape of Firecracker's published one. The same thread steers the
//! machine: it waits for requests, for vCPUs that stopped, and for signals.
//!
//! | request | when | does |
//! |---|---|---|
//! | `GET /` | always | id, state (`Not started`, `Running`, `Paused`), version |
//! | `GET /version` | always | version |
//! | `GET /machine-config` | always | CPUs and memory that are wanted now |
//! | `GET /vm/config` | always | the configuration, of a started machine the one that it was built from |
//! | `GET /balloon` | always | the balloon's configuration |
//! | `GET /hotplug/memory` | always | memory that comes and goes: sizes, what the guest has and should have |
//! | `GET /metrics` | built | counters of all devices |
//! | `PUT /boot-source`, `/machine-config`, `/drives/{id}`, `/network-interfaces/{id}`, `/entropy`, `/balloon`, `/hotplug/memory`, `/vsock`, `/serial`, `/smbios` | before the build | configures |
//! | `PUT /logger`, `/metrics` | always | where the monitor's lines and its metrics go |
//! | `PUT /actions` | | `{"action_type": …}`: `InstanceStart`; `ForceStop` (ends the machine at once); once built `FlushMetrics`; once running `SendPowerButton` (or `SendCtrlAltDel`) |
//! | `PUT /descriptors/{name}` | always | the open descriptor that comes with the request (SCM_RIGHTS) has that name from now on |
//! | `PUT /snapshot/create` | paused | the machine into two files |
//! | `PUT /snapshot/load` | before the build | a machine from two files, paused unless it should run |
//! | `PATCH /vm` | running | `{"state": "Paused"}` or `"Resumed"` |
//! | `PATCH /machine-config` | before the build, running | `{"vcpu_count": …, "mem_size_mib": …}`: CPUs and memory that the guest should have |
//! | `PATCH /drives/{id}` | running | another image, the same one looked at again, other limits |
//! | `PATCH /network-interfaces/{id}` | running | other limits |
//! | `PATCH /hotplug/memory` | running | `{"requested_size_mib": …}`: how much of that memory the guest should have |
//! | `PATCH /balloon` | running | `{"amount_mib": …}`: how much memory the guest should do without |
//! | `GET /balloon/statistics` | running | what the balloon holds, what the guest says about its memory |
//! | `PATCH /balloon/statistics` | running | `{"stats_polling_interval_s": …}` |
//! | `PUT /serial/input` | running | the body's bytes become console input |
//!
//! Success is 200 with a body or 204; what fails is 400 with `{"fault_message": …}`.

#[cfg(feature = "fuzzing")]
mod fuzzing;
pub mod http;
pub mod outputs;
pub mod routes;
pub mod terminal;

use std::collections::HashMap;
use std::io::{ErrorKind, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::config::VmConfig;
use crate::descriptors::Descriptors;
use crate::error::{Error, Result};
use crate::exit::ExitCode;
use crate::preboot::Preboot;
use crate::running::{End, Held, Running};
use crate::status::{Event, ExitReason, StatusWriter, boottime_ns};
use http::{Parsed, Response};
use outputs::Outputs;

/// The machine in its phase.
pub enum Machine {
    /// Being configured.
    Preboot(Preboot),
    /// Built, waiting for its start.
    Held(Held),
    /// Started.
    Running(Running),
}

impl Machine {
    const fn config(&self) -> &VmConfig {
        match self {
            Self::Preboot(preboot) => preboot.config(),
            Self::Held(held) => held.config(),
            Self::Running(running) => running.config(),
        }
    }

    const fn config_mut(&mut self) -> &mut VmConfig {
        match self {
            Self::Preboot(preboot) => preboot.config_mut(),
            Self::Held(held) => held.config_mut(),
            Self::Running(running) => running.config_mut(),
        }
    }

    const fn descriptors(&self) -> &Descriptors {
        match self {
            Self::Preboot(preboot) => preboot.descriptors(),
            Self::Held(held) => held.descriptors(),
            Self::Running(running) => running.descriptors(),
        }
    }
}

/// Connections at a time.
const MAX_CONNECTIONS: usize = 16;
/// What a connection may send at most before its request is complete.
const MAX_BUFFERED: usize = 512 * 1024;

/// The main thread's loop.
pub struct Server {
    epoll: Epoll,
    listener: Option<UnixListener>,
    signals: OwnedFd,
    connections: HashMap<RawFd, Connection>,
    id: String,
    machine: Option<Machine>,
    /// The machine runs as soon as the answer is on its way: a guest that wakes up would take the CPU before whoever waits is told. No
    /// other request is looked at in between.
    resume_due: bool,
    outputs: Outputs,
}

struct Connection {
    stream: UnixStream,
    buffer: Vec<u8>,
    /// A descriptor that came with a request (SCM_RIGHTS).
    handed: Option<OwnedFd>,
}

impl Server {
    /// Prepares everything that a locked-down thread may not make any more.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn new(listener: Option<UnixListener>, id: String) -> Result<Self> {
        let epoll = Epoll::new().map_err(Error::io("epoll"))?;
        let signals = block_signals().map_err(Error::io("signalfd"))?;
        let outputs = Outputs::new()?;
        let server = Self {
            epoll,
            listener,
            signals,
            connections: HashMap::new(),
            id,
            machine: None,
            resume_due: false,
            outputs,
        };
        if let Some(listener) = &server.listener {
            listener.set_nonblocking(true).map_err(Error::io("API socket"))?;
            server.watch(listener.as_raw_fd())?;
        }
        server.watch(server.signals.as_raw_fd())?;
        server.watch(server.outputs.timer.as_raw_fd())?;
        Ok(server)
    }

    /// With its machine.
    #[must_use]
    pub fn with(mut self, machine: Machine) -> Self {
        self.machine = Some(machine);
        self.begin_metrics();
        self
    }

    fn watch(&self, descriptor: RawFd) -> Result<()> {
        let event = EpollEvent::new(EventSet::IN, u64::try_from(descriptor).unwrap_or(0));
        self.epoll.ctl(ControlOperation::Add, descriptor, event).map_err(Error::io("epoll_ctl"))
    }

    /// Builds the machine, locks this thread down, and says so in the status file.
    ///
    /// # Errors
    /// Any of the build.
    pub fn build(&self, preboot: &Preboot, status: &mut StatusWriter) -> Result<Held> {
        self.take_over(preboot.build()?, status)
    }

    /// Locks this thread down around a machine that is built.
    fn take_over(&self, held: Held, status: &mut StatusWriter) -> Result<Held> {
        self.watch(held.stop_bell().as_raw_fd())?;
        if let Some(handler) = held.handler() {
            self.watch(handler.as_raw_fd())?;
        }
        if held.config().serial.is_none() {
            terminal::make_raw();
        }
        crate::heap::trim();
        held.lock_down()?;
        status.append(&Event::Built {
            boottime_ns: boottime_ns(),
            pid: std::process::id(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        });
        Ok(held)
    }

    /// Serves until the machine ends.
    ///
    /// # Errors
    /// [`Error::Io`] when events cannot be waited for.
    pub fn serve(&mut self, status: &mut StatusWriter) -> Result<End> {
        let mut events = [EpollEvent::default(); 16];
        loop {
            let count = match self.epoll.wait(-1, &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(Error::io("waiting for events")(error)),
            };
            let descriptors: Vec<u64> = events[..count].iter().map(EpollEvent::data).collect();
            for descriptor in descriptors {
                let Ok(descriptor) = RawFd::try_from(descriptor) else { continue };
                if let Some(end) = self.event(descriptor, status) {
                    self.write_metrics();
                    return Ok(end);
                }
            }
        }
    }

    fn event(&mut self, descriptor: RawFd, status: &mut StatusWriter) -> Option<End> {
        if self.listener.as_ref().is_some_and(|listener| listener.as_raw_fd() == descriptor) {
            self.accept();
            None
        } else if descriptor == self.signals.as_raw_fd() {
            Some(self.kill("ended by a signal"))
        } else if descriptor == self.outputs.timer.as_raw_fd() {
            let _ = self.outputs.timer.wait();
            self.write_metrics();
            None
        } else if self.connections.contains_key(&descriptor) {
            self.connection(descriptor, status)
        } else if let Some(Machine::Running(running)) = &mut self.machine {
            running.take_stop(status)
        } else {
            None
        }
    }

    /// Ends the machine at once, in whatever phase it is.
    fn kill(&mut self, why: &str) -> End {
        match &mut self.machine {
            Some(Machine::Running(running)) => running.kill(why),
            _ => End { code: ExitCode::Killed, reason: ExitReason::KilledByApi, message: why.to_owned() },
        }
    }

    fn accept(&mut self) {
        let Some(listener) = &self.listener else { return };
        let Ok((stream, _)) = listener.accept() else { return };
        if self.connections.len() >= MAX_CONNECTIONS || stream.set_nonblocking(true).is_err() {
            return;
        }
        let descriptor = stream.as_raw_fd();
        if self.watch(descriptor).is_ok() {
            self.connections.insert(descriptor, Connection { stream, buffer: Vec::new(), handed: None });
        }
    }

    /// Reads what there is, answers each complete request, closes on any trouble.
    fn connection(&mut self, descriptor: RawFd, status: &mut StatusWriter) -> Option<End> {
        let mut connection = self.connections.remove(&descriptor)?;
        let mut end = None;
        let mut open = connection.fill();
        while open && end.is_none() {
            let (response, used) = match http::parse(&connection.buffer) {
                Parsed::Incomplete if connection.buffer.len() < MAX_BUFFERED => break,
                Parsed::Incomplete => (Response::fault("the request is too long"), None),
                Parsed::Bad(why) => (Response::fault(why), None),
                Parsed::Request(request, used) => {
                    let (response, ended) = self.handle(&request, connection.handed.take(), status);
                    end = ended;
                    (response, Some(used))
                }
            };
            open = connection.stream.write_all(&response.to_bytes()).is_ok();
            end = end.or_else(|| self.resume_if_due(status));
            match used {
                Some(used) => drop(connection.buffer.drain(..used)),
                None => open = false,
            }
        }
        if open {
            self.connections.insert(descriptor, connection);
        }
        end
    }

    fn resume_if_due(&mut self, status: &mut StatusWriter) -> Option<End> {
        if !std::mem::take(&mut self.resume_due) {
            return None;
        }
        let Some(Machine::Running(running)) = &mut self.machine else { return None };
        running.resume(status).err().map(|error| End::error(&error))
    }
}

impl Connection {
    /// Reads what there is; false when the other side has closed.
    fn fill(&mut self) -> bool {
        let mut chunk = [0; 16 * 1024];
        loop {
            match self.stream.recv_with_fd(&mut chunk).map_err(std::io::Error::from) {
                Ok((0, _)) => return false,
                Ok((count, handed)) => {
                    self.buffer.extend_from_slice(&chunk[..count]);
                    // Of several the last counts; the others are closed.
                    self.handed = handed.map(OwnedFd::from).or_else(|| self.handed.take());
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return true,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
            if self.buffer.len() >= MAX_BUFFERED {
                return true;
            }
        }
    }
}

/// SIGTERM and SIGINT arrive at a descriptor; all threads that are started later inherit the mask.
pub(crate) fn block_signals() -> std::io::Result<OwnedFd> {
    // SAFETY: a zeroed sigset is valid, and is filled by the calls below.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is valid.
    unsafe { libc::sigemptyset(&raw mut set) };
    for signal in [libc::SIGTERM, libc::SIGINT] {
        // SAFETY: the set and the number are valid.
        unsafe { libc::sigaddset(&raw mut set, signal) };
    }
    // SAFETY: the set is valid; only this thread's mask changes.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
    // SAFETY: the set is valid; the result is checked.
    let descriptor = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    if descriptor < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: signalfd just made this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}
