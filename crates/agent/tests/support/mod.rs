//! A host in memory: it keeps what is made on it, as the kernel does, while agents on it come and go, and an agent
//! can be made to die at any operation, before or after it took effect.

#![allow(dead_code, clippy::unwrap_used)] // each test file uses its own part; a test may panic

use roost_agent::agent::{Agent, StateLock};
use roost_agent::error::{Error, Result};
use roost_agent::host::{Death, Facts, Host, LastWord, MonitorFact, Started};
use roost_agent::names::Folders;
use roost_agent::record::{Accepted, MonitorId, Run};
use roost_agent::task::Pace;
use roost_agent::trouble::Troubles;
use roost_types::agent::{Desired, Ensure, HostFacts, Observation};
use roost_types::ids::{HostId, InstanceId};
use roost_vmm::status::ExitReason;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

#[derive(Debug, Default, Clone)]
pub struct Machine {
    pub disk: bool,
    pub network: Option<String>,
    pub cgroup: bool,
    pub monitor: Option<MonitorId>,
    pub monitor_alive: bool,
    pub ran_ns: Option<u64>,
    pub word: Option<LastWord>,
    /// Times of the guest's resets in the current monitor.
    pub resets_ns: Vec<u64>,
    pub console: Vec<u8>,
    /// How often vCPUs were let run, over all incarnations.
    pub runs: u32,
    pub power_presses: u32,
    /// Presses of the power button that its guest does not hear.
    pub deaf_to: u32,
    pub breaks_at_start: bool,
    /// The monitor answers no call.
    pub is_mute: bool,
    /// Somebody kills the monitor as soon as it has started.
    pub is_killed_at_start: bool,
}

#[derive(Debug, Default)]
pub struct World {
    pub machines: BTreeMap<InstanceId, Machine>,
    pub images: bool,
    pub next_pid: i32,
    pub boot: u32,
    pub operations: u64,
    /// Slots whose user ids are in use by a process.
    pub slots: BTreeSet<u32>,
    /// Number of looks that an agent has made.
    pub looks: u64,
    /// The agent dies at this operation; `true`: after it took effect.
    pub crash_at: Option<(u64, bool)>,
    pub crashed: bool,
    pub deaths: u32,
    /// Name of an operation that fails, and whether for good.
    pub fails: Option<(&'static str, bool)>,
    pub log: Vec<String>,
}

pub struct Shared {
    pub world: Mutex<World>,
    pub bell: Notify,
    pub crash: Notify,
    pub clock: AtomicU64,
}

impl Shared {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            world: Mutex::new(World { next_pid: 100, ..World::default() }),
            bell: Notify::new(),
            crash: Notify::new(),
            clock: AtomicU64::new(1_000_000_000),
        })
    }

    pub fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap()
    }

    /// Changes one machine from outside, as a guest or a kernel would.
    pub fn poke(&self, id: &InstanceId, change: impl FnOnce(&mut Machine)) {
        change(self.world().machines.entry(id.clone()).or_default());
        self.bell.notify_waiters();
    }

    /// The monitor ends with a word of its own, or is killed without.
    pub fn end(&self, id: &InstanceId, reason: Option<ExitReason>) {
        self.end_at(id, reason, self.now());
    }

    /// Ends the monitor, which dates its own end.
    pub fn end_at(&self, id: &InstanceId, reason: Option<ExitReason>, at_ns: u64) {
        self.poke(id, |machine| {
            machine.monitor_alive = false;
            machine.word = reason.map(|reason| LastWord { at_ns, reason, message: "said so".into() });
        });
    }

    pub fn now(&self) -> u64 {
        self.clock.fetch_add(1000, Ordering::SeqCst)
    }
}

/// One agent's view of the world; what it holds in memory dies with it.
pub struct FakeHost {
    pub shared: Arc<Shared>,
    services: Mutex<BTreeSet<(InstanceId, String)>>,
    limits: Mutex<BTreeSet<InstanceId>>,
    troubles: Troubles,
}

