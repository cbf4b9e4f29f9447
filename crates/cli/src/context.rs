//! What every command is given.

use crate::args::{Format, Global};
use crate::client::Client;
use crate::config::{self, Config, DEFAULT_PROFILE, Profile};
use crate::error::{Error, Result};
use crate::output::Output;
use crate::progress::Progress;
use roost_types::Micros;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// Options, output and the notes for an interruption.
pub struct Context {
    /// As given.
    pub global: Global,
    /// Where results go.
    pub output: Output,
    /// What to say if the user interrupts now.
    interruption: Mutex<String>,
    /// A child program is running, and handles signals itself.
    hands_on_signals: AtomicBool,
}

impl Context {
    /// From the options that every command has.
    pub fn new(global: Global) -> Self {
        let output = Output::new(global.output, global.quiet, global.no_color);
        Self { global, output, interruption: Mutex::default(), hands_on_signals: AtomicBool::new(false) }
    }

    /// The name of the profile.
    pub fn profile_name(&self) -> &str {
        self.global.profile.as_deref().unwrap_or(DEFAULT_PROFILE)
    }

    /// The configuration file.
    pub fn config_path(&self) -> Result<PathBuf> {
        self.global.config.clone().map_or_else(config::default_path, Ok)
    }

    /// The profile, with the endpoint that the command line overrides.
    pub fn profile(&self) -> Result<Profile> {
        let path = self.config_path()?;
        let mut profile = Config::load(&path)?.profile(self.profile_name(), &path)?.clone();
        if let Some(endpoint) = &self.global.endpoint {
            profile.endpoint.clone_from(endpoint);
        }
        Ok(profile)
    }

    /// A client of the profile's controller.
    pub fn client(&self) -> Result<Client> {
        Client::new(&self.profile()?)
    }

    /// Whether to print JSON.
    pub fn json(&self) -> bool {
        self.global.output == Format::Json
    }

    /// Progress of a wait.
    pub fn progress(&self) -> Progress {
        Progress::new(self.global.quiet)
    }

    /// The time by this machine's clock; for ages on the screen and the default window of a bill, never for money.
    pub fn now(&self) -> Micros {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Micros(i64::try_from(since.as_micros()).unwrap_or(i64::MAX))
    }

    /// Sets what is said if the user interrupts from now on.
    pub fn on_interrupt(&self, note: impl Into<String>) {
        *self.interruption.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = note.into();
    }

    /// From now on signals go to the child program instead of ending the command.
    pub fn hand_on_signals(&self) {
        self.hands_on_signals.store(true, Ordering::Relaxed);
    }

    /// Returns true if the running command passes signals on.
    pub fn hands_on_signals(&self) -> bool {
        self.hands_on_signals.load(Ordering::Relaxed)
    }

    /// What to say now that the user has interrupted.
    pub fn interruption(&self) -> String {
        self.interruption.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    /// Where `key create` puts private keys: beside the configuration file, apart for every profile but the default
    /// one, since each account has key pairs of its own.
    pub fn key_file(&self, key_name: &str) -> Result<PathBuf> {
        if key_name.is_empty() || key_name.contains(['/', '\0']) || key_name.starts_with('.') {
            return Err(Error::parameter(format!(
                "key pair name {key_name:?} makes no file name: name the file with --out (or --key for ssh)"
            )));
        }
        let config = self.config_path()?;
        let mut folder = config.parent().map(|parent| parent.join("keys")).unwrap_or_else(|| "keys".into());
        if self.profile_name() != DEFAULT_PROFILE {
            folder.push(self.profile_name());
        }
        Ok(folder.join(format!("{key_name}.pem")))
    }
}
