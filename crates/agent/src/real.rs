//! The host as it is: [`Host`] over cgroups, namespaces, files and processes. Thin: each method calls one room.
//! A test can halt the agent before and after each operation (`roost_halt`).

use crate::cgroup::Cgroups;
use crate::disk::Disk;
use crate::error::{Error, Result};
use crate::host::{Facts, Host, MonitorFact, Started};
use crate::monitor::{self, Monitors};
use crate::names::Folders;
use crate::net::dhcp::Lease;
use crate::net::imds::{Imds, Tokens};
use crate::net::links::{self, Links};
use crate::net::metadata::Tree;
use crate::net::netns;
use crate::net::service::Services;
use crate::net::walls::Walls;
use crate::record::{self, Accepted, MonitorId, Run};
use crate::storage::{self, Images};
use crate::trouble::Troubles;
use crate::{clock, durable, facts};
use roost_types::agent::HostFacts;
use roost_types::ids::InstanceId;
use roost_vmm::console::ConsoleReader;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How often the free disk is looked at.
const DISK_EVERY: Duration = Duration::from_secs(5);
/// Name servers for guests if only the host reaches its own (loopback resolvers).
const FALLBACK_DNS: [Ipv4Addr; 2] = [Ipv4Addr::new(9, 9, 9, 9), Ipv4Addr::new(1, 1, 1, 1)];
/// How often the host's network is looked at.
const TEND_EVERY: Duration = Duration::from_secs(1);

/// What a real host needs to know of itself.
pub struct HostSettings {
    /// Where things are.
    pub folders: Folders,
    /// What it can hold.
    pub facts: HostFacts,
    /// Name servers for guests; empty: the host's own.
    pub dns: Vec<Ipv4Addr>,
    /// Bytes of the disk that stay free.
    pub reserve_disk: u64,
    /// Uplinks beside those of the host's default routes.
    pub uplinks: Vec<String>,
}

impl HostSettings {
    /// Name servers for guests. The host's own may change while the agent runs.
    fn name_servers(&self) -> Vec<Ipv4Addr> {
        if self.dns.is_empty() { facts::name_servers(&FALLBACK_DNS) } else { self.dns.clone() }
    }
}

/// The host as it is.
pub struct RealHost {
    settings: HostSettings,
    boot_id: String,
    cgroups: Cgroups,
    monitors: Monitors,
    images: Images,
    disk: Disk,
    token_key: [u8; 32],
    networks: Mutex<BTreeMap<InstanceId, Network>>,
    walls: Arc<Walls>,
    /// The current name servers for guests.
    dns: Mutex<Vec<Ipv4Addr>>,
    troubles: Troubles,
}

/// The network of an instance as this agent has made it.
struct Network {
    made_for: String,
    services: Services,
}

impl RealHost {
    /// Takes the host.
    ///
    /// # Errors
    /// Its boot id or the key of metadata sessions cannot be read.
    pub fn new(settings: HostSettings, monitors: Monitors, images: Images) -> Result<Self> {
        let token_key = token_key(&settings.folders)?;
        Ok(Self {
            boot_id: clock::boot_id()?,
            cgroups: monitors.cgroups.clone(),
            troubles: Troubles::new(&settings.folders),
            disk: Disk::new(settings.folders.clone(), settings.reserve_disk),
            walls: Arc::new(Walls::new(settings.uplinks.clone())),
            dns: Mutex::new(settings.name_servers()),
            settings,
            monitors,
            images,
            token_key,
            networks: Mutex::default(),
        })
    }

    /// The images.
    pub const fn images(&self) -> &Images {
        &self.images
    }

    /// Reads the free disk periodically. Below the reserve, the host reports no disk for volumes.
    /// Never returns.
    pub async fn watch_disk(&self) {
        loop {
            let trouble = self.disk.look().unwrap_or_else(|error| Some(error.chain()));
            self.troubles.set("disk", trouble);
            tokio::time::sleep(DISK_EVERY).await;
        }
    }

    /// Where things are.
    pub const fn folders(&self) -> &Folders {
        &self.settings.folders
    }

    fn networks(&self) -> MutexGuard<'_, BTreeMap<InstanceId, Network>> {
        self.networks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn overhead_mib(&self) -> u64 {
        self.settings.facts.overhead_mib
    }

    fn links(&self, of: &Accepted) -> Links {
        Links { id: of.id().clone(), interface: of.spec().interface.clone(), mtu: self.walls.around().mtu }
    }

    fn lease(&self, of: &Accepted) -> Result<Lease> {
        let interface = &of.spec().interface;
        Ok(Lease {
            mac: links::mac(&interface.mac)?,
            address: interface.private_ip,
            prefix_len: interface.prefix_len,
            router: interface.gateway,
            dns: self.name_servers(),
            hostname: of.spec().metadata.hostname.clone(),
            mtu: self.walls.around().mtu,
        })
    }

