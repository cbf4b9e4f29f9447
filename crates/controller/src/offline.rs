//! The usage log, and bills computed from it, without a running controller. The database is opened
//! read-only, so a controller may run on it. A schema of another release is refused and never
//! changed.

use crate::config::{StartError, StateDir, file_error};
use roost_billing::PriceBook;
use roost_store::{SqliteStore, Store, UsageFilter};
use roost_types::api::BillBy;
use roost_types::metering::{Proofs, UsageEvent};
use roost_types::{AccountId, Micros};
use serde::Serialize;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Which bill to compute.
#[derive(Debug, Clone)]
pub struct RecomputeOptions {
    /// From here; the beginning of the month of `until` if absent.
    pub since: Option<Micros>,
    /// Up to here; just after the last moment that the log knows of if absent.
    pub until: Option<Micros>,
    /// Grouping.
    pub by: BillBy,
    /// Only this account's.
    pub account: Option<AccountId>,
    /// Prices, in place of the built-in ones.
    pub prices: Option<PathBuf>,
}

/// Writes the usage log, one JSON object a line, in the order it was written.
///
/// # Errors
/// [`StartError`].
pub fn export_usage_log(state: &StateDir, mut out: impl Write) -> Result<(), StartError> {
    let (events, _) = read(state, None)?;
    events.iter().try_for_each(|event| line(&mut out, event))?;
    finish(out.flush())
}

/// Computes a bill and writes it as one line of JSON. No clock is read: the same log and options, the same bytes.
///
/// # Errors
/// [`StartError`].
pub fn recompute_bill(
    state: &StateDir,
    options: &RecomputeOptions,
    mut out: impl Write,
) -> Result<(), StartError> {
    let (events, proofs) = read(state, options.account.clone())?;
    let book = match &options.prices {
        Some(path) => {
            let text = std::fs::read_to_string(path).map_err(file_error(path))?;
            PriceBook::parse(&text).map_err(|source| StartError::Prices { path: path.clone(), source })?
        }
        None => PriceBook::builtin(),
    };
    let until = options.until.unwrap_or_else(|| just_after_last(&events, &proofs));
    let since = options.since.unwrap_or_else(|| roost_billing::month_start(until));
    let bill = roost_billing::bill(&events, &proofs, &book, (since, until), options.by, until);
    line(&mut out, &bill)?;
    finish(out.flush())
}

fn read(state: &StateDir, account_id: Option<AccountId>) -> Result<(Vec<UsageEvent>, Proofs), StartError> {
    let path = state.database();
    if !path.exists() {
        // A missing database is reported as missing.
        state.made()?;
        return Err(StartError::Unusable { path, detail: "there is no database".to_owned() });
    }
    let store = SqliteStore::open_read_only(&path)?;
    Ok((store.usage_events(&UsageFilter { account_id, resource: None })?, store.proofs()?))
}

fn just_after_last(events: &[UsageEvent], proofs: &Proofs) -> Micros {
    let moments = events.iter().map(|event| event.at).chain(proofs.values().copied());
    Micros(moments.max().unwrap_or_default().0.saturating_add(1))
}

fn line(out: &mut impl Write, value: &impl Serialize) -> Result<(), StartError> {
    let text = serde_json::to_string(value).map_err(|error| StartError::Other(error.to_string()))?;
    finish(writeln!(out, "{text}"))
}

fn finish(result: io::Result<()>) -> Result<(), StartError> {
    result.map_err(file_error(Path::new("standard output")))
}
