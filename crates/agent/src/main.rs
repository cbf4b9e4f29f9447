//! `roost-agent`: the host's agent.

// `println!` and `eprintln!` panic on a closed output, and a panic has no exit code of ours.
#![deny(clippy::print_stderr, clippy::print_stdout)]

use clap::{Args, Parser, Subcommand};
use roost_agent::agent::{Agent, StateLock};
use roost_agent::cgroup::Cgroups;
use roost_agent::controller::Controller;
use roost_agent::error::{Error, Result};
use roost_agent::facts::{self, Identity, Shares};
use roost_agent::host::Host;
use roost_agent::monitor::Monitors;
use roost_agent::names::Folders;
use roost_agent::net::surroundings::Surroundings;
use roost_agent::net::{firewall, links};
use roost_agent::real::{HostSettings, RealHost};
use roost_agent::storage::Images;
use roost_agent::streams::Streams;
use roost_agent::task::Pace;
use roost_agent::unpack::Unpacker;
use roost_agent::{cgroup, clock, connection, durable, leftovers, unpack, users};
use roost_types::ids::InstanceId;
use std::io::Write;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};

/// The host's agent: makes this host match what the controller wants of it. Guests outlive it.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Works until it is told to stop.
    Serve(Box<Serve>),
    /// Lists what is on this host of an instance, or of any, as JSON; exit code 3 if there is anything.
    Leftovers(Leftovers),
    /// Ends every instance of a state folder and removes all of it, volumes included. The agent must not run.
    Purge(Purge),
    /// Unpacks descriptor 0 to descriptor 1 without privilege; the agent starts it.
    #[command(hide = true)]
    Unpack(Unpack),
}

#[derive(Args)]
struct Unpack {
    #[arg(long)]
    most: u64,
    #[arg(long)]
    reserve: u64,
    #[arg(long)]
    user: u32,
}

#[derive(Args)]
struct Places {
    /// Where instances, volumes and images are kept.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/roost/agent")]
    state_dir: PathBuf,
    /// Where sockets of running instances are.
    #[arg(long, value_name = "DIR", default_value = "/run/roost")]
    run_dir: PathBuf,
    /// Where network namespaces get their names (`ip netns` looks in /run/netns).
    #[arg(long, value_name = "DIR", default_value = "/run/netns")]
    netns_dir: PathBuf,
    /// The cgroup below which families and instances are made: by default that of a systemd scope of this state
    /// folder's own, or /sys/fs/cgroup/roost where there is no systemd.
    #[arg(long, value_name = "DIR")]
    cgroup_root: Option<PathBuf>,
}

#[derive(Args)]
struct Serve {
    #[command(flatten)]
    places: Places,
    /// Folder with identity.json, cert.pem, key.pem and ca.pem, made by `roost-controller agent-identity`.
    #[arg(long, value_name = "DIR")]
    identity: PathBuf,
    /// The monitor's program.
    #[arg(long, value_name = "PATH")]
    vmm: PathBuf,
    /// Where the controller listens for agents, instead of where the identity says.
    #[arg(long, value_name = "URL")]
    controller: Option<String>,
    /// CPU that instances may claim, per CPU that there is.
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0)]
    cpu_overcommit: f64,
    /// Disk that volumes may claim by their full size, per GiB that is free for them: 1-100. They are thin, so a disk holds more
    /// of them than their sizes; above 1, guests that fill theirs can fill the host's, and then all volumes on it get errors.
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0, value_parser = overcommit)]
    disk_overcommit: f64,
    /// Milliseconds in which an instance may use its share of a CPU, and is held back when it has (`cpu.max`): 10-1000. Each time
    /// costs its guest a little; longer periods cost less often, and hold it back for longer.
    #[arg(long, value_name = "MS", default_value_t = 100, value_parser = clap::value_parser!(u64).range(10..=1000), overrides_with = "cpu_period_ms")]
    cpu_period_ms: u64,
    /// Memory that the host keeps for itself, MiB.
    #[arg(long, value_name = "MIB", default_value_t = 512)]
    reserve_memory_mib: u64,
    /// Disk that stays free for the records of this host, MiB: with less, no image is unpacked and no volume made here.
    #[arg(long, value_name = "MIB", default_value_t = 512, value_parser = clap::value_parser!(u64).range(0..=1 << 30))]
    reserve_disk_mib: u64,
    /// Memory that a monitor may take beside its guest's, MiB.
    #[arg(long, value_name = "MIB", default_value_t = 64)]
    overhead_mib: u64,
    /// A name server that guests are told; may be given several times. By default the host's own.
    #[arg(long, value_name = "ADDRESS")]
    dns: Vec<Ipv4Addr>,
    /// A link that guests may leave this host by, beside those of its default routes; may be given several times.
    #[arg(long, value_name = "LINK")]
    uplink: Vec<String>,
    /// From the power button to the kill, seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    stop_grace: u64,
    /// First of the user ids that monitors run as, one per instance. A monitor that runs keeps the one that it was started with.
    #[arg(long, value_name = "UID", default_value_t = users::FIRST)]
    uid_base: u32,
    /// How long an image that no instance uses is kept, hours.
    #[arg(long, value_name = "HOURS", default_value_t = 168)]
    image_idle_hours: u64,
}

