//! A whole life on a real host: cgroup v2, jail, KVM, network, a Linux guest. It needs
//! - root, cgroup v2 and a `/dev/kvm` that boots Linux (the virtual host has them),
//! - `ROOST_TEST_TINY`: folder of the guest image `tiny` (kernel, initrd, root.ext4, manifest.json),
//! - `ROOST_TEST_BIN`: folder with `roost-agent` and `roost-vmm`,
//!
//! so it is left out unless asked for: `scripts/test` runs it in the virtual host.

#![allow(clippy::unwrap_used)] // a test may panic, its helpers too

use roost_agent::agent::{Agent, StateLock};
use roost_agent::cgroup::Cgroups;
use roost_agent::error::Error;
use roost_agent::facts::{self, Identity, Shares};
use roost_agent::leftovers::{self, Leftover};
use roost_agent::monitor::Monitors;
use roost_agent::names::Folders;
use roost_agent::net::service;
use roost_agent::net::surroundings::Surroundings;
use roost_agent::real::{HostSettings, RealHost};
use roost_agent::storage::{BlobSource, Bytes, Images, Opening};
use roost_agent::task::Pace;
use roost_agent::testing::ensure_of;
use roost_agent::unpack::Unpacker;
use roost_types::agent::{Desired, Ensure, IngressRule, Observation, Observed, Protocol};
use roost_types::ids::{BlobId, HostId, InstanceId};
use roost_types::state::DesiredState;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddrV4, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

struct Shelf(BTreeMap<BlobId, Vec<u8>>);

impl BlobSource for Shelf {
    fn open(&self, blob: &BlobId) -> Opening<'_> {
        let bytes =
            self.0.get(blob).cloned().ok_or_else(|| Error::NotNow(format!("no blob {}", blob.as_str())));
        Box::pin(async move { bytes.map(|bytes| Box::new(std::io::Cursor::new(bytes)) as Bytes) })
    }
}

struct Bench {
    folders: Folders,
    shelf: Arc<Shelf>,
    cgroups: Cgroups,
    bin: PathBuf,
    agent: Option<Arc<Agent<RealHost>>>,
    ensure: Ensure,
    _folder: tempfile::TempDir,
}

fn identity() -> Identity {
    Identity {
        host_id: HostId::from_random([1; 9]),
        hostname: "test".into(),
        zone: "home-1a".into(),
        controller_url: String::new(),
    }
}

impl Bench {
    fn new(tiny: &Path, bin: PathBuf, seed: u8) -> Self {
        let mut ensure = ensure_of(seed, 1);
        let mut shelf = BTreeMap::new();
        let mut pack = |name: &str| {
            let packed = zstd::encode_all(fs::File::open(tiny.join(name)).unwrap(), 1).unwrap();
            let id = BlobId::from_sha256(Sha256::digest(&packed).into());
            shelf.insert(id.clone(), packed);
            id
        };
        let manifest: serde_json::Value =
            serde_json::from_slice(&fs::read(tiny.join("manifest.json")).unwrap()).unwrap();
        let image = &mut ensure.spec.image;
        image.kernel = pack("kernel");
        image.root = pack("root.ext4");
        image.initrd = tiny.join("initrd").exists().then(|| pack("initrd"));
        image.boot_args = manifest["boot_args"].as_str().unwrap().to_owned();
        ensure.spec.cpu.max_milli = 1000;
        ensure.spec.memory_mib = 256;
        ensure.spec.metadata.hostname = "told-by-imds".into();
        use base64::Engine;
        let script = "#!/bin/sh\necho user-data-ran-$(cat /run/address)\n";
        ensure.spec.metadata.user_data = Some(base64::engine::general_purpose::STANDARD.encode(script));
        let folder = tempfile::tempdir().unwrap();
        let folders = Folders {
            state: folder.path().join("state"),
            run: folder.path().join("run"),
            netns: "/run/netns".into(),
        };
        let root = std::env::var_os("ROOST_TEST_CGROUP").map(PathBuf::from);
        let cgroups = Cgroups::open(root.as_deref(), &folders.state).unwrap();
        let shelf = Arc::new(Shelf(shelf));
        let mut bench = Self { folders, shelf, cgroups, bin, agent: None, ensure, _folder: folder };
        bench.start_agent();
        bench
    }