impl FakeHost {
    pub fn new(shared: &Arc<Shared>) -> Arc<Self> {
        let shared = Arc::clone(shared);
        Arc::new(Self {
            shared,
            services: Mutex::default(),
            limits: Mutex::default(),
            troubles: Troubles::default(),
        })
    }

    /// Does one operation, dying at it when its turn has come.
    async fn operation<T>(
        &self,
        name: &'static str,
        of: &Accepted,
        effect: impl FnOnce(&mut Machine) -> T,
    ) -> Result<T> {
        let (before, after) = {
            let mut world = self.shared.world();
            let number = world.operations;
            world.operations += 1;
            world.log.push(format!("{number} {name}"));
            if let Some((failing, for_good)) = world.fails
                && failing == name
            {
                let what = format!("{name} fails");
                return Err(if for_good { Error::Impossible(what) } else { Error::NotNow(what) });
            }
            let crash = world.crash_at.filter(|(at, _)| *at == number);
            (crash == Some((number, false)), crash == Some((number, true)))
        };
        if before {
            self.die().await;
        }
        let result = effect(self.shared.world().machines.entry(of.id().clone()).or_default());
        self.shared.bell.notify_waiters();
        if after {
            self.die().await;
        }
        Ok(result)
    }

    /// A monitor's answer; `None` of a mute one.
    async fn answer(&self, of: &Accepted) {
        if self.shared.world().machines.get(of.id()).is_some_and(|machine| machine.is_mute) {
            std::future::pending::<()>().await;
        }
    }

    async fn die(&self) {
        {
            let mut world = self.shared.world();
            world.crashed = true;
            world.deaths += 1;
        }
        self.shared.crash.notify_waiters();
        std::future::pending::<()>().await;
    }

    fn key(of: &Accepted) -> (InstanceId, String) {
        (of.id().clone(), roost_agent::record::hash_of(&(&of.spec().interface, &of.spec().metadata)))
    }
}

impl Host for FakeHost {
    fn now_ns(&self) -> u64 {
        self.shared.now()
    }

    fn boot_id(&self) -> String {
        format!("boot-{}", self.shared.world().boot)
    }

    fn facts(&self) -> HostFacts {
        HostFacts {
            host_id: HostId::from_random([1; 9]),
            hostname: "fake".into(),
            zone: "home-1a".into(),
            cpus: 2,
            cpu_milli: 2000,
            memory_mib: 4096,
            disk_gib: 100,
            max_vcpus: 32,
            overhead_mib: 64,
            gpus: 0,
        }
    }

    fn slots_in_use(&self) -> BTreeSet<u32> {
        self.shared.world().slots.clone()
    }

    fn troubles(&self) -> &Troubles {
        &self.troubles
    }

    async fn look(&self, of: &Accepted, run: &Run) -> Result<Facts> {
        let images = {
            let mut world = self.shared.world();
            world.looks += 1;
            world.images
        };
        let machine = self.shared.world().machines.get(of.id()).cloned().unwrap_or_default();
        let rebooted = run.boot_id != self.boot_id();
        let death = Death {
            ran_ns: machine.ran_ns.filter(|_| !rebooted),
            word: machine.word.clone(),
            out_of_memory: false,
            host_rebooted: rebooted,
        };
        let monitor = match (&run.monitor, &machine.monitor) {
            (Some(known), Some(there)) if known == there && machine.monitor_alive && !rebooted => {
                MonitorFact::Alive { ran_ns: machine.ran_ns, resets_ns: machine.resets_ns.clone() }
            }
            (Some(_), _) => MonitorFact::Dead(death),
            (None, _) if machine.monitor_alive => MonitorFact::Stray,
            (None, _) if rebooted && run.is_open() => MonitorFact::Dead(death),
            (None, _) => MonitorFact::None,
        };
        Ok(Facts {
            images,
            disk: machine.disk,
            network: machine.network == Some(Self::key(of).1)
                && self.services.lock().unwrap().contains(&Self::key(of)),
            cgroup: machine.cgroup && self.limits.lock().unwrap().contains(of.id()),
            monitor,
            run_objects: machine.network.is_some() || machine.cgroup,
            files: machine.disk,
        })
    }

