//! A simulated host: an agent that speaks the real wire types to a controller in the same process, over monitors
//! that are only numbers. Time is passed in; nothing sleeps.
//!
//! ```text
//! what survives      agent killed   monitor killed   host rebooted
//! records (durable)       yes            yes              yes
//! monitors                yes            no               no
//! the agent itself        no             yes              no (until started again)
//! ```
//! The truth about every run is kept beside it ([`TrueRun`]), so that a test can compare a bill with what was.

use roost_types::agent::{
    Desired, Ensure, HelloRequest, HelloResponse, HostFacts, InstanceSpec, Observation, Observed, Orphan,
    PROTOCOL, Report, ReportAck, StateReason, TimedPart,
};
use roost_types::state::DesiredState;
use roost_types::{ApiError, ErrorCode, HostId, InstanceId, Micros};
use std::collections::BTreeMap;

/// What an agent calls; a controller's engine, or something in front of it that loses messages.
pub trait Controller {
    /// First words.
    ///
    /// # Errors
    /// The controller refuses, or is not there.
    fn hello(&self, host: &HostId, request: HelloRequest) -> Result<HelloResponse, ApiError>;
    /// What the host must look like.
    ///
    /// # Errors
    /// The controller is not there.
    fn desired(&self, host: &HostId) -> Result<Desired, ApiError>;
    /// What the host looks like.
    ///
    /// # Errors
    /// The controller is not there.
    fn report(&self, host: &HostId, report: Report) -> Result<ReportAck, ApiError>;
}

/// A controller that is not there.
pub fn unreachable() -> ApiError {
    ApiError::new(ErrorCode::Unavailable, "the controller does not answer")
}

/// How a host behaves.
#[derive(Debug, Clone, Copy)]
pub struct Behaviour {
    /// From `ensure` to running virtual CPUs.
    pub prepare: Micros,
    /// From being asked to power off to the end of a guest.
    pub power_off: Micros,
    /// From running to the guest's word that it is ready.
    pub ready: Micros,
    /// Every start fails.
    pub starts_fail: bool,
}

impl Default for Behaviour {
    fn default() -> Self {
        Self {
            prepare: Micros::from_secs(2),
            power_off: Micros::from_secs(2),
            ready: Micros::from_secs(3),
            starts_fail: false,
        }
    }
}

/// What a run really was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrueRun {
    /// The instance.
    pub instance_id: InstanceId,
    /// Which start.
    pub incarnation: u64,
    /// Virtual CPUs began to run.
    pub began: Micros,
    /// They ended.
    pub ended: Option<Micros>,
    /// Whether an agent, or the monitor's own last word, dated the end.
    pub end_known: bool,
    /// Until when an agent saw it alive, by its durable record; lost with a reboot of the host.
    pub last_seen: Option<Micros>,
    /// Until when the controller was told that it runs, and took it.
    pub last_told: Option<Micros>,
}

#[derive(Debug, Clone)]
struct Monitor {
    incarnation: u64,
    /// Set when it was asked to power off: when the guest will be done.
    off_at: Option<Micros>,
}

/// How a run ended, as the agent remembers it.
#[derive(Debug, Clone)]
struct End {
    at: Option<Micros>,
    since: Micros,
    reason: Option<StateReason>,
    failed: bool,
}

/// What an agent remembers durably of an instance.
#[derive(Debug, Clone)]
struct Memory {
    ensure: Ensure,
    refused: Option<String>,
    incarnation: u64,
    boot: u64,
    prepared_at: Micros,
    began: Option<Micros>,
    last_seen: Option<Micros>,
    ended: Option<End>,
    absent: bool,
}

/// Why a monitor ended without its agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Death {
    /// It was killed: no word of its own.
    Killed,
    /// The guest powered itself off: the monitor wrote down when.
    PowerOff,
}

fn orphan(memory: &Memory) -> Orphan {
    let state = if memory.ended.is_some() { Observed::Stopped } else { Observed::Running };
    Orphan::of(&memory.ensure, state)
}

