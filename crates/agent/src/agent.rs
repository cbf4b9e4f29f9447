//! The agent's core: which instances there are, what is wanted of them, and the report of what they are.

use crate::clock::age_us;
use crate::durable;
use crate::error::{Error, Result};
use crate::host::Host;
use crate::names::Folders;
use crate::record::{self, Accepted, Loaded, Records, Run, Verdict};
use crate::task::{self, Live, Pace, Shared, Task};
use roost_types::agent::{Desired, Ensure, ORPHANS, Observation, Observed, Orphan, Report};
use roost_types::ids::InstanceId;
use roost_types::state::DesiredState;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, TryLockError};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::runtime::Handle;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;

struct Entry {
    shared: Shared,
    task: JoinHandle<()>,
}

/// One agent at work.
pub struct Agent<H: Host> {
    host: Arc<H>,
    records: Records,
    pace: Pace,
    run_id: String,
    entries: Mutex<BTreeMap<InstanceId, Entry>>,
    /// What could not be taken in, such as on a full disk: its incarnation, and why.
    unwritten: Mutex<BTreeMap<InstanceId, (u64, String)>>,
    /// Instances that the newest `Desired` names; `None` before the first `Desired`.
    named: Mutex<Option<BTreeSet<InstanceId>>>,
    /// Quarantined instances, each with the reason. No task reconciles them.
    quarantined: BTreeMap<InstanceId, String>,
    changed: Arc<watch::Sender<u64>>,
    runtime: Handle,
    // Held for as long as this agent lives.
    _lock: StateLock,
}