fn overcommit(text: &str) -> std::result::Result<f64, String> {
    let factor: Option<f64> = text.parse().ok().filter(|factor| (1.0..=100.0).contains(factor));
    factor.ok_or_else(|| "allowed is a number from 1 to 100, such as 2.5".to_owned())
}

#[derive(Args)]
struct Leftovers {
    #[command(flatten)]
    places: Places,
    /// Only this instance.
    #[arg(long, value_name = "ID")]
    instance: Option<InstanceId>,
}

#[derive(Args)]
struct Purge {
    #[command(flatten)]
    places: Places,
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Serve(serve) => run(&serve).map(|()| ExitCode::SUCCESS),
        Command::Leftovers(which) => list(&which),
        Command::Purge(purge) => remove(&purge).map(|()| ExitCode::SUCCESS),
        Command::Unpack(Unpack { most, reserve, user }) => unpack::run(unpack::Order { most, reserve, user }),
    };
    outcome.unwrap_or_else(|error| {
        let _ = writeln!(std::io::stderr(), "roost-agent: {}", error.chain());
        ExitCode::FAILURE
    })
}

impl Places {
    fn folders(&self) -> Folders {
        Folders { state: self.state_dir.clone(), run: self.run_dir.clone(), netns: self.netns_dir.clone() }
    }

    /// Where the agent of this state folder has said that its cgroups are, or where it is said now.
    fn cgroups(&self) -> Result<Cgroups> {
        let noted = durable::read_json::<PathBuf>(&cgroup_note(&self.folders()))?;
        let root = self.cgroup_root.clone().or(noted);
        Ok(Cgroups::at(root.unwrap_or_else(|| PathBuf::from("/sys/fs/cgroup/roost"))))
    }
}

fn remove(purge: &Purge) -> Result<()> {
    let folders = purge.places.folders();
    let _lock = StateLock::take(&folders)?;
    leftovers::purge(&folders, &purge.places.cgroups()?)?;
    cgroup::end_scope(&folders.state);
    durable::remove_file(&cgroup_note(&folders))
}

fn cgroup_note(folders: &Folders) -> PathBuf {
    folders.state.join("cgroup-root.json")
}

fn list(which: &Leftovers) -> Result<ExitCode> {
    let folders = which.places.folders();
    let cgroups = which.places.cgroups()?;
    let found = match &which.instance {
        Some(id) => leftovers::of(&folders, &cgroups, id)?,
        None => leftovers::all(&folders, &cgroups)?,
    };
    let text = serde_json::to_string_pretty(&serde_json::json!({ "leftovers": found }))
        .map_err(|source| Error::Damaged { path: "the list".into(), source })?;
    writeln!(std::io::stdout(), "{text}").map_err(Error::io("writing the list"))?;
    Ok(if found.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(3) })
}