/// A simulated host with its agent.
#[derive(Debug)]
pub struct SimHost {
    /// What it is.
    pub facts: HostFacts,
    /// How it behaves.
    pub behaviour: Behaviour,
    /// Whether its agent reaches the controller.
    pub connected: bool,
    /// The truth about all runs, oldest first.
    pub runs: Vec<TrueRun>,
    boot: u64,
    agent_runs: u64,
    agent: Option<Agent>,
    memory: BTreeMap<InstanceId, Memory>,
    monitors: BTreeMap<InstanceId, Monitor>,
    /// Ends that a monitor wrote down itself.
    words: BTreeMap<(InstanceId, u64), Micros>,
    now: Micros,
}

#[derive(Debug)]
struct Agent {
    run: String,
    greeted: bool,
    /// Instances that the newest `Desired` names; `None` before the first `Desired`.
    named: Option<Vec<InstanceId>>,
    /// Monitors that this agent has itself seen alive: it dates their end.
    watched: BTreeMap<InstanceId, u64>,
}

impl SimHost {
    /// A host with its agent running. `number` makes its id.
    pub fn new(number: u8, cpus: u32, memory_mib: u64, now: Micros) -> Self {
        let facts = HostFacts {
            host_id: HostId::from_random([number; 9]),
            hostname: format!("sim-{number}"),
            zone: "home-1a".to_owned(),
            cpus,
            cpu_milli: u64::from(cpus) * 1000,
            memory_mib,
            disk_gib: 1000,
            max_vcpus: cpus,
            overhead_mib: 16,
            gpus: 0,
        };
        let mut host = Self {
            facts,
            behaviour: Behaviour::default(),
            connected: true,
            runs: Vec::new(),
            boot: 1,
            agent_runs: 0,
            agent: None,
            memory: BTreeMap::new(),
            monitors: BTreeMap::new(),
            words: BTreeMap::new(),
            now,
        };
        host.start_agent();
        host
    }

    /// Its id.
    pub fn id(&self) -> &HostId {
        &self.facts.host_id
    }

    /// Starts the agent if it does not run.
    pub fn start_agent(&mut self) {
        if self.agent.is_none() {
            self.agent_runs += 1;
            let run = format!("run-{}", self.agent_runs);
            self.agent = Some(Agent { run, greeted: false, named: None, watched: BTreeMap::new() });
        }
    }

    /// Kills the agent; monitors go on.
    pub fn kill_agent(&mut self) {
        self.agent = None;
    }

    /// Stops the agent in order: it says for the last time what it sees. Monitors go on.
    ///
    /// # Errors
    /// What the controller answered, or that it is not reached; the agent is gone all the same.
    pub fn stop_agent(&mut self, controller: &dyn Controller) -> Result<(), ApiError> {
        let report = Report { last: true, ..self.report() };
        if self.agent.take().is_none() {
            return Ok(());
        }
        if !self.connected {
            return Err(unreachable());
        }
        self.tell(controller, report)
    }

    /// Ends an instance's monitor now, if it has one.
    pub fn end_monitor(&mut self, instance: &InstanceId, death: Death) {
        if let Some(monitor) = self.monitors.remove(instance) {
            if death == Death::PowerOff {
                self.words.insert((instance.clone(), monitor.incarnation), self.now);
            }
            self.note_end(instance, monitor.incarnation, death == Death::PowerOff);
        }
    }

    /// Ends every monitor now.
    pub fn end_monitors(&mut self, death: Death) {
        let all: Vec<_> = self.monitors.keys().cloned().collect();
        all.iter().for_each(|instance| self.end_monitor(instance, death));
    }

    /// Reboots the host: monitors and agent end, the boot id changes. The agent is to be started again.
    pub fn reboot(&mut self) {
        self.end_monitors(Death::Killed);
        self.kill_agent();
        self.boot += 1;
        self.runs.iter_mut().filter(|run| !run.end_known).for_each(|run| run.last_seen = None);
    }

    /// Instances that anything is left of: a monitor or a disk.
    pub fn leftovers(&self) -> Vec<InstanceId> {
        self.memory.iter().filter(|(_, memory)| !memory.absent).map(|(id, _)| id.clone()).collect()
    }

