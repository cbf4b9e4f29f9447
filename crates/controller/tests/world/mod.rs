//! A whole control plane in one process: a database file, an engine that can be killed, simulated hosts, and a clock
//! that only moves when told to.
#![allow(dead_code, reason = "each test file uses its part of the world")]

use roost_billing::PriceBook;
use roost_controller::engine::{Caller, Clock, Engine, EngineSettings, Machine, Random, SystemClock};
use roost_store::{
    AccessKeyRow, BlobRow, ImageRow, InstanceFilter, InstanceRecord, KeyPairRow, NewAccountRows, SqliteStore,
    Store, UsageFilter,
};
use roost_testbed::sim::{Controller, SimHost, unreachable};
use roost_types::agent::{Desired, HelloRequest, HelloResponse, Report, ReportAck};
use roost_types::api::{
    Account, DescribeInstances, Image, Instance, KeyPair, RebootInstances, RunInstances, StartInstances,
    StateChanges, StopInstances, TerminateInstances,
};
use roost_types::instance_type::Catalogue;
use roost_types::metering::{Meter, UsageEvent, UsageKind};
use roost_types::state::InstanceState;
use roost_types::{
    AccountId, ApiError, BlobId, HostId, ImageId, InstanceId, KeyPairId, Micros, SubnetId, VpcId,
};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

/// Clocks of the controller's machine, moved by hand. The simulated hosts follow the true time.
#[derive(Debug)]
pub struct TestClock {
    truth: AtomicI64,
    /// Error of the wall clock.
    wrong: AtomicI64,
}

impl TestClock {
    pub fn advance(&self, by: Micros) {
        self.truth.fetch_add(by.0, Ordering::SeqCst);
    }

    /// The true time.
    pub fn now(&self) -> Micros {
        Micros(self.truth.load(Ordering::SeqCst))
    }

    /// Steps the wall clock of the controller's machine only, forward or back.
    pub fn step(&self, by: Micros) {
        self.wrong.fetch_add(by.0, Ordering::SeqCst);
    }
}

impl Machine for TestClock {
    fn wall(&self) -> Micros {
        self.now() + Micros(self.wrong.load(Ordering::SeqCst))
    }
    fn boottime(&self) -> Micros {
        self.now() - START
    }
}

/// Time at which every world begins.
const START: Micros = Micros::from_secs(1_700_000_000);

/// Bytes that never repeat, the same in every run.
#[derive(Debug, Default)]
pub struct TestRandom(AtomicU64);

impl Random for TestRandom {
    fn fill(&self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            let mut mixed = self.0.fetch_add(1, Ordering::SeqCst).wrapping_add(0x9e37_79b9_7f4a_7c15);
            mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            let mixed = (mixed ^ (mixed >> 31)).to_le_bytes();
            chunk.copy_from_slice(&mixed[..chunk.len()]);
        }
    }
}

/// The controller as the agents see it: perhaps not there, perhaps losing its next answer.
struct Wire<'a> {
    engine: Option<&'a Engine>,
    lose_answer: bool,
}

impl Wire<'_> {
    fn answer<T>(&self, answer: Result<T, ApiError>) -> Result<T, ApiError> {
        if self.lose_answer { Err(unreachable()) } else { answer }
    }
}

impl Controller for Wire<'_> {
    fn hello(&self, host: &HostId, request: HelloRequest) -> Result<HelloResponse, ApiError> {
        self.engine.ok_or_else(unreachable)?.hello(host, request)
    }
    fn desired(&self, host: &HostId) -> Result<Desired, ApiError> {
        self.engine.ok_or_else(unreachable)?.desired(host)
    }
    fn report(&self, host: &HostId, report: Report) -> Result<ReportAck, ApiError> {
        self.answer(self.engine.ok_or_else(unreachable)?.report(host, report))
    }
}