    async fn fetch(&self, of: &Accepted) -> Result<()> {
        self.operation("fetch", of, |_| ()).await?;
        self.shared.world().images = true;
        Ok(())
    }

    async fn make_disk(&self, of: &Accepted) -> Result<()> {
        self.operation("disk", of, |machine| machine.disk = true).await
    }

    async fn make_network(&self, of: &Accepted) -> Result<()> {
        let key = Self::key(of);
        self.operation("network", of, |machine| machine.network = Some(key.1.clone())).await?;
        self.services.lock().unwrap().insert(key);
        Ok(())
    }

    async fn make_cgroup(&self, of: &Accepted) -> Result<()> {
        self.operation("cgroup", of, |machine| machine.cgroup = true).await?;
        self.limits.lock().unwrap().insert(of.id().clone());
        Ok(())
    }

    async fn start_monitor(&self, of: &Accepted) -> Result<Started> {
        let pid = {
            let mut world = self.shared.world();
            world.next_pid += 1;
            world.next_pid
        };
        let monitor = MonitorId { pid, start_ticks: u64::try_from(pid).unwrap() };
        let of_monitor = monitor.clone();
        let at_ns = self.shared.now();
        let console_from = self
            .operation("start", of, move |machine| {
                assert!(!machine.monitor_alive, "two monitors of one instance");
                assert!(machine.disk && machine.cgroup && machine.network.is_some(), "started too early");
                machine.monitor = Some(of_monitor);
                machine.monitor_alive = !machine.breaks_at_start && !machine.is_killed_at_start;
                machine.ran_ns = None;
                machine.resets_ns.clear();
                machine.word = machine.breaks_at_start.then(|| LastWord {
                    at_ns,
                    reason: ExitReason::Error,
                    message: "kernel image: broken".into(),
                });
                u64::try_from(machine.console.len()).unwrap()
            })
            .await?;
        Ok(Started { monitor, console_from, timing: vec![] })
    }

    async fn let_run(&self, of: &Accepted, _: &MonitorId) -> Result<u64> {
        self.answer(of).await;
        let now = self.shared.now();
        self.operation("let run", of, |machine| {
            if machine.ran_ns.is_none() {
                machine.runs += 1;
            }
            *machine.ran_ns.get_or_insert(now)
        })
        .await
    }

    async fn press_power(&self, of: &Accepted) -> Result<()> {
        self.answer(of).await;
        let at_ns = self.shared.now();
        self.operation("power", of, |machine| {
            machine.power_presses += 1;
            if machine.power_presses > machine.deaf_to && machine.monitor_alive {
                machine.monitor_alive = false;
                machine.word =
                    Some(LastWord { at_ns, reason: ExitReason::PowerOff, message: "powered off".into() });
            }
        })
        .await
    }

    async fn kill(&self, of: &Accepted) -> Result<()> {
        self.operation("kill", of, |machine| machine.monitor_alive = false).await
    }

    async fn ended(&self, of: &Accepted, monitor: &MonitorId) {
        loop {
            let bell = self.shared.bell.notified();
            let alive = {
                let world = self.shared.world();
                world
                    .machines
                    .get(of.id())
                    .is_some_and(|m| m.monitor.as_ref() == Some(monitor) && m.monitor_alive)
            };
            if !alive {
                return;
            }
            bell.await;
        }
    }

    async fn tear_down(&self, of: &Accepted) -> Result<()> {
        self.operation("tear down", of, |machine| {
            assert!(!machine.monitor_alive, "torn down under a living monitor");
            machine.network = None;
            machine.cgroup = false;
        })
        .await?;
        self.services.lock().unwrap().retain(|(id, _)| id != of.id());
        self.limits.lock().unwrap().remove(of.id());
        Ok(())
    }

    async fn remove_disk(&self, of: &Accepted) -> Result<()> {
        self.operation("remove disk", of, |machine| machine.disk = false).await
    }

    fn cpu_usage_us(&self, _: &Accepted) -> Option<u64> {
        Some(42)
    }