impl<H: Host> Agent<H> {
    /// Goes on with every instance in the state folder. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn open(lock: StateLock, host: Arc<H>, folders: &Folders, pace: Pace) -> Result<Arc<Self>> {
        let records = Records::new(folders.clone());
        let Loaded { instances, quarantined } = records.load_all()?;
        host.troubles().set("records", quarantine_trouble(&quarantined, &folders.quarantine()));
        let agent = Arc::new(Self {
            host,
            records,
            pace,
            run_id: random_hex(),
            entries: Mutex::new(BTreeMap::new()),
            unwritten: Mutex::default(),
            named: Mutex::default(),
            quarantined,
            changed: Arc::new(watch::channel(0).0),
            runtime: Handle::current(),
            _lock: lock,
        });
        let known = instances.iter().map(|(accepted, _)| accepted.slot);
        let mut slots: BTreeSet<u32> = known.chain(agent.host.slots_in_use()).collect();
        let mut seen = BTreeSet::new();
        for (mut accepted, mut run) in instances {
            if !seen.insert(accepted.slot) {
                // The slot of an instance that came back from quarantine was given away meanwhile.
                accepted.slot = record::free_slot(slots.iter().copied());
                slots.insert(accepted.slot);
                agent.records.save_spec(&accepted)?;
            }
            let boot = agent.host.boot_id();
            if run.boot_id != boot && run.began_ns.is_none() && run.monitor.is_none() {
                run.boot_id = boot;
            }
            tracing::info!(instance = %accepted.id(), desired = %accepted.spec().desired, "known from before");
            let entry = agent.spawn(accepted.clone(), run);
            agent.entries().insert(accepted.id().clone(), entry);
        }
        Ok(agent)
    }

    fn entries(&self) -> MutexGuard<'_, BTreeMap<InstanceId, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn spawn(&self, accepted: Accepted, run: Run) -> Entry {
        let state = first_state(&accepted, &run);
        let live = Live {
            state,
            reason: task::reason(accepted.spec(), &run, state),
            accepted,
            refused: None,
            run,
            since_ns: self.host.now_ns(),
            trouble: None,
        };
        let shared = Shared {
            live: Arc::new(Mutex::new(live)),
            wake: Arc::new(Notify::new()),
            changed: Arc::clone(&self.changed),
        };
        let task = Task::new(Arc::clone(&self.host), self.records.clone(), shared.clone(), self.pace.clone());
        Entry { shared, task: self.runtime.spawn(task.run()) }
    }

    /// Takes in what the host must look like. Blocks on the disk.
    ///
    /// # Errors
    /// Something could not be made durable; it is to be taken in again.
    pub fn apply(&self, desired: &Desired) -> Result<()> {
        // One that cannot be written down holds up no other.
        let mut failed = None;
        for ensure in &desired.instances {
            if let Err(error) = self.take_in(ensure) {
                failed.get_or_insert(error);
            }
        }
        let wanted: BTreeSet<InstanceId> =
            desired.instances.iter().map(|ensure| ensure.instance_id.clone()).collect();
        for id in desired.end.iter().filter(|id| !wanted.contains(id)) {
            if let Err(error) = self.end(id) {
                failed.get_or_insert(error);
            }
        }
        self.unwritten().retain(|id, _| wanted.contains(id));
        self.entries().retain(|id, entry| {
            let absent = entry.shared.live().state == Observed::Absent;
            if !wanted.contains(id) && !absent {
                tracing::warn!(instance = %id, "the controller does not name it any more; it is left as it is");
            }
            wanted.contains(id) || !absent
        });
        let orphans = self.entries().keys().any(|id| !wanted.contains(id));
        *self.named.lock().unwrap_or_else(PoisonError::into_inner) = Some(wanted);
        if orphans {
            self.changed.send_modify(|version| *version += 1);
        }
        failed.map_or(Ok(()), Err)
    }

    /// Removes an instance that the controller does not know any more.
    fn end(&self, id: &InstanceId) -> Result<()> {
        let Some(mut accepted) = self.accepted(id) else { return Ok(()) };
        if accepted.ensure.spec.desired != DesiredState::Terminated {
            accepted.ensure.generation += 1;
            accepted.ensure.spec.desired = DesiredState::Terminated;
            self.take_in(&accepted.ensure)?;
        }
        Ok(())
    }

    /// Takes in one `ensure`: refused, known, or made durable and then worked on.
    ///
    /// # Errors
    /// It could not be made durable.
    pub fn take_in(&self, ensure: &Ensure) -> Result<()> {
        let kept_out = self.quarantined.get(&ensure.instance_id);
        let taken = if kept_out.is_some() { Ok(()) } else { self.write_down(ensure) };
        let mut unwritten = self.unwritten();
        let news = match &taken {
            Ok(()) if let Some(why) = kept_out => {
                let told = (
                    ensure.spec.incarnation,
                    format!(
                        "its record on the host could not be read, so nothing is done about it there: {why}"
                    ),
                );
                unwritten.insert(ensure.instance_id.clone(), told).is_none()
            }
            Ok(()) => unwritten.remove(&ensure.instance_id).is_some(),
            Err(error) => {
                let told = (ensure.spec.incarnation, error.chain());
                unwritten.insert(ensure.instance_id.clone(), told).is_none()
            }
        };
        drop(unwritten);
        if news {
            self.changed.send_modify(|version| *version += 1);
        }
        taken
    }

    fn unwritten(&self) -> MutexGuard<'_, BTreeMap<InstanceId, (u64, String)>> {
        self.unwritten.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_down(&self, ensure: &Ensure) -> Result<()> {
        let mut entries = self.entries();
        let entry = entries.get(&ensure.instance_id);
        let current = entry.map(|entry| entry.shared.live().accepted.clone());
        match record::verdict(current.as_ref(), ensure) {
            Verdict::Same => {
                if let Some(entry) = entry {
                    entry.shared.live().refused = None;
                }
            }
            Verdict::Refuse(why) => {
                tracing::warn!(instance = %ensure.instance_id, %why, "refused");
                if let Some(entry) = entry {
                    entry.shared.live().refused = Some(why);
                    entry.shared.bump();
                }
            }
            Verdict::Accept => {
                let slot = current.map_or_else(
                    || {
                        // Slots that only processes hold count as taken too: no two guests share a
                        // user id.
                        let known = entries.values().map(|entry| entry.shared.live().accepted.slot);
                        record::free_slot(known.chain(self.host.slots_in_use()))
                    },
                    |accepted| accepted.slot,
                );
                let accepted =
                    Accepted { ensure: ensure.clone(), spec_hash: record::spec_hash(&ensure.spec), slot };
                {
                    let _points = roost_halt::around("agent.accept");
                    self.records.save_spec(&accepted)?;
                }
                match entries.get(&ensure.instance_id) {
                    Some(entry) if !entry.task.is_finished() => {
                        let mut live = entry.shared.live();
                        live.accepted = accepted;
                        live.refused = None;
                        drop(live);
                        entry.shared.wake.notify_one();
                    }
                    _ => {
                        let run = self.records.load_run(accepted.id())?;
                        let entry = self.spawn(accepted, run);
                        entries.insert(ensure.instance_id.clone(), entry);
                    }
                }
                self.changed.send_modify(|version| *version += 1);
            }
        }
        Ok(())
    }

    /// Sees a number that grows whenever a report would differ.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// The receiver is marked changed whenever the host's troubles change.
    pub fn host_troubles(&self) -> watch::Receiver<()> {
        self.host.troubles().changes()
    }

    /// Everything that this agent sees, now.
    pub fn report(&self) -> Report {
        let now = self.host.now_ns();
        let boot = self.host.boot_id();
        let lives: Vec<Live> = self.entries().values().map(|entry| entry.shared.live().clone()).collect();
        let named = self.named.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let is_orphan = |live: &&Live| {
            let known = named.as_ref().is_none_or(|named| named.contains(live.accepted.id()));
            !known && live.state != Observed::Absent
        };
        let orphans = lives.iter().filter(is_orphan).take(ORPHANS);
        let orphans = orphans.map(|live| Orphan::of(&live.accepted.ensure, live.state)).collect();
        let mut instances: Vec<_> = lives.iter().map(|live| self.observe(live, now, &boot)).collect();
        for (id, (incarnation, why)) in self.unwritten().iter() {
            match instances.iter_mut().find(|known| known.instance_id == *id) {
                Some(known) => known.trouble = Some(why.clone()),
                None => {
                    // A quarantined instance may still run.
                    let state = match self.quarantined.contains_key(id) {
                        true => Observed::Preparing,
                        false => Observed::Absent,
                    };
                    instances.push(nothing_known(id, *incarnation, state, why));
                }
            }
        }
        Report {
            host: self.host.facts(),
            boot_id: boot.clone(),
            agent_run: self.run_id.clone(),
            instances,
            trouble: self.host.troubles().sentences(),
            orphans,
            last: false,
        }
    }

    /// The newest accepted `ensure` of an instance.
    pub fn accepted(&self, id: &InstanceId) -> Option<Accepted> {
        self.entries().get(id).map(|entry| entry.shared.live().accepted.clone())
    }

    /// Whether nothing of an instance runs or is on its way: it is stopped, has failed, or is not here.
    pub fn rests(&self, id: &InstanceId) -> bool {
        let state = self.entries().get(id).map_or(Observed::Absent, |entry| entry.shared.live().state);
        matches!(state, Observed::Stopped | Observed::Failed | Observed::Absent)
    }

    /// The blobs that instances refer to.
    pub fn blobs_in_use(&self) -> BTreeSet<String> {
        let mut blobs = BTreeSet::new();
        for entry in self.entries().values() {
            let image = entry.shared.live().accepted.ensure.spec.image.clone();
            blobs.extend(
                [Some(image.kernel), image.initrd, Some(image.root)].into_iter().flatten().map(String::from),
            );
        }
        blobs
    }

    fn observe(&self, live: &Live, now: u64, boot: &str) -> Observation {
        let spec = live.accepted.spec();
        // What an earlier incarnation or another boot left says nothing about this one.
        let run = Some(&live.run).filter(|run| run.incarnation == spec.incarnation);
        let dated = run.filter(|run| run.boot_id == boot);
        let age = |at: Option<u64>| at.map(|at| age_us(now, at));
        let cpu = match live.state {
            Observed::Running | Observed::Stopping => self.host.cpu_usage_us(&live.accepted),
            _ => None,
        };
        Observation {
            instance_id: live.accepted.id().clone(),
            generation: live.accepted.ensure.generation,
            incarnation: spec.incarnation,
            state: live.state,
            reason: live.reason.clone(),
            age_us: age_us(now, live.since_ns),
            run_began_age_us: age(dated.and_then(|run| run.began_ns)),
            run_ended_age_us: age(dated.and_then(|run| run.ended.as_ref()).and_then(|ended| ended.at_ns)),
            last_seen_age_us: age(dated.and_then(|run| run.last_seen_ns)),
            refused: live.refused.clone(),
            trouble: live.trouble.clone().or_else(|| self.host.network_trouble(live.accepted.id())),
            guest_ready: run.is_some_and(|run| run.guest_ready) && live.state == Observed::Running,
            ssh_host_key: live.run.ssh_host_key.clone(),
            user_data_not_run: live.run.user_data_not_run,
            cpu_usage_us: run.and(cpu.or_else(|| run.and_then(|run| run.cpu_usage_us))),
            timing: run.map(|run| run.timing.clone()).unwrap_or_default(),
        }
    }
}