/// The world.
pub struct World {
    folder: tempfile::TempDir,
    pub clock: Arc<TestClock>,
    random: Arc<TestRandom>,
    pub settings: EngineSettings,
    store: Option<Arc<SqliteStore>>,
    engine: Option<Arc<Engine>>,
    pub hosts: Vec<SimHost>,
    /// The next report is taken, but its answer is lost.
    pub lose_answer: bool,
    /// The highest `(generation → spec)` seen per instance: one generation must have one spec.
    specs: BTreeMap<(InstanceId, u64), String>,
}

/// How far time goes in one step of the world.
pub const TICK: Micros = Micros::SECOND;

fn scratch() -> tempfile::TempDir {
    // In memory where there is such a place: commits are synced to the disk, and here they are many.
    let memory = Path::new("/dev/shm");
    if memory.is_dir()
        && let Ok(folder) = tempfile::tempdir_in(memory)
    {
        return folder;
    }
    tempfile::tempdir().unwrap()
}

impl World {
    /// One host of 8 CPUs and 16 GiB, an image `tiny` and accounts `alice` and `bob`.
    pub fn new() -> Self {
        Self::with(EngineSettings::default(), &[(8, 16 * 1024)])
    }

    pub fn with(settings: EngineSettings, hosts: &[(u32, u64)]) -> Self {
        let start = START;
        let clock = Arc::new(TestClock { truth: AtomicI64::new(start.0), wrong: AtomicI64::new(0) });
        let hosts = hosts
            .iter()
            .zip(1_u8..)
            .map(|((cpus, memory), number)| SimHost::new(number, *cpus, *memory, start))
            .collect();
        let mut world = Self {
            folder: scratch(),
            clock,
            random: Arc::default(),
            settings,
            store: None,
            engine: None,
            hosts,
            lose_answer: false,
            specs: BTreeMap::new(),
        };
        world.start_controller();
        world.furnish();
        world.tick();
        world
    }

    pub fn now(&self) -> Micros {
        self.clock.now()
    }

    pub fn database(&self) -> PathBuf {
        self.folder.path().join("roost.db")
    }

    /// Changes the database without the controller's knowledge.
    pub fn tamper(&self, statement: &str) {
        rusqlite::Connection::open(self.database()).unwrap().execute(statement, []).unwrap();
    }

    /// Replaces the database by a backup and starts the controller again.
    pub fn restore(&mut self, backup: &Path) {
        self.kill_controller();
        for end in ["", "-wal", "-shm"] {
            let _ = std::fs::remove_file(format!("{}{end}", self.database().display()));
        }
        std::fs::copy(backup, self.database()).unwrap();
        self.start_controller();
        // Starts after the backup are forgotten.
        self.specs.clear();
    }

    pub fn start_controller(&mut self) {
        if self.engine.is_some() {
            return;
        }
        let store = Arc::new(SqliteStore::open(&self.database()).unwrap());
        let shared: Arc<dyn Store> = store.clone();
        let high = store.clock_high().unwrap();
        let clock: Arc<dyn Clock> = Arc::new(SystemClock::over(Arc::clone(&self.clock), high));
        self.engine = Some(Engine::new(
            shared,
            Arc::new(Catalogue::builtin()),
            Arc::new(PriceBook::builtin()),
            clock,
            self.random.clone(),
            self.settings.clone(),
        ));
        self.store = Some(store);
    }

    pub fn kill_controller(&mut self) {
        self.engine = None;
        self.store = None;
    }

    pub fn engine(&self) -> &Engine {
        self.engine.as_ref().expect("the controller runs")
    }

    pub fn shared_engine(&self) -> Arc<Engine> {
        self.engine.clone().expect("the controller runs")
    }

    pub fn controller_runs(&self) -> bool {
        self.engine.is_some()
    }

    pub fn store(&self) -> &SqliteStore {
        self.store.as_ref().expect("the controller runs")
    }