    fn start_agent(&mut self) {
        let lock = StateLock::take(&self.folders).unwrap();
        fs::create_dir_all(&self.folders.run).unwrap();
        let monitors = Monitors {
            folders: self.folders.clone(),
            cgroups: self.cgroups.clone(),
            program: self.bin.join("roost-vmm"),
            uid_base: 100_000,
            mtu: Surroundings::look(&[]).mtu,
        };
        let shares =
            Shares { cpu_overcommit: 1.0, disk_overcommit: 1.0, reserve_memory_mib: 256, overhead_mib: 64 };
        let settings = HostSettings {
            uplinks: vec![],
            folders: self.folders.clone(),
            facts: facts::measure(&identity(), &shares, &self.folders).unwrap(),
            dns: vec![],
            reserve_disk: 0,
        };
        let unpacker = Unpacker { program: self.bin.join("roost-agent"), user: 99_999, reserve: 0 };
        let images = Images::new(self.folders.clone(), self.shelf.clone(), unpacker).unwrap();
        let host = Arc::new(RealHost::new(settings, monitors, images).unwrap());
        let pace = Pace { stop_grace: Duration::from_secs(60), ..Pace::default() };
        self.agent = Some(Agent::open(lock, host, &self.folders, pace).unwrap());
        let desired =
            Desired { version: self.ensure.generation, instances: vec![self.ensure.clone()], end: vec![] };
        self.agent.as_ref().unwrap().apply(&desired).unwrap();
    }

    async fn restart_agent(&mut self) {
        let agent = self.agent.take().unwrap();
        let weak = Arc::downgrade(&agent);
        drop(agent);
        while weak.strong_count() > 0 {
            tokio::task::yield_now().await;
        }
        // The old agent's sockets close as its tasks are dropped; the new one takes the same ports.
        self.start_agent();
    }

    fn want(&mut self, change: impl FnOnce(&mut Ensure)) {
        self.ensure.generation += 1;
        change(&mut self.ensure);
        let desired =
            Desired { version: self.ensure.generation, instances: vec![self.ensure.clone()], end: vec![] };
        self.agent.as_ref().unwrap().apply(&desired).unwrap();
    }

    fn id(&self) -> &InstanceId {
        &self.ensure.instance_id
    }

    async fn until(&self, what: &str, seconds: u64, fits: impl Fn(&Observation) -> bool) -> Observation {
        let deadline = Instant::now() + Duration::from_secs(seconds);
        let agent = self.agent.as_ref().unwrap();
        let mut changes = agent.changes();
        loop {
            let seen = agent.report().instances.into_iter().find(|seen| &seen.instance_id == self.id());
            if let Some(seen) =
                seen.as_ref().filter(|seen| seen.generation == self.ensure.generation && fits(seen))
            {
                return seen.clone();
            }
            if Instant::now() > deadline {
                panic!(
                    "waited for {what}; last seen {seen:#?}\nconsole: {}\nlog: {}",
                    self.console(),
                    self.log()
                );
            }
            let _ = tokio::time::timeout(Duration::from_millis(100), changes.changed()).await;
        }
    }

    fn console(&self) -> String {
        let file = fs::File::open(self.folders.console(self.id()));
        let chunk =
            file.and_then(roost_vmm::console::ConsoleReader::new).and_then(|reader| reader.read_from(0));
        chunk.map(|chunk| String::from_utf8_lossy(&chunk.bytes).into_owned()).unwrap_or_default()
    }

    fn log(&self) -> String {
        fs::read_to_string(self.folders.monitor_log(self.id())).unwrap_or_default()
    }

