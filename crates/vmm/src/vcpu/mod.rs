//! One thread per vCPU, steered by messages.
//!
//! ```text
//!   start ──▶ parked ──Run──▶ running ──Finish──▶ finished
//!              ▲ │ Reset        │ Pause, or the guest stopped
//!              └─┴──────────────┘
//! ```
//! A running vCPU is deep inside KVM_RUN. To reach it: send the message, set `immediate_exit` in its shared page, send
//! the signal. It leaves KVM_RUN (or does not enter it), clears the flag, and only then looks for messages, so no
//! order of these steps loses one.

pub mod crash;
pub mod kick;

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_bindings::{
    KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, kvm_msr_entry,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::bus::{Bus, Outcome};
use crate::cpu::model::CpuModel;
use crate::cpu::registers::{self, Entry};
use crate::cpu::state::{SavedVcpu, VcpuState, write_msrs};
use crate::error::{Error, Result};
use crate::event_loop::Notifier;
use crate::memory::Memory;
use crate::vm::Vm;
use crate::{seccomp, threads};
use kick::KickPage;

/// What a vCPU is told.
enum Command {
    /// Run the guest.
    Run,
    /// Stop running.
    Pause,
    /// Go back to the state after power-on; the first vCPU then starts at the entry.
    Reset(Option<Entry>),
    /// Tell the state.
    Save,
    /// Take over a state, with the TSC set forward by so much.
    Load(Box<SavedVcpu>, Duration),
    /// End the thread.
    Finish,
}

/// What a vCPU answers, once per command.
enum Reply {
    Ready,
    Done,
    State(Box<SavedVcpu>),
    Failed(Error),
}

/// Why the guest stopped by itself; sent to the main thread.
#[derive(Debug)]
pub enum Stop {
    /// It powered off.
    PowerOff,
    /// It wants to be started again.
    Reset,
    /// It cannot go on; the text says why, with registers and instruction bytes.
    Crash(String),
    /// KVM failed.
    Kvm(Error),
}

/// The spaces that a guest's accesses go to.
#[derive(Clone, Debug, Default)]
pub struct Buses {
    /// Ports.
    pub ports: Bus,
    /// Memory-mapped registers.
    pub mmio: Bus,
}

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MSR_MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, default type write-back.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;

/// The thread's side.
struct Vcpu {
    id: u8,
    fd: VcpuFd,
    buses: Arc<Buses>,
    memory: Memory,
    start: VcpuState,
    template_msrs: Vec<u32>,
    commands: Receiver<Command>,
    replies: Sender<Reply>,
    notifier: Notifier,
    /// It has never run, so it is as after power-on.
    fresh: bool,
}

/// The main thread's side.
#[derive(Debug)]
pub struct VcpuHandle {
    id: u8,
    thread: Option<JoinHandle<()>>,
    commands: Sender<Command>,
    replies: Receiver<Reply>,
    kick: KickPage,
}

/// How long one wait for an answer lasts before the vCPU is kicked again.
const KICK_AGAIN: Duration = Duration::from_millis(20);

/// Makes a new vCPU what its model says: its CPUID table, its MSRs as firmware leaves them, and what the machine's template changes.
///
/// # Errors
/// [`Error::Kvm`], [`Error::Config`] for an MSR of the template.
pub fn prepare(fd: &VcpuFd, model: &CpuModel, id: u8) -> Result<()> {
    fd.set_cpuid2(&model.table(id)?).map_err(Error::kvm("KVM_SET_CPUID2"))?;
    let msr = |index, data| kvm_msr_entry { index, data, ..kvm_msr_entry::default() };
    write_msrs(
        fd,
        &[msr(MSR_MISC_ENABLE, MSR_MISC_ENABLE_FAST_STRING), msr(MSR_MTRR_DEF_TYPE, MTRR_WRITE_BACK)],
    );
    model.change_msrs(fd)
}

impl VcpuHandle {
    /// Makes vCPU number `id` and starts its thread, which parks behind its filter: [`VcpuHandle::wait_parked`] waits for that. `cpu` is
    /// what it can do, and its MSRs.
    ///
    /// # Errors
    /// [`Error::Kvm`], [`Error::Io`], [`Error::Seccomp`], [`Error::Config`] for an MSR of the machine's CPU template.
    pub fn start(
        vm: &Vm,
        cpu: (&CpuModel, &[u32]),
        id: u8,
        buses: &Arc<Buses>,
        memory: &Memory,
        notifier: Notifier,
        filter: seccomp::Filter,
    ) -> Result<Self> {
        let fd = vm.create_vcpu(id)?;
        let (model, msr_indices) = cpu;
        prepare(&fd, model, id)?;
        let start = VcpuState::capture(&fd, msr_indices)?;
        let kick = KickPage::new(&fd)?;
        let (commands, command_receiver) = channel();
        let (reply_sender, replies) = channel();
        let vcpu = Vcpu {
            id,
            fd,
            buses: Arc::clone(buses),
            memory: memory.clone(),
            start,
            template_msrs: model.template_msrs(),
            commands: command_receiver,
            replies: reply_sender,
            notifier,
            fresh: true,
        };
        let thread = threads::spawn(threads::vcpu(id), move || vcpu.main(&filter))?;
        Ok(Self { id, thread: Some(thread), commands, replies, kick })
    }

    /// Waits until a new thread is behind its filter, before it is told anything.
    ///
    /// # Errors
    /// [`Error::Seccomp`].
    pub fn wait_parked(&self) -> Result<()> {
        self.wait("lock down")
    }

    /// Its number.
    #[must_use]
    pub const fn id(&self) -> u8 {
        self.id
    }

    /// Puts the vCPU into the state after power-on; the one that gets an entry will start there.
    ///
    /// # Errors
    /// [`Error::Kvm`].
    pub fn reset(&self, entry: Option<Entry>) -> Result<()> {
        self.send(Command::Reset(entry))?;
        self.wait("reset")
    }

    /// Reads the state of a parked vCPU.
    ///
    /// # Errors
    /// [`Error::Kvm`].
    pub fn save(&self) -> Result<SavedVcpu> {
        self.send(Command::Save)?;
        match self.answer("tell its state")? {
            Reply::State(state) => Ok(*state),
            _ => Err(Error::State(format!("vCPU {} did not tell its state", self.id))),
        }
    }

    /// Puts a state into a parked vCPU, its TSC set forward by `passed`.
    ///
    /// # Errors
    /// [`Error::Kvm`], [`Error::Snapshot`].
    pub fn load(&self, state: SavedVcpu, passed: Duration) -> Result<()> {
        self.send(Command::Load(Box::new(state), passed))?;
        self.wait("load")
    }

    /// Lets the guest run.
    ///
    /// # Errors
    /// The thread has ended.
    pub fn run(&self) -> Result<()> {
        self.send(Command::Run)?;
        self.wait("run")
    }

    /// Asks the vCPU to pause; [`VcpuHandle::wait_paused`] waits for it.
    ///
    /// # Errors
    /// The thread has ended.
    pub fn pause(&self) -> Result<()> {
        self.send(Command::Pause)?;
        self.kick.kick(self.thread.as_ref());
        Ok(())
    }

    /// Waits until the vCPU is parked.
    ///
    /// # Errors
    /// The thread has ended.
    pub fn wait_paused(&self) -> Result<()> {
        self.wait("pause")
    }

    fn send(&self, command: Command) -> Result<()> {
        self.commands.send(command).map_err(|_| Error::State(format!("vCPU {} has ended", self.id)))
    }

    fn wait(&self, what: &str) -> Result<()> {
        self.answer(what).map(drop)
    }

    fn answer(&self, what: &str) -> Result<Reply> {
        loop {
            match self.replies.recv_timeout(KICK_AGAIN) {
                Ok(Reply::Failed(error)) => return Err(error),
                Ok(reply) => return Ok(reply),
                Err(RecvTimeoutError::Timeout) => self.kick.kick(self.thread.as_ref()),
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Error::State(format!("vCPU {} ended while it should {what}", self.id)));
                }
            }
        }
    }
}