    fn furnish(&self) {
        let store = self.store();
        for name in ["alice", "bob", "root"] {
            let account_id = caller(name).account_id;
            let at = self.clock.now();
            store
                .create_account(&NewAccountRows {
                    account: Account {
                        account_id: account_id.clone(),
                        name: name.into(),
                        admin: name == "root",
                        created_at: at,
                    },
                    key: AccessKeyRow {
                        access_key_id: format!("AKIA{name}"),
                        account_id: account_id.clone(),
                        sealed_secret: vec![1],
                        created_at: at,
                        active: true,
                    },
                    vpc_id: VpcId::from_random(self.bytes()),
                    subnets: vec![("home-1a".into(), SubnetId::from_random(self.bytes()))],
                    region: "home-1".into(),
                })
                .unwrap();
            store
                .create_key_pair(&KeyPairRow {
                    account_id,
                    key_pair: KeyPair {
                        key_pair_id: KeyPairId::from_random(self.bytes()),
                        key_name: format!("{name}-key"),
                        fingerprint: "SHA256:x".into(),
                        public_key: format!("ssh-ed25519 AAAA {name}"),
                        created_at: at,
                    },
                })
                .unwrap();
        }
        let owner = caller("root").account_id;
        let blob = BlobId::from_sha256([7; 32]);
        let created_at = self.clock.now();
        store
            .put_blob(&BlobRow { blob_id: blob.clone(), bytes: 1, account_id: owner.clone(), created_at })
            .unwrap();
        store
            .register_image(&ImageRow {
                image: Image {
                    image_id: ImageId::from_random(self.bytes()),
                    owner,
                    name: "tiny".into(),
                    description: String::new(),
                    public: true,
                    min_volume_gib: 1,
                    boot_args: "console=ttyS0".into(),
                    default_user: "root".into(),
                    ssh: None,
                    created_at,
                },
                kernel: blob.clone(),
                initrd: None,
                root: blob,
                root_bytes: 1,
                deregistered_at: None,
            })
            .unwrap();
    }

    fn bytes(&self) -> [u8; 9] {
        let mut bytes = [0; 9];
        self.random.fill(&mut bytes);
        bytes
    }

    /// One second: time passes, agents do a round, the worker sweeps.
    pub fn tick(&mut self) {
        self.clock.advance(TICK);
        let now = self.clock.now();
        let wire =
            Wire { engine: self.engine.as_deref(), lose_answer: std::mem::take(&mut self.lose_answer) };
        for host in &mut self.hosts {
            host.pass_time(now);
            // A round fails while the controller is away; the agent just comes back.
            let _ = host.round(&wire);
        }
        if let Some(engine) = &self.engine {
            engine.sweep().unwrap();
            self.watch_specs();
        }
    }

    /// A host goes down in order, and so does the controller that runs on it: its agent has the last word.
    pub fn shut_down(&mut self, host: usize) {
        let wire = Wire { engine: self.engine.as_deref(), lose_answer: false };
        let _ = self.hosts[host].stop_agent(&wire);
        self.kill_controller();
        self.hosts[host].reboot();
    }

    /// One generation has one spec, always.
    fn watch_specs(&mut self) {
        let engine = self.engine.clone().expect("just used");
        for host in &self.hosts {
            for ensure in engine.desired(host.id()).unwrap().instances {
                let spec = serde_json::to_string(&ensure.spec).unwrap();
                let known =
                    self.specs.entry((ensure.instance_id.clone(), ensure.generation)).or_insert(spec.clone());
                assert_eq!(*known, spec, "{} generation {}", ensure.instance_id, ensure.generation);
            }
        }
    }

    /// Ticks until `done` says so.
    pub fn until(&mut self, what: &str, mut done: impl FnMut(&World) -> bool) {
        for _ in 0..120 {
            if self.controller_runs() && done(self) {
                return;
            }
            self.tick();
        }
        panic!("not within 120 s: {what}; {:#?}", self.records());
    }

    pub fn wait(&mut self, id: &InstanceId, state: InstanceState) -> Instance {
        let of = id.clone();
        self.until(&format!("{id} {state}"), |world| world.state(&of) == state);
        self.show(id)
    }

