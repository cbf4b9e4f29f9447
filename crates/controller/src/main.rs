//! `roost-controller`: the one writer of truth. Unprivileged; serves users on one port and agents on another.

// `println!` and `eprintln!` panic on a closed output, and a panic has no exit code of ours.
#![deny(clippy::print_stderr, clippy::print_stdout)]
#![forbid(unsafe_code)]

use clap::{Args, Parser, Subcommand};
use ipnet::Ipv4Net;
use roost_controller::backup::{self, Summary};
use roost_controller::blobs::BlobLimits;
use roost_controller::config::{StartError, StateDir};
use roost_controller::offline::{self, RecomputeOptions};
use roost_controller::serve::{Controller, ServeOptions};
use roost_controller::server::Limits;
use roost_controller::server::doors::DoorLimits;
use roost_controller::setup::{self, InitOptions};
use roost_controller::streams::StreamLimits;
use roost_types::api::BillBy;
use roost_types::{AccountId, Micros};
use std::io::{IsTerminal, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

const EXIT_CODES: &str = "\
Exit codes: 0 done; 1 a file cannot be read or written, or a fault of ours; 2 wrong usage; 3 a value or a file in \
the state directory is not valid; 4 another controller runs on the state directory; 5 an address cannot be \
listened on; 6 the database is locked, damaged or too new.

ROOST_LOG sets what is logged to stderr (error, warn, info, debug, trace, or a filter such as \
info,roost_controller=debug).";

/// Roost's controller: accepts launches, places them, tells agents, bills.
#[derive(Parser)]
#[command(name = "roost-controller", version, after_help = EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Args)]
struct State {
    /// The controller's state directory.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/roost/controller")]
    state_dir: PathBuf,
}

#[derive(Subcommand)]
enum Command {
    /// Makes the state directory: authority, certificates, database, first account. Run again, it completes.
    Init {
        #[command(flatten)]
        state: State,
        /// Region [default: home-1].
        #[arg(long)]
        region: Option<String>,
        /// Availability zone [default: home-1a].
        #[arg(long)]
        zone: Option<String>,
        /// Where clients will find the controller [default: https://127.0.0.1:7443].
        #[arg(long, value_name = "URL")]
        endpoint: Option<String>,
        /// Another DNS name or address for the server certificate; may be given several times.
        #[arg(long = "name", value_name = "NAME")]
        names: Vec<String>,
    },
    /// Makes the identity by which a host's agent is known. Run again, the host keeps its id.
    AgentIdentity {
        #[command(flatten)]
        state: State,
        /// The host's name.
        #[arg(long, value_name = "NAME")]
        hostname: String,
        /// The zone it stands in [default: the controller's].
        #[arg(long)]
        zone: Option<String>,
        /// Where its agent dials [default: the endpoint's host, port 7444].
        #[arg(long, value_name = "URL")]
        controller: Option<String>,
        /// The folder to write identity.json, cert.pem, key.pem and ca.pem to.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
    /// Serves until SIGTERM or SIGINT.
    Serve {
        #[command(flatten)]
        state: State,
        /// Address of the API.
        #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:7443")]
        listen: SocketAddr,
        /// Address for agents.
        #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:7444")]
        agent_listen: SocketAddr,
        /// Instance types, in place of the built-in ones.
        #[arg(long, value_name = "FILE")]
        types: Option<PathBuf>,
        /// Prices, in place of the built-in ones.
        #[arg(long, value_name = "FILE")]
        prices: Option<PathBuf>,
        /// Public addresses come from here.
        #[arg(long, value_name = "CIDR", default_value = "100.64.0.0/16")]
        public_pool: Ipv4Net,
        /// Largest upload in GiB.
        #[arg(long, value_name = "GIB", default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..=65_536))]
        max_blob_gib: u64,
        /// Most GiB of uploaded files of one account, those under way included.
        #[arg(long, value_name = "GIB", default_value_t = 256, value_parser = clap::value_parser!(u64).range(1..=1_048_576))]
        max_account_blob_gib: u64,
        /// MiB that uploads leave free on the database's disk.
        #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u64).range(16..=1_048_576))]
        database_reserve_mib: u64,
        /// Hours that an uploaded file is kept which no image needs.
        #[arg(long, value_name = "HOURS", default_value_t = 24, value_parser = clap::value_parser!(u64).range(1..=8_760))]
        keep_unused_hours: u64,
        #[command(flatten)]
        connections: Connections,
    },
    /// Writes all that the controller is to one new file, which only its owner can read. The controller may run.
    Backup {
        #[command(flatten)]
        state: State,
        /// The file to make.
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Puts a backup into an empty state directory.
    Restore {
        #[command(flatten)]
        state: State,
        /// The file that `backup` made.
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// The usage log, which bills are made of.
    #[command(subcommand)]
    UsageLog(UsageLog),
    /// Bills, computed from the database without a running controller.
    #[command(subcommand)]
    Bill(BillCommand),
}

/// How many connections there may be. Open files limit them too (`LimitNOFILE` in the unit).
#[derive(Args)]
struct Connections {
    /// Most connections to the API.
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = count())]
    max_connections: u64,
    /// Most connections to the API, or of agents, that one address may have before anything on them is signed.
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = count())]
    max_connections_per_address: u64,
    /// Most connections to the API of one account.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = count())]
    max_connections_per_account: u64,
    /// Most connections of agents.
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = count())]
    max_agent_connections: u64,
    /// Most consoles and tunnels at once.
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = count())]
    max_streams: u64,
    /// Most consoles and tunnels of one account at once.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = count())]
    max_streams_per_account: u64,
}