    fn pid(&self) -> i32 {
        let pids = self.cgroups.processes(self.id());
        let what = |pid: &i32| fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        assert_eq!(pids.len(), 1, "one monitor: {:#?}", pids.iter().map(what).collect::<Vec<_>>());
        pids[0]
    }

    fn leftovers(&self) -> Vec<Leftover> {
        leftovers::of(&self.folders, &self.cgroups, self.id()).unwrap()
    }

    fn cgroup_file(&self, name: &str) -> String {
        let path = Folders::cgroup(self.cgroups.root(), &self.ensure.spec.cpu.family, self.id()).join(name);
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path:?}: {error}")).trim().to_owned()
    }
}

fn places() -> (PathBuf, PathBuf) {
    let place = |name: &str| {
        PathBuf::from(
            std::env::var_os(name).unwrap_or_else(|| panic!("{name} is not set; see the head of this file")),
        )
    };
    (place("ROOST_TEST_TINY"), place("ROOST_TEST_BIN"))
}

/// What a jailed process has: nothing.
fn assert_jailed(pid: i32, uid: u32) {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
        line.trim_start_matches(':').split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(field("Uid"), vec![uid.to_string(); 4]);
    assert_eq!(field("Gid"), vec![uid.to_string(); 4]);
    assert_eq!(field("Groups"), Vec::<String>::new());
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(field(set), ["0000000000000000"], "{set}");
    }
    assert_eq!(field("NoNewPrivs"), ["1"]);
    assert_eq!(field("Seccomp"), ["2"]);
    assert_eq!(field("NSpid").len(), 2, "a pid namespace of its own");
    assert_eq!(fs::read_dir(format!("/proc/{pid}/root")).unwrap().count(), 0, "an empty root folder");
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
    assert_eq!(mounts.lines().count(), 1, "one mount: {mounts}");
    assert!(mounts.contains(" / ro,"), "read-only: {mounts}");
    let own = |name: &str| fs::read_link(format!("/proc/self/ns/{name}")).unwrap();
    for (name, limit) in [("uid_map", "1"), ("gid_map", "1")] {
        let map = fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap();
        let id = uid.to_string();
        assert_eq!(map.split_whitespace().collect::<Vec<_>>(), [&id, &id, limit], "{name}");
    }
    for name in ["mnt", "pid", "ipc", "uts", "net", "cgroup", "user"] {
        assert_ne!(fs::read_link(format!("/proc/{pid}/ns/{name}")).unwrap(), own(name), "{name} namespace");
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs a host whose KVM boots Linux: scripts/test runs it in the virtual host"]
async fn a_life_with_a_linux_guest() {
    let (tiny, bin) = places();
    let filter = tracing_subscriber::EnvFilter::try_from_env("ROOST_LOG").unwrap_or_default();
    let _ = tracing_subscriber::fmt()
        .with_ansi(false)
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .try_init();
    let mut bench = Bench::new(&tiny, bin, 0x51);
    let rule = |protocol, port| IngressRule {
        protocol,
        from_port: port,
        to_port: port,
        source: "0.0.0.0/0".parse().unwrap(),
    };
    bench.want(|ensure| ensure.spec.interface.ingress = vec![rule(Protocol::Tcp, 80)]);

    // Launch.
    let running = bench.until("running", 120, |seen| seen.state == Observed::Running).await;
    eprintln!("timing: {:?}", running.timing);
    let pid = bench.pid();
    assert_jailed(pid, 100_000);
    assert_eq!(bench.cgroup_file("vcpu/cpu.max"), "100000 100000");
    assert_eq!(bench.cgroup_file("memory.max"), (320_u64 << 20).to_string());
    assert_eq!(bench.cgroup_file("memory.swap.max"), "0");
    let threads = bench.cgroup_file("vcpu/cgroup.threads");
    assert_eq!(threads.lines().count(), 1, "the vCPU thread and no other: {threads}");
    let name = fs::read_to_string(format!("/proc/{pid}/task/{}/comm", threads.trim())).unwrap();
    assert_eq!(name.trim(), "vcpu0");

    // The guest has its address by DHCP, its name and its user data from the metadata service.
    bench.until("ready", 120, |seen| seen.guest_ready).await;
    let console = bench.console();
    assert!(console.contains("roost-guest: ready told-by-imds "), "{console}");
    let deadline = Instant::now() + Duration::from_secs(30);
    while !bench.console().contains("user-data-ran-172.31.0.81") {
        assert!(Instant::now() < deadline, "user data did not run: {}", bench.console());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // Its public address leads to it, and so does a tunnel.
    let fetch = |mut stream: TcpStream| {
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        write!(stream, "GET / HTTP/1.0\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    };
    let public = SocketAddrV4::new(bench.ensure.spec.interface.public_ip, 80);
    let text = fetch(TcpStream::connect_timeout(&public.into(), Duration::from_secs(20)).unwrap());
    assert!(text.contains("told-by-imds"), "{text}");
    let private = SocketAddrV4::new(bench.ensure.spec.interface.private_ip, 80);
    let netns = bench.folders.netns_file(bench.id());
    let text = fetch({
        let stream = service::connect(&netns, private, Duration::from_secs(20)).unwrap();
        stream.set_nonblocking(false).unwrap();
        stream
    });
    assert!(text.contains("told-by-imds"), "{text}");

    // The agent is replaced; the guest does not notice.
    let before = bench.until("running", 10, |seen| seen.state == Observed::Running).await;
    bench.restart_agent().await;
    let after = bench.until("adopted", 20, |seen| seen.state == Observed::Running && seen.guest_ready).await;
    assert_eq!(bench.pid(), pid, "the same monitor");
    assert!(after.run_began_age_us > before.run_began_age_us);
    let text = fetch(TcpStream::connect_timeout(&public.into(), Duration::from_secs(20)).unwrap());
    assert!(text.contains("told-by-imds"), "{text}");

    // Reboot: another monitor, the same run.
    bench.want(|ensure| ensure.spec.reboots = 1);
    let deadline = Instant::now() + Duration::from_secs(120);
    loop {
        let pids = bench.cgroups.processes(bench.id());
        if pids.len() == 1 && pids[0] != pid {
            break;
        }
        assert!(Instant::now() < deadline, "no reboot: {}", bench.console());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let again =
        bench.until("ready again", 120, |seen| seen.state == Observed::Running && seen.guest_ready).await;
    assert!(again.run_began_age_us > after.run_began_age_us, "one run over the reboot");

    // Stop: the guest shuts down by its power button; the disk stays, nothing that runs does.
    bench.want(|ensure| ensure.spec.desired = DesiredState::Stopped);
    let stopped = bench.until("stopped", 120, |seen| seen.state == Observed::Stopped).await;
    assert!(stopped.run_ended_age_us.is_some());
    assert!(bench.console().contains("power button, shutting down"), "{}", bench.console());
    let kinds: Vec<&str> = bench.leftovers().iter().map(|found| found.kind).collect();
    assert_eq!(kinds, ["file"], "{:?}", bench.leftovers());

    // Start again; then somebody kills the monitor.
    bench.want(|ensure| {
        ensure.spec.desired = DesiredState::Running;
        ensure.spec.incarnation = 2;
    });
    bench.until("running again", 120, |seen| seen.state == Observed::Running).await;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(bench.pid()), nix::sys::signal::Signal::SIGKILL)
        .unwrap();
    let killed = bench.until("stopped by a kill", 30, |seen| seen.state == Observed::Stopped).await;
    assert_eq!(killed.reason.unwrap().code, "Server.MonitorKilled");

    // Terminate: nothing is left.
    bench.want(|ensure| ensure.spec.desired = DesiredState::Terminated);
    bench.until("absent", 30, |seen| seen.state == Observed::Absent).await;
    assert_eq!(bench.leftovers(), vec![]);
    let volume = bench.folders.volume(&bench.ensure.spec.root_volume.volume_id);
    assert!(!volume.exists());
}