    /// Instances whose virtual CPUs run.
    pub fn running(&self) -> Vec<InstanceId> {
        self.monitors.keys().cloned().collect()
    }

    /// Lets time pass up to `now`: guests that were asked to power off do.
    pub fn pass_time(&mut self, now: Micros) {
        let due: Vec<_> = self
            .monitors
            .iter()
            .filter(|(_, monitor)| monitor.off_at.is_some_and(|at| at <= now))
            .map(|(id, monitor)| (id.clone(), monitor.off_at.unwrap_or(now)))
            .collect();
        for (instance, at) in due {
            self.now = self.now.max(at);
            self.end_monitor(&instance, Death::PowerOff);
        }
        self.now = now;
    }

    /// One round of the agent: hears what is wanted, does what is due, reports what it sees. Nothing if it is dead.
    ///
    /// # Errors
    /// What the controller answered, or that it is not reached; the host goes on all the same.
    pub fn round(&mut self, controller: &dyn Controller) -> Result<(), ApiError> {
        let Some(agent) = &self.agent else { return Ok(()) };
        let id = self.facts.host_id.clone();
        let mut heard = Err(unreachable());
        if self.connected {
            let greeted = if agent.greeted {
                Ok(())
            } else {
                let hello =
                    HelloRequest { protocol: PROTOCOL, version: "sim".into(), host: self.facts.clone() };
                controller.hello(&id, hello).map(|_| ())
            };
            heard = greeted.and_then(|()| controller.desired(&id));
        }
        if let (Ok(desired), Some(agent)) = (&heard, &mut self.agent) {
            agent.greeted = true;
            agent.named = Some(desired.instances.iter().map(|ensure| ensure.instance_id.clone()).collect());
            for id in &desired.end {
                if let Some(memory) = self.memory.get_mut(id) {
                    memory.ensure.spec.desired = DesiredState::Terminated;
                }
            }
            desired.instances.iter().for_each(|ensure| self.take_in(ensure));
            self.memory.retain(|id, memory| {
                !memory.absent || desired.instances.iter().any(|ensure| ensure.instance_id == *id)
            });
        }
        let instances: Vec<_> = self.memory.keys().cloned().collect();
        instances.iter().for_each(|instance| self.work_on(instance));
        heard?;
        let report = self.report();
        self.tell(controller, report)
    }

    fn tell(&mut self, controller: &dyn Controller, report: Report) -> Result<(), ApiError> {
        let running: Vec<_> = report
            .instances
            .iter()
            .filter(|word| word.state == Observed::Running)
            .map(|word| (word.instance_id.clone(), word.incarnation))
            .collect();
        controller.report(&self.facts.host_id, report)?;
        for run in &mut self.runs {
            if running.contains(&(run.instance_id.clone(), run.incarnation)) {
                run.last_told = Some(self.now);
            }
        }
        Ok(())
    }

    fn take_in(&mut self, ensure: &Ensure) {
        let now = self.now;
        let memory = self.memory.entry(ensure.instance_id.clone()).or_insert_with(|| Memory {
            ensure: ensure.clone(),
            refused: None,
            incarnation: 0,
            boot: 0,
            prepared_at: now,
            began: None,
            last_seen: None,
            ended: None,
            absent: false,
        });
        let (have, got) = (memory.ensure.generation, ensure.generation);
        memory.refused = None;
        if got < have {
            memory.refused = Some(format!("generation {got} is older than {have}"));
        } else if got == have && memory.ensure != *ensure {
            memory.refused = Some(format!("generation {got} came with another spec"));
        } else {
            memory.ensure = ensure.clone();
        }
    }

    /// Makes one instance as it is wanted, as far as that is possible now.
    fn work_on(&mut self, instance: &InstanceId) {
        self.notice_end(instance);
        let Some(memory) = self.memory.get(instance) else { return };
        let spec = memory.ensure.spec.clone();
        let monitor = self.monitors.get(instance).map(|monitor| monitor.incarnation);
        match (spec.desired, monitor) {
            (DesiredState::Running, Some(incarnation)) if incarnation == spec.incarnation => {
                self.look_after(instance);
            }
            (DesiredState::Running | DesiredState::Terminated, Some(_)) => self.kill(instance),
            (DesiredState::Running, None) => self.prepare(instance, &spec),
            (DesiredState::Stopped, Some(_)) if spec.force => self.kill(instance),
            (DesiredState::Stopped, Some(_)) => self.power_off(instance),
            (DesiredState::Stopped, None) => self.skip(instance, &spec),
            (DesiredState::Terminated, None) => {
                self.skip(instance, &spec);
                if let Some(memory) = self.memory.get_mut(instance) {
                    memory.absent = true;
                }
            }
        }
    }