fn run(serve: &Serve) -> Result<()> {
    let filter = tracing_subscriber::EnvFilter::builder()
        .with_default_directive(tracing_subscriber::filter::LevelFilter::INFO.into())
        .parse(std::env::var("ROOST_LOG").unwrap_or_default())
        .map_err(|error| Error::Impossible(format!("ROOST_LOG is no filter such as info: {error}")))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        // The subscriber's own error output panics where stderr cannot be written.
        .log_internal_errors(false)
        .with_ansi(false)
        .init();
    if !rustix::process::geteuid().is_root() {
        return Err(Error::Impossible(
            "the agent makes namespaces, cgroups and jails, and must be started as root".into(),
        ));
    }
    let halts = roost_halt::from_environment().map_err(|error| Error::Impossible(error.to_string()))?;
    if let Some(folder) = halts {
        tracing::warn!(?folder, "halt points are live: this is for tests");
    }
    if rustls::crypto::ring::default_provider().install_default().is_err() {
        return Err(Error::Impossible("another TLS provider is installed already".into()));
    }
    let folders = serve.places.folders();
    let lock = StateLock::take(&folders)?;
    durable::make_folder(&folders.run)?;
    let identity = Identity::read(&serve.identity)?;
    let url = serve.controller.as_ref().unwrap_or(&identity.controller_url);
    let controller = Controller::new(url, &serve.identity)?;
    let vmm = serve.vmm.canonicalize().map_err(Error::file("find the monitor", &serve.vmm))?;
    let cgroups = Cgroups::open(serve.places.cgroup_root.as_deref(), &folders.state)?
        .with_period_ms(serve.cpu_period_ms);
    durable::write_json(&cgroup_note(&folders), &cgroups.root())?;
    if let Err(error) = links::make_room_for_neighbours(Path::new(links::NEIGHBOUR_LIMITS)) {
        tracing::warn!(error = %error.chain(), "guests may crowd the host's neighbours out");
    }
    let shares = Shares {
        cpu_overcommit: serve.cpu_overcommit,
        disk_overcommit: serve.disk_overcommit,
        reserve_memory_mib: serve.reserve_memory_mib,
        overhead_mib: serve.overhead_mib,
    };
    let monitors = Monitors {
        folders: folders.clone(),
        cgroups,
        program: vmm,
        uid_base: serve.uid_base,
        mtu: Surroundings::look(&serve.uplink).mtu,
    };
    let unpacker = Unpacker {
        // The program that runs now, even if its file was replaced meanwhile.
        program: "/proc/self/exe".into(),
        user: serve.uid_base.saturating_sub(1),
        reserve: serve.reserve_disk_mib << 20,
    };
    let images = Images::new(folders.clone(), Arc::new(controller.clone()), unpacker)?;
    let settings = HostSettings {
        facts: facts::measure(&identity, &shares, &folders)?,
        dns: serve.dns.clone(),
        uplinks: serve.uplink.clone(),
        folders: folders.clone(),
        reserve_disk: serve.reserve_disk_mib << 20,
    };
    let host = Arc::new(RealHost::new(settings, monitors, images)?);
    host.troubles().set("user ids", users::trouble(serve.uid_base));
    let pace = Pace { stop_grace: Duration::from_secs(serve.stop_grace), ..Pace::default() };
    let idle = Duration::from_secs(serve.image_idle_hours.saturating_mul(3600));
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(Error::io("starting the runtime"))?
        .block_on(async {
            let agent = Agent::open(lock, Arc::clone(&host), &folders, pace)?;
            let streams = Streams::new(Arc::clone(&agent), controller.clone(), folders);
            let watched = Arc::clone(&host);
            tokio::spawn(async move { clock::watch(watched.troubles()).await });
            let watched = Arc::clone(&host);
            tokio::spawn(async move { watched.watch_disk().await });
            tokio::spawn(prune(Arc::clone(&agent), Arc::clone(&host), idle));
            tokio::spawn(host.tend_network());
            tokio::task::spawn_blocking(|| {
                if let Err(error) = firewall::warm_up() {
                    tracing::error!(error = %error.chain(), "no instance can have a network here");
                }
            });
            tokio::spawn(connection::run(Arc::clone(&agent), controller.clone(), streams));
            tracing::info!("ready");
            if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
                tracing::debug!(%error, "nobody was told that we are ready");
            }
            stopped().await?;
            connection::part(&agent, &controller).await;
            Ok(())
        })
}

async fn stopped() -> Result<()> {
    let mut term = signal(SignalKind::terminate()).map_err(Error::io("listening for SIGTERM"))?;
    let mut int = signal(SignalKind::interrupt()).map_err(Error::io("listening for SIGINT"))?;
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
    tracing::info!("stopping; guests run on");
    Ok(())
}

async fn prune(agent: Arc<Agent<RealHost>>, host: Arc<RealHost>, idle: Duration) {
    loop {
        tokio::time::sleep(Duration::from_secs(600)).await;
        let (agent, host) = (Arc::clone(&agent), Arc::clone(&host));
        let pruned =
            tokio::task::spawn_blocking(move || host.images().prune(&agent.blobs_in_use(), idle)).await;
        match pruned {
            Ok(Ok(0)) | Err(_) => {}
            Ok(Ok(count)) => tracing::info!(count, "images that nobody uses were removed"),
            Ok(Err(error)) => tracing::warn!(error = %error.chain(), "pruning images"),
        }
    }
}