impl Drop for VcpuHandle {
    fn drop(&mut self) {
        if self.commands.send(Command::Finish).is_ok() {
            self.kick.kick(self.thread.as_ref());
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What one look at the guest led to.
enum Step {
    Go,
    Look,
    Stop(Stop),
}

/// Why a vCPU does not run any more.
enum Left {
    Paused,
    Stopped,
    Finished,
}

impl Vcpu {
    fn main(mut self, filter: &seccomp::Filter) {
        kick::unblock_signal();
        let locked = seccomp::install(filter);
        let answer = locked.map_or_else(Reply::Failed, |()| Reply::Ready);
        if self.replies.send(answer).is_err() {
            return;
        }
        // Parked: wait for messages. Running: run, and look for messages after each kick.
        while let Ok(command) = self.commands.recv() {
            let reply = match command {
                Command::Finish => return,
                Command::Pause => Reply::Done,
                Command::Reset(entry) => self.reset(entry).map_or_else(Reply::Failed, |()| Reply::Done),
                Command::Save => {
                    self.save().map_or_else(Reply::Failed, |state| Reply::State(Box::new(state)))
                }
                Command::Load(state, passed) => {
                    let restored = state.restore(&self.fd, passed, &self.template_msrs);
                    restored.map_or_else(Reply::Failed, |()| Reply::Done)
                }
                Command::Run => {
                    if self.replies.send(Reply::Done).is_err() {
                        return;
                    }
                    match self.run() {
                        Left::Paused => Reply::Done,
                        Left::Stopped => continue,
                        Left::Finished => return,
                    }
                }
            };
            if self.replies.send(reply).is_err() {
                return;
            }
        }
    }

    /// KVM completes the access that the vCPU was last stopped at (KVM API, 5: immediate_exit); after that nothing of it is
    /// left to happen.
    fn settle(&mut self) {
        self.fd.set_kvm_immediate_exit(1);
        let _ = self.fd.run();
        self.fd.set_kvm_immediate_exit(0);
    }

    fn reset(&mut self, entry: Option<Entry>) -> Result<()> {
        // Others may send INIT and SIPI to a vCPU that is parked. KVM acts on them when it is asked for the state, and they are over
        // with then. The first vCPU gets none before it has run.
        let asked = !self.fresh || entry.is_none();
        let state = if asked { self.fd.get_mp_state().ok() } else { None };
        let stirred = state.is_some() && state != self.start.mp_state();
        if !self.fresh || stirred {
            self.settle();
            self.start.restore(&self.fd)?;
        }
        if let Some(entry) = entry {
            let mut sregs = *self.start.sregs();
            registers::special(&mut sregs, entry);
            self.fd.set_sregs(&sregs).map_err(Error::kvm("KVM_SET_SREGS"))?;
            self.fd.set_regs(&registers::general(entry)).map_err(Error::kvm("KVM_SET_REGS"))?;
        }
        Ok(())
    }

    /// A paused vCPU has left KVM_RUN by a kick, so nothing of an access is left to happen.
    fn save(&self) -> Result<SavedVcpu> {
        SavedVcpu::capture(&self.fd, &self.start)
    }

    /// Runs until told otherwise, or until the guest stops by itself.
    fn run(&mut self) -> Left {
        self.fresh = false;
        // A guest that has a paravirtual clock learns that it was stopped; others do not have the call.
        let _ = self.fd.kvmclock_ctrl();
        loop {
            match self.step() {
                Step::Go => self.notifier.ran(),
                Step::Look => match self.commands.try_recv() {
                    Ok(Command::Run) => {
                        let _ = self.replies.send(Reply::Done);
                    }
                    Ok(Command::Pause) => return Left::Paused,
                    Ok(Command::Reset(_) | Command::Save | Command::Load(..)) => {
                        let error = Error::State("a running vCPU can only be paused".into());
                        let _ = self.replies.send(Reply::Failed(error));
                    }
                    Ok(Command::Finish) | Err(TryRecvError::Disconnected) => return Left::Finished,
                    Err(TryRecvError::Empty) => {}
                },
                Step::Stop(stop) => {
                    // Parked again; the main thread decides what happens.
                    self.notifier.stopped(stop);
                    return Left::Stopped;
                }
            }
        }
    }

    fn step(&mut self) -> Step {
        let has_memory = |address| self.memory.address_in_range(GuestAddress(address));
        let outcome = match self.fd.run() {
            Ok(VcpuExit::IoOut(port, data)) => self.buses.ports.write(u64::from(port), data),
            Ok(VcpuExit::IoIn(port, data)) => {
                self.buses.ports.read(u64::from(port), data);
                Outcome::Done
            }
            // Instructions that KVM runs itself bring accesses to memory here when it could not reach the page: a kick came while somebody
            // brought it, or it is not there. Whoever looks gets it, or ends the process ([`crate::sigbus`]). For writes to what is
            // read-only there is a device.
            Ok(VcpuExit::MmioWrite(address, data))
                if has_memory(address) && !self.buses.mmio.has(address) =>
            {
                let _ = self.memory.write_slice(data, GuestAddress(address));
                Outcome::Done
            }
            Ok(VcpuExit::MmioRead(address, data)) if has_memory(address) => {
                let _ = self.memory.read_slice(data, GuestAddress(address));
                Outcome::Done
            }
            Ok(VcpuExit::MmioWrite(address, data)) => self.buses.mmio.write(address, data),
            Ok(VcpuExit::MmioRead(address, data)) => {
                self.buses.mmio.read(address, data);
                Outcome::Done
            }
            Ok(VcpuExit::Intr) => return self.look(),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => return self.look(),
            Ok(VcpuExit::Hlt | VcpuExit::IrqWindowOpen | VcpuExit::SetTpr | VcpuExit::IoapicEoi(_)) => {
                Outcome::Done
            }
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _)) => Outcome::PowerOff,
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _)) => Outcome::Reset,
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_CRASH, _)) => {
                return self.crash("the guest reported a crash");
            }
            Ok(VcpuExit::Shutdown) => {
                return self
                    .crash("triple fault: an exception that the guest could not handle (KVM_EXIT_SHUTDOWN)");
            }
            Ok(VcpuExit::InternalError) => {
                let reason = crash::internal_error(self.fd.get_kvm_run());
                return self.crash(&reason);
            }
            Ok(VcpuExit::FailEntry(reason, cpu)) => {
                let reason = format!(
                    "the CPU refused to enter the guest (KVM_EXIT_FAIL_ENTRY, hardware reason {reason:#x}, host CPU {cpu})"
                );
                return self.crash(&reason);
            }
            Ok(VcpuExit::MemoryFault { gpa, size, .. }) => {
                let reason = format!(
                    "the host could not give memory for {size} bytes at {gpa:#x} (KVM_EXIT_MEMORY_FAULT)"
                );
                return self.crash(&reason);
            }
            Ok(other) => {
                let reason =
                    format!("KVM left the guest for a reason that the monitor does not handle: {other:?}");
                return self.crash(&reason);
            }
            // Nothing of the registers says which page it was.
            Err(error) if error.errno() == libc::EFAULT => {
                let what = format!("the guest touched {} (KVM_RUN: {error})", crate::sigbus::MISSING);
                return Step::Stop(Stop::Kvm(Error::Memory(what)));
            }
            Err(source) => return Step::Stop(Stop::Kvm(Error::Kvm { what: "KVM_RUN", source })),
        };
        match outcome {
            Outcome::Done => Step::Go,
            Outcome::PowerOff => Step::Stop(Stop::PowerOff),
            Outcome::Reset => Step::Stop(Stop::Reset),
        }
    }

    fn look(&mut self) -> Step {
        self.fd.set_kvm_immediate_exit(0);
        Step::Look
    }

    fn crash(&self, reason: &str) -> Step {
        Step::Stop(Stop::Crash(crash::report(self.id, &self.fd, &self.memory, reason)))
    }
}