    /// A monitor that is gone though its run has no end: note the end, dated if anybody can date it.
    fn notice_end(&mut self, instance: &InstanceId) {
        let (boot, now) = (self.boot, self.now);
        let Some(memory) = self.memory.get_mut(instance) else { return };
        let alive = self.monitors.get(instance).is_some_and(|m| m.incarnation == memory.incarnation);
        if alive || memory.began.is_none() || memory.ended.is_some() {
            return;
        }
        let same_boot = memory.boot == boot;
        let word = self.words.get(&(instance.clone(), memory.incarnation)).copied().filter(|_| same_boot);
        let watched = self.agent.as_ref().is_some_and(|agent| agent.watched.contains_key(instance));
        let truth = self
            .runs
            .iter_mut()
            .find(|run| run.instance_id == *instance && run.incarnation == memory.incarnation);
        let died = truth.as_ref().and_then(|run| run.ended).unwrap_or(now);
        let at = word.or(watched.then_some(died));
        if let Some(run) = truth {
            run.end_known |= at.is_some();
        }
        let asked = memory.ensure.spec.desired != DesiredState::Running;
        let code = match (word, same_boot) {
            (Some(_), _) => "Client.InstanceInitiatedShutdown",
            (None, true) => "Server.MonitorKilled",
            (None, false) => "Server.HostReboot",
        };
        let reason = StateReason { code: code.into(), message: "the simulated run ended".into() };
        memory.ended = Some(End { at, since: now, reason: (!asked).then_some(reason), failed: false });
    }

    fn look_after(&mut self, instance: &InstanceId) {
        let now = self.now;
        let Some(memory) = self.memory.get_mut(instance) else { return };
        memory.last_seen = Some(now);
        if let Some(agent) = &mut self.agent {
            agent.watched.insert(instance.clone(), memory.incarnation);
        }
        let incarnation = memory.incarnation;
        self.truth(instance, incarnation, |run| run.last_seen = Some(now));
    }

    fn truth(&mut self, instance: &InstanceId, incarnation: u64, edit: impl FnOnce(&mut TrueRun)) {
        let mut runs = self.runs.iter_mut();
        if let Some(run) = runs.find(|run| run.instance_id == *instance && run.incarnation == incarnation) {
            edit(run);
        }
    }

    fn note_end(&mut self, instance: &InstanceId, incarnation: u64, known: bool) {
        let now = self.now;
        self.truth(instance, incarnation, |run| {
            run.ended = Some(now);
            run.end_known |= known;
        });
    }

    /// The agent ends a monitor itself, and so sees its end.
    fn kill(&mut self, instance: &InstanceId) {
        self.look_after(instance);
        self.end_monitor(instance, Death::Killed);
        self.notice_end(instance);
        let now = self.now;
        if let Some(end) = self.memory.get_mut(instance).and_then(|memory| memory.ended.as_mut()) {
            end.at = end.at.or(Some(now));
        }
    }

    fn power_off(&mut self, instance: &InstanceId) {
        self.look_after(instance);
        let at = self.now + self.behaviour.power_off;
        if let Some(monitor) = self.monitors.get_mut(instance) {
            monitor.off_at.get_or_insert(at);
        }
    }

    /// An incarnation that shall not run any more and never did.
    fn skip(&mut self, instance: &InstanceId, spec: &InstanceSpec) {
        let (boot, now) = (self.boot, self.now);
        if let Some(memory) = self.memory.get_mut(instance)
            && memory.incarnation < spec.incarnation
        {
            memory.incarnation = spec.incarnation;
            memory.boot = boot;
            memory.began = None;
            memory.last_seen = None;
            memory.ended = Some(End { at: None, since: now, reason: None, failed: false });
        }
    }