    pub fn launch(&self, name: &str, count: u32, more: impl FnOnce(&mut RunInstances)) -> Vec<InstanceId> {
        let mut request = request(count);
        more(&mut request);
        let reservation = self.engine().run_instances(&caller(name), request).unwrap();
        reservation.instances.into_iter().map(|instance| instance.instance_id).collect()
    }

    pub fn one(&self) -> InstanceId {
        self.launch("alice", 1, |_| {}).remove(0)
    }

    pub fn stop(&self, id: &InstanceId) -> Result<StateChanges, ApiError> {
        let instance_ids = vec![id.to_string()];
        self.engine().stop_instances(&caller("alice"), StopInstances { instance_ids, force: false })
    }

    pub fn start(&self, id: &InstanceId) -> Result<StateChanges, ApiError> {
        self.start_all(std::slice::from_ref(id))
    }

    pub fn start_all(&self, ids: &[InstanceId]) -> Result<StateChanges, ApiError> {
        let instance_ids = ids.iter().map(ToString::to_string).collect();
        self.engine().start_instances(&caller("alice"), StartInstances { instance_ids })
    }

    pub fn reboot(&self, id: &InstanceId) -> Result<(), ApiError> {
        let instance_ids = vec![id.to_string()];
        self.engine().reboot_instances(&caller("alice"), RebootInstances { instance_ids }).map(|_| ())
    }

    pub fn terminate(&self, id: &InstanceId) -> Result<StateChanges, ApiError> {
        let instance_ids = vec![id.to_string()];
        self.engine().terminate_instances(&caller("alice"), TerminateInstances { instance_ids })
    }

    pub fn describe(&self, name: &str, ids: &[&InstanceId]) -> Result<Vec<Instance>, ApiError> {
        let request = DescribeInstances {
            instance_ids: ids.iter().map(ToString::to_string).collect(),
            include_terminated: true,
            all_accounts: false,
        };
        Ok(self.engine().describe_instances(&caller(name), request)?.instances)
    }

    pub fn show(&self, id: &InstanceId) -> Instance {
        self.describe("alice", &[id]).unwrap().remove(0)
    }

    pub fn state(&self, id: &InstanceId) -> InstanceState {
        self.record(id).row.state()
    }

    pub fn record(&self, id: &InstanceId) -> InstanceRecord {
        self.store().instance(id).unwrap().unwrap()
    }

    pub fn records(&self) -> Vec<InstanceRecord> {
        let filter = InstanceFilter { gone_since: Some(Micros(i64::MIN)), ..Default::default() };
        self.store().instances(&filter).unwrap()
    }

    pub fn usage(&self, resource: &str) -> Vec<UsageEvent> {
        let filter = UsageFilter { resource: Some(resource.to_owned()), ..Default::default() };
        self.store().usage_events(&filter).unwrap()
    }

    /// Used time of each start of an instance, over all its parts; every part has ended.
    pub fn starts(&self, id: &InstanceId) -> Vec<Micros> {
        let usage = self.usage(id.as_str());
        let continues = |at: Micros| usage.iter().any(|event| event.continues && event.at == at);
        let mut starts: Vec<Micros> = Vec::new();
        for (_, open, close) in self.intervals(id) {
            let length = close.unwrap() - open;
            match starts.last_mut().filter(|_| continues(open)) {
                Some(start) => *start = *start + length,
                None => starts.push(length),
            }
        }
        starts
    }

    /// Every interval of an instance: incarnation, beginning, end.
    pub fn intervals(&self, id: &InstanceId) -> Vec<(u64, Micros, Option<Micros>)> {
        let mut intervals: BTreeMap<(u64, u64), (Micros, Option<Micros>)> = BTreeMap::new();
        for event in self.usage(id.as_str()).into_iter().filter(|e| e.meter == Meter::InstanceSeconds) {
            let part = (event.incarnation, event.sequence / 2);
            match event.kind {
                UsageKind::Open => {
                    assert!(intervals.insert(part, (event.at, None)).is_none(), "opened twice");
                }
                UsageKind::Close => {
                    let open = intervals.get_mut(&part).expect("closed before opened");
                    assert!(open.1.replace(event.at).is_none(), "closed twice");
                    assert!(event.at >= open.0, "ends before it begins");
                }
            }
        }
        intervals.into_iter().map(|((incarnation, _), (open, close))| (incarnation, open, close)).collect()
    }