    fn console(&self, of: &Accepted, offset: u64) -> Option<(Vec<u8>, u64)> {
        let world = self.shared.world();
        let console = &world.machines.get(of.id())?.console;
        let from = usize::try_from(offset).unwrap().min(console.len());
        Some((console[from..].to_vec(), u64::try_from(console.len()).unwrap()))
    }
}

/// A world, a state folder, and the agent that works there now.
pub struct Bench {
    pub shared: Arc<Shared>,
    pub agent: Option<Arc<Agent<FakeHost>>>,
    pub desired: Desired,
    pub folders: Folders,
    pace: Pace,
    _folder: tempfile::TempDir,
}

impl Bench {
    pub fn new() -> Self {
        Self::with_pace(Self::pace())
    }

    pub fn with_pace(pace: Pace) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let folders = Folders {
            state: folder.path().join("state"),
            run: folder.path().join("run"),
            netns: folder.path().join("netns"),
        };
        let mut bench = Self {
            shared: Shared::new(),
            agent: None,
            desired: Desired { version: 0, instances: vec![], end: vec![] },
            folders,
            pace,
            _folder: folder,
        };
        bench.start_agent();
        bench
    }

    pub fn pace() -> Pace {
        Pace {
            stop_grace: Duration::from_millis(400),
            press_again: Duration::from_millis(40),
            answer: Duration::from_secs(5),
            tick: Duration::from_millis(5),
            // Times follow the world's clock, which each reading advances by a microsecond.
            host_key: Duration::from_millis(150),
            restart: Duration::from_micros(200),
            retry_first: Duration::from_millis(2),
            retry_max: Duration::from_millis(20),
            last_seen: Duration::from_secs(5),
        }
    }

    pub fn start_agent(&mut self) {
        let host = FakeHost::new(&self.shared);
        let lock = StateLock::take(&self.folders).unwrap();
        let agent = Agent::open(lock, host, &self.folders, self.pace.clone()).unwrap();
        agent.apply(&self.desired).unwrap();
        self.agent = Some(agent);
    }

    /// The agent is gone from one instruction to the next; the world stays.
    pub async fn crash_agent(&mut self) {
        let agent = self.agent.take().unwrap();
        let weak = Arc::downgrade(&agent);
        drop(agent);
        // Aborted tasks go at their next turn.
        let deadline = Instant::now() + Duration::from_secs(5);
        while weak.strong_count() > 0 {
            assert!(Instant::now() < deadline, "the agent does not end");
            tokio::task::yield_now().await;
        }
        tokio::task::yield_now().await;
    }

    pub async fn restart_agent(&mut self) {
        self.crash_agent().await;
        self.start_agent();
    }

    pub fn want(&mut self, ensure: Ensure) {
        self.desired.version += 1;
        self.desired.instances.retain(|known| known.instance_id != ensure.instance_id);
        self.desired.instances.push(ensure);
        if let Some(agent) = &self.agent {
            agent.apply(&self.desired).unwrap();
        }
    }

    pub fn observation(&self, id: &InstanceId) -> Option<Observation> {
        let report = self.agent.as_ref().unwrap().report();
        report.instances.into_iter().find(|seen| &seen.instance_id == id)
    }

    /// Waits until an observation fits; an agent that died on the way is started again.
    pub async fn until(
        &mut self,
        id: &InstanceId,
        what: &str,
        fits: impl Fn(&Observation) -> bool,
    ) -> Observation {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let crash = {
                let mut world = self.shared.world();
                std::mem::take(&mut world.crashed)
            };
            if crash {
                self.restart_agent().await;
            }
            let seen = self.observation(id);
            if let Some(seen) = seen.as_ref().filter(|seen| fits(seen)) {
                return seen.clone();
            }
            assert!(
                Instant::now() < deadline,
                "waited for {what}; last seen {seen:#?}; operations {:?}",
                self.shared.world().log
            );
            let mut changes = self.agent.as_ref().unwrap().changes();
            let crash = self.shared.crash.notified();
            tokio::select! {
                _ = changes.changed() => {}
                () = crash => {}
                () = tokio::time::sleep(Duration::from_millis(5)) => {}
            }
        }
    }
}