    fn prepare(&mut self, instance: &InstanceId, spec: &InstanceSpec) {
        let (boot, now, behaviour) = (self.boot, self.now, self.behaviour);
        let Some(memory) = self.memory.get_mut(instance) else { return };
        if memory.incarnation < spec.incarnation {
            memory.incarnation = spec.incarnation;
            memory.boot = boot;
            memory.prepared_at = now + behaviour.prepare;
            memory.began = None;
            memory.last_seen = None;
            memory.ended = None;
        }
        if memory.ended.is_some() || now < memory.prepared_at {
            return;
        }
        if behaviour.starts_fail {
            let message = "the simulated start fails".to_owned();
            let reason = Some(StateReason { code: "Server.InternalError".into(), message });
            memory.ended = Some(End { at: None, since: now, reason, failed: true });
            return;
        }
        memory.began = Some(now);
        memory.boot = boot;
        let incarnation = spec.incarnation;
        self.monitors.insert(instance.clone(), Monitor { incarnation, off_at: None });
        self.runs.push(TrueRun {
            instance_id: instance.clone(),
            incarnation,
            began: now,
            ended: None,
            end_known: false,
            last_seen: None,
            last_told: None,
        });
        self.look_after(instance);
    }

    /// Everything that the agent sees, now.
    fn report(&self) -> Report {
        let run = self.agent.as_ref().map_or_else(String::new, |agent| agent.run.clone());
        Report {
            host: self.facts.clone(),
            boot_id: format!("boot-{}", self.boot),
            agent_run: run,
            instances: self.memory.values().map(|memory| self.observe(memory)).collect(),
            trouble: Vec::new(),
            orphans: self.memory.values().filter(|memory| self.is_orphan(memory)).map(orphan).collect(),
            last: false,
        }
    }

    fn is_orphan(&self, memory: &Memory) -> bool {
        let named = self.agent.as_ref().and_then(|agent| agent.named.as_ref());
        named.is_some_and(|named| !named.contains(&memory.ensure.instance_id)) && !memory.absent
    }

    fn observe(&self, memory: &Memory) -> Observation {
        let age = |at: Micros| u64::try_from((self.now - at).0).unwrap_or(0);
        let same_boot = memory.boot == self.boot;
        let monitor = self.monitors.get(&memory.ensure.instance_id);
        let current = memory.incarnation == memory.ensure.spec.incarnation;
        let (state, since) = match (memory.absent, monitor, &memory.ended) {
            (true, ..) => (Observed::Absent, self.now),
            (_, Some(_), _) if memory.ensure.spec.desired != DesiredState::Running => {
                (Observed::Stopping, self.now)
            }
            (_, Some(_), _) => (Observed::Running, memory.began.unwrap_or(self.now)),
            (_, None, Some(end)) if end.failed => (Observed::Failed, end.since),
            (_, None, Some(end)) => (Observed::Stopped, end.since),
            (_, None, None) => (Observed::Preparing, memory.prepared_at.min(self.now)),
        };
        let dated = current && same_boot;
        let ready = memory.began.filter(|_| monitor.is_some()).map(|began| began + self.behaviour.ready);
        Observation {
            instance_id: memory.ensure.instance_id.clone(),
            generation: memory.ensure.generation,
            incarnation: memory.ensure.spec.incarnation,
            state,
            reason: memory.ended.as_ref().and_then(|end| end.reason.clone()),
            age_us: age(since),
            run_began_age_us: memory.began.filter(|_| dated).map(age),
            run_ended_age_us: memory.ended.as_ref().and_then(|end| end.at).filter(|_| dated).map(age),
            last_seen_age_us: memory.last_seen.filter(|_| dated).map(age),
            refused: memory.refused.clone(),
            trouble: None,
            guest_ready: ready.is_some_and(|at| at <= self.now),
            ssh_host_key: None,
            user_data_not_run: None,
            cpu_usage_us: None,
            timing: vec![TimedPart { part: "agent.prepare".into(), took_us: 1 }],
        }
    }
}