fn count() -> clap::builder::RangedU64ValueParser<u64> {
    clap::value_parser!(u64).range(1..=1_000_000)
}

impl Connections {
    fn limits(&self, blobs: BlobLimits) -> Limits {
        let count = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
        let per_address = count(self.max_connections_per_address);
        let usual = Limits::default();
        Limits {
            api: DoorLimits {
                connections: count(self.max_connections),
                per_address,
                per_owner: count(self.max_connections_per_account),
            },
            agents: DoorLimits {
                connections: count(self.max_agent_connections),
                per_address,
                per_owner: usual.agents.per_owner,
            },
            streams: StreamLimits {
                streams: count(self.max_streams),
                per_account: count(self.max_streams_per_account),
            },
            blobs,
            ..usual
        }
    }
}

#[derive(Subcommand)]
enum UsageLog {
    /// Prints the log, one JSON object a line, in the order it was written.
    Export {
        #[command(flatten)]
        state: State,
    },
}

#[derive(Subcommand)]
enum BillCommand {
    /// Prints a bill as JSON. The same log and the same flags give the same bytes.
    Recompute {
        #[command(flatten)]
        state: State,
        /// From this moment (2026-11-01 or 2026-11-01T00:00:00Z) [default: the beginning of the month of --until].
        #[arg(long, value_name = "MOMENT", value_parser = moment)]
        since: Option<Micros>,
        /// Up to this moment [default: just after the last moment that the log knows of].
        #[arg(long, value_name = "MOMENT", value_parser = moment)]
        until: Option<Micros>,
        /// Grouping: instance, account, type or day.
        #[arg(long, default_value = "instance")]
        by: BillBy,
        /// Only this account's.
        #[arg(long, value_name = "ID")]
        account: Option<AccountId>,
        /// Prices, in place of the built-in ones.
        #[arg(long, value_name = "FILE")]
        prices: Option<PathBuf>,
    },
}

fn moment(text: &str) -> Result<Micros, String> {
    roost_billing::parse_moment(text)
        .ok_or_else(|| "expected a date or a moment such as 2026-11-01 or 2026-11-01T00:00:00Z".to_owned())
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    // A second provider could only come from another call of this line.
    let _ = rustls::crypto::ring::default_provider().install_default();
    match log_to_stderr().and_then(|()| run(cli.command)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("roost-controller: {error}"));
            ExitCode::from(error.exit_code())
        }
    }
}

/// Prints a line on stderr; a closed stderr changes nothing.
fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Prints on stdout; a closed stdout is no error.
fn print(text: &str) -> Result<(), StartError> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(StartError::Other(format!("standard output: {error}")))
        }
        _ => Ok(()),
    }
}

fn log_to_stderr() -> Result<(), StartError> {
    let filter = tracing_subscriber::EnvFilter::builder()
        .with_default_directive(tracing_subscriber::filter::LevelFilter::INFO.into())
        .parse(std::env::var("ROOST_LOG").unwrap_or_default())
        .map_err(|error| StartError::Value(format!("ROOST_LOG is no filter such as info: {error}")))?;
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(colours)
        .with_writer(std::io::stderr)
        // The subscriber's own error output panics where stderr cannot be written.
        .log_internal_errors(false)
        .init();
    Ok(())
}