    fn name_servers(&self) -> Vec<Ipv4Addr> {
        self.dns.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Follows the host's network until the agent ends: removed tables, links and name servers.
    pub async fn tend_network(self: Arc<Self>) {
        loop {
            let host = Arc::clone(&self);
            let tended = blocking(move || {
                host.walls.tend(&host.troubles);
                let servers = host.settings.name_servers();
                let mut known = host.dns.lock().unwrap_or_else(PoisonError::into_inner);
                if *known != servers {
                    tracing::info!(?servers, "guests are told other name servers");
                    *known = servers;
                }
                Ok(())
            });
            if let Err(error) = tended.await {
                tracing::error!(error = %error.chain(), "looking after the network");
            }
            tokio::time::sleep(TEND_EVERY).await;
        }
    }

    /// A digest of everything that an instance's links, lease and metadata depend on.
    fn made_for(&self, of: &Accepted) -> String {
        let spec = of.spec();
        let host = (self.walls.around().mtu, self.name_servers());
        record::hash_of(&(&spec.interface, &spec.metadata, &spec.image, &spec.account, host))
    }

    fn run_objects(&self, id: &InstanceId) -> bool {
        let folders = self.folders();
        !self.cgroups.of(id).is_empty()
            || netns::exists(&folders.netns_file(id))
            || folders.netns_file(id).exists()
            || links::link_exists(&crate::names::host_veth(id))
            || folders.running(id).exists()
            || self.networks().contains_key(id)
    }
}

/// The host's key of metadata sessions, made once.
fn token_key(folders: &Folders) -> Result<[u8; 32]> {
    let path = folders.state.join("metadata.key");
    if let Some(key) = std::fs::read(&path).ok().and_then(|bytes| bytes.try_into().ok()) {
        return Ok(key);
    }
    let mut key = [0; 32];
    getrandom::fill(&mut key).map_err(|error| Error::NotNow(format!("no random bytes: {error}")))?;
    durable::write(&path, &key)?;
    Ok(key)
}

/// Runs blocking work off the event loop.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(Error::NotNow(format!("a piece of work was cut short: {error}"))))
}

impl Host for RealHost {
    fn now_ns(&self) -> u64 {
        clock::boottime_ns()
    }

    fn boot_id(&self) -> String {
        self.boot_id.clone()
    }

    fn facts(&self) -> HostFacts {
        let mut facts = self.settings.facts.clone();
        if self.disk.is_low() {
            facts.disk_gib = 0;
        }
        facts
    }

    fn slots_in_use(&self) -> BTreeSet<u32> {
        use std::os::unix::fs::MetadataExt;
        let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        let users = processes.filter_map(|process| Some(process.metadata().ok()?.uid()));
        users.filter_map(|user| user.checked_sub(self.monitors.uid_base)).collect()
    }

    fn troubles(&self) -> &Troubles {
        &self.troubles
    }

    fn network_trouble(&self, id: &InstanceId) -> Option<String> {
        self.walls.trouble_of(id)
    }

    async fn look(&self, of: &Accepted, run: &Run) -> Result<Facts> {
        let (id, spec) = (of.id(), of.spec());
        let (monitors, accepted, known) = (self.monitors.clone(), of.clone(), run.clone());
        let boot_id = self.boot_id.clone();
        // A slow disk with a monitor's files must not block other tasks.
        let monitor = blocking(move || Ok(monitors.look(&accepted, &known, &boot_id))).await?;
        let wanted = self.made_for(of);
        let network = self.links(of).stand(self.folders())
            && self.networks().get(id).is_some_and(|net| net.made_for == wanted && net.services.alive());
        let volume = self.folders().volume(&spec.root_volume.volume_id).exists();
        Ok(Facts {
            // Held open by a living monitor; only a start needs their names.
            images: matches!(monitor, MonitorFact::Alive { .. }) || self.images.present(&spec.image),
            disk: volume,
            network,
            cgroup: self.cgroups.stands(spec, id, self.overhead_mib()),
            monitor,
            run_objects: self.run_objects(id),
            files: volume,
        })
    }

    async fn fetch(&self, of: &Accepted) -> Result<()> {
        let _points = roost_halt::around("agent.fetch");
        self.images.fetch(&of.spec().image).await
    }

    async fn make_disk(&self, of: &Accepted) -> Result<()> {
        let _points = roost_halt::around("agent.disk");
        self.disk.has_room()?;
        let (folders, spec) = (self.folders().clone(), of.spec().clone());
        blocking(move || storage::make_volume(&folders, &spec)).await
    }

