//! `serve`: puts the rooms together, opens the listeners, runs until it is told to stop.

use crate::auth::{Authenticator, Sealer};
use crate::blobs::BlobStore;
use crate::config::{BLOBS, Settings, StartError, StateDir, file_error};
use crate::engine::{Clock, Engine, EngineSettings, Random, SystemClock, SystemRandom, ThisMachine};
use crate::server::api::collect_blobs;
use crate::server::{Front, Limits, Listeners, serve};
use crate::streams::Broker;
use crate::tls;
use ipnet::Ipv4Net;
use roost_billing::PriceBook;
use roost_store::{SqliteStore, Store};
use roost_types::instance_type::Catalogue;
use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;

/// How long the engine may take to finish its step at shutdown.
const GRACE: Duration = Duration::from_secs(3);

/// What `serve` is told.
#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// Address of the API; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Address for agents.
    pub agent_listen: SocketAddr,
    /// Instance types, in place of the built-in ones.
    pub types: Option<PathBuf>,
    /// Prices, in place of the built-in ones.
    pub prices: Option<PathBuf>,
    /// Public addresses come from here.
    pub public_pool: Ipv4Net,
    /// What clients may take.
    pub limits: Limits,
}

/// A controller that has everything it needs and listens, but does not answer yet.
pub struct Controller {
    front: Arc<Front>,
    engine: Arc<Engine>,
    listeners: Listeners,
    /// Where the API listens.
    pub api: SocketAddr,
    /// Where agents are awaited.
    pub agents: SocketAddr,
    /// Held against a second controller.
    _lock: File,
}

impl Controller {
    /// Checks and opens everything. What is wrong is said here, before anything answers.
    ///
    /// # Errors
    /// [`StartError`].
    pub async fn open(
        state: &StateDir,
        options: &ServeOptions,
        shutdown: watch::Receiver<bool>,
    ) -> Result<Self, StartError> {
        let settings = state.made()?;
        let lock = state.lock()?;
        let catalogue = match &options.types {
            Some(path) => Catalogue::parse(&read(path)?)
                .map_err(|source| StartError::Types { path: path.clone(), source })?,
            None => Catalogue::builtin(),
        };
        let prices = match &options.prices {
            Some(path) => PriceBook::parse(&read(path)?)
                .map_err(|source| StartError::Prices { path: path.clone(), source })?,
            None => PriceBook::builtin(),
        };
        let store: Arc<dyn Store> = Arc::new(SqliteStore::open(&state.database())?);
        let sealer = Arc::new(Sealer::new(&*state.sealing_key()?));
        let server = state.server()?;
        let api_tls = tls::api_config(&server)?;
        let agent_tls = tls::agent_config(&server, &state.need("ca.pem")?)?;
        let api = listen(options.listen, "--listen").await?;
        let agents = listen(options.agent_listen, "--agent-listen").await?;
        let bound = |listener: &TcpListener, asked| listener.local_addr().unwrap_or(asked);
        let (api_address, agents_address) =
            (bound(&api, options.listen), bound(&agents, options.agent_listen));
        let Settings { region, zone, .. } = settings;
        let clock: Arc<dyn Clock> = Arc::new(SystemClock::over(ThisMachine, store.clock_high()?));
        let random: Arc<dyn Random> = Arc::new(SystemRandom);
        let prices = Arc::new(prices);
        let engine = Engine::new(
            Arc::clone(&store),
            Arc::new(catalogue),
            Arc::clone(&prices),
            Arc::clone(&clock),
            Arc::clone(&random),
            EngineSettings {
                region: region.clone(),
                zone: zone.clone(),
                public_pool: options.public_pool,
                ..EngineSettings::default()
            },
        );
        let authenticator = Authenticator::new(
            Arc::clone(&store),
            Arc::clone(&sealer),
            Arc::clone(&clock),
            random.as_ref(),
            region.clone(),
        )
        .map_err(|error| StartError::Other(error.to_string()))?;
        let blobs = state.path(BLOBS);
        let front = Front {
            engine: Arc::clone(&engine),
            store,
            prices,
            clock,
            random,
            sealer,
            authenticator,
            blobs: BlobStore::open(blobs.clone(), options.limits.blobs.clone())
                .map_err(file_error(&blobs))?,
            streams: Arc::new(Broker::new(options.limits.streams)),
            limits: options.limits.clone(),
            region,
            zones: vec![zone],
            shutdown,
        };
        Ok(Self {
            front: Arc::new(front),
            engine,
            listeners: Listeners { api: (api, api_tls), agents: (agents, agent_tls) },
            api: api_address,
            agents: agents_address,
            _lock: lock,
        })
    }

    /// Answers until the shutdown that it was opened with turns true.
    pub async fn run(self) {
        let shutdown = self.front.shutdown.clone();
        let work = tokio::spawn(Arc::clone(&self.engine).work(shutdown));
        let collecting = tokio::spawn(collect_blobs(Arc::clone(&self.front)));
        serve(Arc::clone(&self.front), self.listeners).await;
        collecting.abort();
        match tokio::time::timeout(GRACE, work).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!("the engine's worker ended early: {error}"),
            Err(_) => tracing::warn!(
                "the engine's worker did not stop in time; its step is done again at the next start"
            ),
        }
    }
}

fn read(path: &Path) -> Result<String, StartError> {
    std::fs::read_to_string(path).map_err(file_error(path))
}

async fn listen(address: SocketAddr, flag: &'static str) -> Result<TcpListener, StartError> {
    TcpListener::bind(address).await.map_err(|source| StartError::Listen { address, flag, source })
}