fn run(command: Command) -> Result<(), StartError> {
    match command {
        Command::Init { state, region, zone, endpoint, names } => {
            let dir = StateDir::new(&state.state_dir);
            let admin = setup::init(&dir, &InitOptions { region, zone, endpoint, names })?;
            print(&format!(
                "state directory  {}\nendpoint         {}\nregion           {}\n\
                 first account    {} (administrator)\nits access key   {}\n",
                state.state_dir.display(),
                admin.endpoint,
                admin.region,
                admin.account_id,
                dir.path("admin.json").display()
            ))
        }
        Command::AgentIdentity { state, hostname, zone, controller, out } => {
            let dir = StateDir::new(&state.state_dir);
            let identity =
                setup::agent_identity(&dir, &hostname, zone.as_deref(), controller.as_deref(), &out)?;
            print(&format!(
                "host             {} ({hostname})\nidentity         {}\ndials            {}\n",
                identity.host_id,
                out.display(),
                identity.controller_url
            ))
        }
        Command::Serve {
            state,
            listen,
            agent_listen,
            types,
            prices,
            public_pool,
            max_blob_gib,
            max_account_blob_gib,
            database_reserve_mib,
            keep_unused_hours,
            connections,
        } => {
            let halts =
                roost_halt::from_environment().map_err(|error| StartError::Other(error.to_string()))?;
            if let Some(folder) = halts {
                tracing::warn!(?folder, "halt points are live: this is for tests");
            }
            let blobs = BlobLimits {
                file_bytes: max_blob_gib << 30,
                account_bytes: max_account_blob_gib << 30,
                reserve: database_reserve_mib << 20,
                keep_unnamed: std::time::Duration::from_secs(keep_unused_hours * 60 * 60),
                ..BlobLimits::default()
            };
            let limits = connections.limits(blobs);
            let options = ServeOptions { listen, agent_listen, types, prices, public_pool, limits };
            let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
            let runtime =
                runtime.map_err(|error| StartError::Other(format!("cannot start threads: {error}")))?;
            let ended = runtime.block_on(serve(&StateDir::new(state.state_dir), &options));
            // What still blocks must not hold the process: every commit is whole or not at all.
            runtime.shutdown_timeout(std::time::Duration::from_secs(1));
            ended
        }
        Command::Backup { state, file } => {
            let summary = backup::backup(&StateDir::new(&state.state_dir), &file)?;
            print(&told("backed up", &state.state_dir, &file, &summary))
        }
        Command::Restore { state, file } => {
            let summary = backup::restore(&StateDir::new(&state.state_dir), &file)?;
            print(&told("restored", &state.state_dir, &file, &summary))
        }
        Command::UsageLog(UsageLog::Export { state }) => {
            offline::export_usage_log(&StateDir::new(state.state_dir), std::io::stdout().lock())
        }
        Command::Bill(BillCommand::Recompute { state, since, until, by, account, prices }) => {
            let options = RecomputeOptions { since, until, by, account, prices };
            offline::recompute_bill(&StateDir::new(state.state_dir), &options, std::io::stdout().lock())
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "sizes are shown with one digit behind the point")]
fn told(what: &str, dir: &Path, file: &Path, summary: &Summary) -> String {
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    format!(
        "{what:<16} {}\nfile             {}\nas of            {}\ndatabase         {:.1} MiB, schema {}\n\
         uploaded files   {}\ntook             {:.2} s for {:.1} MiB\n",
        dir.display(),
        file.display(),
        jiff::Timestamp::from_microsecond(summary.about.made_at.0).unwrap_or_default(),
        mib(summary.database_bytes),
        summary.about.schema,
        summary.blobs,
        summary.took.as_secs_f64(),
        mib(summary.bytes)
    )
}

async fn serve(state: &StateDir, options: &ServeOptions) -> Result<(), StartError> {
    let listen_for = |kind| signal(kind).map_err(|error| StartError::Other(format!("signals: {error}")));
    let (mut term, mut interrupt) =
        (listen_for(SignalKind::terminate())?, listen_for(SignalKind::interrupt())?);
    let (stop, stopped) = watch::channel(false);
    let controller = Controller::open(state, options, stopped).await?;
    say(&format!(
        "roost-controller: ready: API on https://{}, agents on https://{}",
        controller.api, controller.agents
    ));
    notify(sd_notify::NotifyState::Ready);
    tokio::spawn(async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping; instances go on");
        notify(sd_notify::NotifyState::Stopping);
        stop.send_replace(true);
    });
    controller.run().await;
    Ok(())
}

/// Tells systemd, where it asked to be told.
fn notify(state: sd_notify::NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::debug!("cannot notify systemd: {error}");
    }
}