    /// What must hold at every moment.
    pub fn check(&self) {
        let store = self.store();
        store.check().unwrap();
        for host in store.hosts().unwrap() {
            assert!(host.claimed_cpu_milli <= host.facts.cpu_milli, "over-claimed: {host:?}");
            assert!(host.claimed_memory_mib <= host.facts.memory_mib, "over-claimed: {host:?}");
            assert!(host.claimed_disk_gib <= host.facts.disk_gib, "over-claimed: {host:?}");
        }
        let records = self.records();
        for host in store.hosts().unwrap() {
            let expected: u64 = records
                .iter()
                .filter(|record| record.row.host_id.as_ref() == Some(&host.facts.host_id))
                .filter(|record| record.row.state().holds_capacity())
                // Terminating what was stopped takes nothing.
                .filter(|record| {
                    record.row.state() != InstanceState::ShuttingDown || store_claims(store, record)
                })
                .map(|record| record.row.instance_type.memory_mib + host.facts.overhead_mib)
                .sum();
            assert_eq!(host.claimed_memory_mib, expected, "claims are those of the instances that hold some");
        }
        let mut private = BTreeMap::new();
        let mut public = BTreeMap::new();
        for record in records.iter().filter(|record| record.interface.released_at.is_none()) {
            let address = (record.interface.subnet_id.clone(), record.interface.private_ip);
            assert!(private.insert(address, ()).is_none(), "private address given twice");
            assert!(public.insert(record.interface.public_ip, ()).is_none(), "public address given twice");
        }
    }

    /// What must hold when everything is over.
    pub fn check_nothing_left(&self) {
        self.check();
        for host in self.store().hosts().unwrap() {
            assert_eq!((host.claimed_cpu_milli, host.claimed_memory_mib, host.claims), (0, 0, 0));
            assert_eq!(host.claimed_disk_gib, 0);
        }
        for record in self.records() {
            assert_eq!(record.row.state(), InstanceState::Terminated, "{record:#?}");
            assert!(record.interface.released_at.is_some(), "addresses kept: {record:#?}");
            for (incarnation, _, end) in self.intervals(&record.row.instance_id) {
                assert!(end.is_some(), "interval {incarnation} is still open: {record:#?}");
            }
            let volume = self.usage(record.volume.volume_id.as_str());
            assert!(matches!(volume.len(), 0 | 2), "the volume's interval is whole: {volume:?}");
        }
        for host in &self.hosts {
            assert_eq!(host.running(), vec![], "a guest goes on without its instance");
            assert_eq!(host.leftovers(), vec![], "something is left on the host");
        }
    }
}

fn store_claims(store: &SqliteStore, record: &InstanceRecord) -> bool {
    store.claim(&record.row.instance_id).unwrap().is_some()
}

/// A caller of this name; `root` administrates.
pub fn caller(name: &str) -> Caller {
    let mut random = [0; 8];
    random[..name.len()].copy_from_slice(name.as_bytes());
    Caller {
        account_id: AccountId::from_random(random),
        account_name: name.to_owned(),
        admin: name == "root",
    }
}

/// A launch of so many `home1.small`.
pub fn request(count: u32) -> RunInstances {
    RunInstances {
        image: "tiny".into(),
        instance_type: "home1.small".into(),
        min_count: count,
        max_count: count,
        key_name: None,
        user_data: None,
        volume_gib: None,
        tags: BTreeMap::new(),
        metadata_options: None,
        client_token: None,
        dry_run: false,
    }
}