impl<H: Host> Drop for Agent<H> {
    /// Guests go on; only the watching ends.
    fn drop(&mut self) {
        for entry in self.entries().values() {
            entry.task.abort();
        }
    }
}

/// The observation of an instance that the agent did not accept. Generation 0 keeps the controller
/// from reading it as the end of a run.
fn nothing_known(id: &InstanceId, incarnation: u64, state: Observed, why: &str) -> Observation {
    let trouble = Some(why.to_owned());
    Observation { trouble, ..Observation::new(id.clone(), 0, incarnation, state) }
}

/// The sentence about quarantined records, for the host's owner.
fn quarantine_trouble(quarantined: &BTreeMap<InstanceId, String>, folder: &Path) -> Option<String> {
    let (id, why) = quarantined.first_key_value()?;
    let ids: Vec<_> = quarantined.keys().take(5).map(InstanceId::as_str).collect();
    Some(format!(
        "records of {} instances could not be read and lie in {}: {}; their guests, if they run, are left alone. \
         Mend a record and move its folder back to instances/, or remove it, and restart the agent. {id}: {why}",
        quarantined.len(),
        folder.display(),
        ids.join(", "),
    ))
}

fn first_state(accepted: &Accepted, run: &Run) -> Observed {
    match accepted.spec().desired {
        DesiredState::Running if run.is_open() && run.incarnation == accepted.spec().incarnation => {
            Observed::Running
        }
        DesiredState::Running if run.incarnation == accepted.spec().incarnation && run.ended.is_some() => {
            Observed::Stopping
        }
        DesiredState::Running => Observed::Preparing,
        _ => Observed::Stopping,
    }
}

/// One agent per state folder: held while it works there, and taken before anything else in it is touched.
#[derive(Debug)]
pub struct StateLock {
    _file: File,
}

impl StateLock {
    /// Takes the folder, which is made if it is not there.
    ///
    /// # Errors
    /// Another agent has it.
    pub fn take(folders: &Folders) -> Result<Self> {
        durable::make_folder(&folders.state)?;
        let path = folders.lock();
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(Error::file("open", &path))?;
        match file.try_lock() {
            Ok(()) => Ok(Self { _file: file }),
            Err(TryLockError::WouldBlock) => Err(Error::Locked { path: folders.state.clone(), lock: path }),
            Err(TryLockError::Error(error)) => Err(Error::file("lock", &path)(error)),
        }
    }
}

/// 16 random hex digits.
pub fn random_hex() -> String {
    let mut bytes = [0; 8];
    if getrandom::fill(&mut bytes).is_err() {
        // The kernel's pool is always ready after boot; a clock reading still tells two runs apart.
        bytes = crate::clock::boottime_ns().to_le_bytes();
    }
    hex::encode(bytes)
}