    async fn make_network(&self, of: &Accepted) -> Result<()> {
        let _points = roost_halt::around("agent.network");
        let (links, folders) = (self.links(of), self.folders().clone());
        let namespace = folders.netns_file(of.id());
        let made_for = self.made_for(of);
        let lease = self.lease(of)?;
        let walls = Arc::clone(&self.walls);
        let tree = Tree::new(&of.ensure);
        let tokens = Tokens::new(self.token_key, of.id().to_string());
        let has_services = self.networks().get(of.id()).is_some_and(|net| net.services.alive());
        let (lease_again, tree_again) = (lease.clone(), tree.clone());
        let runtime = tokio::runtime::Handle::current();
        let services = blocking(move || {
            let begin = std::time::Instant::now();
            let lap = |what: &str| tracing::debug!(what, took = ?begin.elapsed(), "network");
            links.make(&folders)?;
            lap("links");
            walls.set(&links.id, &links.interface, &namespace)?;
            lap("rules");
            if has_services {
                return Ok(None);
            }
            let _inside = runtime.enter();
            Services::start(&namespace, lease, Imds::new(tokens, tree)).map(Some)
        })
        .await?;
        let old = {
            let mut networks = self.networks();
            match (services, networks.get_mut(of.id())) {
                (Some(services), _) => networks.insert(of.id().clone(), Network { made_for, services }),
                (None, Some(network)) => {
                    network.services.replace(lease_again, tree_again);
                    network.made_for = made_for;
                    None
                }
                (None, None) => None,
            }
        };
        if let Some(old) = old {
            old.services.stop().await;
        }
        Ok(())
    }

    async fn make_cgroup(&self, of: &Accepted) -> Result<()> {
        let _points = roost_halt::around("agent.cgroup");
        let (cgroups, accepted, overhead) = (self.cgroups.clone(), of.clone(), self.overhead_mib());
        blocking(move || cgroups.ensure(accepted.spec(), accepted.id(), overhead)).await
    }

    async fn start_monitor(&self, of: &Accepted) -> Result<Started> {
        let _points = roost_halt::around("agent.monitor");
        let (mut monitors, accepted) = (self.monitors.clone(), of.clone());
        monitors.mtu = self.walls.around().mtu;
        blocking(move || monitors.start(&accepted)).await
    }

    async fn let_run(&self, of: &Accepted, monitor: &MonitorId) -> Result<u64> {
        let _points = roost_halt::around("agent.run");
        let (monitors, accepted, monitor) = (self.monitors.clone(), of.clone(), monitor.clone());
        blocking(move || monitors.let_run(&accepted, &monitor)).await
    }

    async fn press_power(&self, of: &Accepted) -> Result<()> {
        let _points = roost_halt::around("agent.power");
        let (monitors, id) = (self.monitors.clone(), of.id().clone());
        blocking(move || monitors.press_power(&id)).await
    }

    async fn kill(&self, of: &Accepted) -> Result<()> {
        let _points = roost_halt::around("agent.kill");
        let (cgroups, id) = (self.cgroups.clone(), of.id().clone());
        blocking(move || cgroups.kill(&id)).await
    }

    async fn ended(&self, _: &Accepted, monitor: &MonitorId) {
        monitor::ended(monitor).await;
    }

    async fn tear_down(&self, of: &Accepted) -> Result<()> {
        let _points = roost_halt::around("agent.tear-down");
        let network = self.networks().remove(of.id());
        if let Some(network) = network {
            network.services.stop().await;
        }
        let (cgroups, folders, id) = (self.cgroups.clone(), self.folders().clone(), of.id().clone());
        let walls = Arc::clone(&self.walls);
        blocking(move || {
            cgroups.kill(&id)?;
            links::remove(&folders, &id)?;
            walls.take_down(&id)?;
            cgroups.remove(&id)?;
            durable::remove_folder(&folders.running(&id))
        })
        .await
    }

    async fn remove_disk(&self, of: &Accepted) -> Result<()> {
        let _points = roost_halt::around("agent.remove-disk");
        let path = self.folders().volume(&of.spec().root_volume.volume_id);
        blocking(move || durable::remove_file(&path).and_then(|()| durable::sync_parent(&path))).await
    }

    fn cpu_usage_us(&self, of: &Accepted) -> Option<u64> {
        self.cgroups.cpu_usage_us(of.spec(), of.id())
    }

    fn console(&self, of: &Accepted, offset: u64) -> Option<(Vec<u8>, u64)> {
        let file = File::open(self.folders().console(of.id())).ok()?;
        let chunk = ConsoleReader::new(file).ok()?.read_from(offset).ok()?;
        Some((chunk.bytes, chunk.next_offset))
    }
}
