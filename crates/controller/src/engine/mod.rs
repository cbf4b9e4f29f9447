//! The engine: instances from acceptance to the last line of their bill.
//!
//! ```text
//! api actions ──→ launch, actions: validate, place, one transaction ─┐
//! agents ──→ agents: date a report, record it, step ─────────────────┼──→ Store
//! worker ──→ sweep: lease a due row, step, one transaction ──────────┘
//! agents ←── agents: desired, what the rows say, spec by spec
//! ```
//! Every method blocks on the store and is meant for a thread that may block; only [`Engine::work`] is async. What
//! is decided is decided by [`crate::lifecycle`]; here is only reading, committing and trying again where a row
//! changed meanwhile.

mod actions;
mod agents;
mod aside;
mod clock;
mod describe;
mod errors;
mod launch;
mod memory;
mod orphans;
mod plausible;
mod seal;
mod settings;
mod worker;

pub use clock::{Clock, Machine, Random, SystemClock, SystemRandom, ThisMachine};
pub use settings::EngineSettings;

use crate::lifecycle::{Limits, View};
use memory::Memory;
use roost_billing::PriceBook;
use roost_placement::Host;
use roost_store::{HostRow, InstanceRow, Store, StoreError};
use roost_types::instance_type::Catalogue;
use roost_types::metering::Proofs;
use roost_types::{AccountId, ApiError, HostId, Micros};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{Notify, watch};

/// Who calls, as authenticated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// The account.
    pub account_id: AccountId,
    /// Its name.
    pub account_name: String,
    /// Whether it may administrate.
    pub admin: bool,
}

/// How often a change is tried again when its row changed meanwhile. Each time somebody else got further.
const ATTEMPTS: usize = 20;

type Answer<T> = Result<T, ApiError>;

/// The engine. One per controller; share it by `Arc`.
pub struct Engine {
    store: Arc<dyn Store>,
    catalogue: Arc<Catalogue>,
    prices: Arc<PriceBook>,
    clock: Arc<dyn Clock>,
    random: Arc<dyn Random>,
    settings: EngineSettings,
    /// One run of the engine: who holds a lease.
    name: String,
    /// When this run of the engine began, on its clock and on the monotonic clock.
    began: (Micros, Micros),
    memory: Mutex<Memory>,
    changed: watch::Sender<u64>,
    due: Notify,
}

impl Engine {
    /// An engine over this store. It goes on where the last one stopped.
    pub fn new(
        store: Arc<dyn Store>,
        catalogue: Arc<Catalogue>,
        prices: Arc<PriceBook>,
        clock: Arc<dyn Clock>,
        random: Arc<dyn Random>,
        settings: EngineSettings,
    ) -> Arc<Self> {
        let mut name = [0; 8];
        random.fill(&mut name);
        let began = (clock.now(), clock.monotonic());
        Arc::new(Self {
            began,
            store,
            catalogue,
            prices,
            clock,
            random,
            settings,
            name: format!("{:016x}", u64::from_le_bytes(name)),
            memory: Mutex::new(Memory::default()),
            changed: watch::Sender::new(0),
            due: Notify::new(),
        })
    }

    /// Bumped on every change: wake up and look again.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Until when every instance was seen running: at least as fresh as the store's own. For a bill of what runs.
    ///
    /// # Errors
    /// If the store fails.
    pub fn proofs(&self) -> Answer<Proofs> {
        self.with_proofs(Proofs::clone).map_err(errors::of_store)
    }

    fn with_proofs<T>(&self, read: impl FnOnce(&Proofs) -> T) -> Result<T, StoreError> {
        let mut memory = self.remember();
        if memory.proofs.is_none() {
            memory.proofs = Some(self.store.proofs()?);
        }
        Ok(read(memory.proofs.get_or_insert_default()))
    }

    fn remember(&self) -> MutexGuard<'_, Memory> {
        // What is remembered can be lost at any time, so also by a panic half way.
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says that something changed: to long polls, and to the worker.
    fn announce(&self) {
        self.changed.send_modify(|count| *count = count.wrapping_add(1));
        self.due.notify_one();
    }

    fn limits(&self) -> Limits {
        Limits {
            place: self.settings.place_deadline,
            launch: self.settings.launch_deadline,
            stop: self.settings.stop_deadline,
        }
    }

    /// Time since a host's newest report, on the monotonic clock. If the host has not reported to
    /// this run of the engine, the wall clock gives the time before the run.
    fn silence(&self, host: &HostRow) -> Micros {
        let now = self.clock.monotonic();
        let (began, began_monotonic) = self.began;
        match self.remember().last_report(&host.facts.host_id) {
            Some(seen) => now - seen,
            None => now - began_monotonic + Micros((began - host.last_report_at).0.max(0)),
        }
    }

    fn is_alive(&self, host: &HostRow) -> bool {
        self.silence(host) <= self.settings.alive_within
    }

    fn is_host_alive(&self, host: Option<&HostId>) -> Result<bool, StoreError> {
        let Some(host) = host else { return Ok(false) };
        Ok(self.store.host(host)?.is_some_and(|host| self.is_alive(&host)))
    }

    /// Every host as placement sees it.
    fn placeable(&self) -> Answer<Vec<Host>> {
        let hosts = self.store.hosts().map_err(errors::of_store)?;
        Ok(hosts
            .into_iter()
            .map(|host| {
                // Orphans occupy their capacity, whether or not the database knows them.
                let (cpu_milli, memory_mib) = self.taken_by_orphans(&host.facts);
                Host {
                    alive: self.is_alive(&host),
                    facts: host.facts,
                    claimed_cpu_milli: host.claimed_cpu_milli + cpu_milli,
                    claimed_memory_mib: host.claimed_memory_mib + memory_mib,
                    claimed_disk_gib: host.claimed_disk_gib,
                }
            })
            .collect())
    }

    /// What a step needs to know beside the row.
    fn view(&self, row: &InstanceRow, host_alive: bool, now: Micros) -> Result<View, StoreError> {
        let sealed = self.sealed()?;
        let proof = self.with_proofs(|proofs| proofs.get(row.instance_id.as_str()).copied())?;
        let recent = Micros(self.settings.report_every.0.saturating_mul(3));
        let proved_at = self.remember().proved_at.get(&row.instance_id).copied();
        let run_now = match (row.open_since, proof, proved_at) {
            (Some(_), Some(proof), Some(at)) => proof + (self.clock.monotonic() - at),
            _ => now.max(proof.unwrap_or(now)),
        };
        Ok(View {
            now,
            run_now,
            sealed,
            began: self.began.0,
            host_alive,
            proof,
            recent,
            limits: self.limits(),
        })
    }

    fn random_bytes<const N: usize>(&self) -> [u8; N] {
        let mut bytes = [0; N];
        self.random.fill(&mut bytes);
        bytes
    }
}
