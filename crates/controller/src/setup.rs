//! `init` and `agent-identity`: what is made once. Both may be run again and change nothing that is in use.

use crate::actions::new_account_rows;
use crate::auth::{AccessKey, Sealer, seal};
use crate::config::{AdminFile, Settings, StartError, StateDir, write_file};
use crate::engine::{Clock, Random, SystemClock, SystemRandom};
use crate::tls::Authority;
use http::Uri;
use jiff::tz::TimeZone;
use roost_store::{SqliteStore, Store};
use roost_types::api::Account;
use roost_types::{AccountId, HostId, ID_BYTES, Micros};
use serde::{Deserialize, Serialize};
use std::path::Path;
use zeroize::{Zeroize, Zeroizing};

const REGION: &str = "home-1";
const ZONE: &str = "home-1a";
const ENDPOINT: &str = "https://127.0.0.1:7443";
const AGENT_PORT: u16 = 7444;
const ADMIN: &str = "admin";

/// What `init` may be told; what is absent stays as it is, or gets its default.
#[derive(Debug, Clone, Default)]
pub struct InitOptions {
    /// Region.
    pub region: Option<String>,
    /// Zone.
    pub zone: Option<String>,
    /// Where clients will find the controller.
    pub endpoint: Option<String>,
    /// More names and addresses for the server certificate.
    pub names: Vec<String>,
}

fn today(now: Micros) -> (i32, u8, u8) {
    let date = jiff::Timestamp::from_microsecond(now.0).unwrap_or_default().to_zoned(TimeZone::UTC).date();
    (date.year().into(), date.month().unsigned_abs(), date.day().unsigned_abs())
}

/// Makes a controller's state directory, or completes one. Whatever exists is kept; the server certificate is made
/// anew when its names change.
///
/// # Errors
/// [`StartError`]: a value contradicts the existing state, a controller is running, or files are
/// missing or cannot be written.
pub fn init(state: &StateDir, options: &InitOptions) -> Result<AdminFile, StartError> {
    let (clock, random) = (SystemClock::new(), SystemRandom);
    state.lost_nothing()?;
    // A whole directory that shall stay as it is may belong to a running controller.
    if let (Some(before), Some(mut admin)) = (state.settings()?, state.read_json::<AdminFile>("admin.json")?)
        && settle(Some(&before), options)? == before
        && state.server().is_ok()
    {
        admin.secret_access_key.zeroize();
        return Ok(admin);
    }
    state.create()?;
    let _held = state.lock()?;
    let before = state.settings()?;
    let settings = settle(before.as_ref(), options)?;
    let today = today(clock.now());
    if state.read("ca-key.pem")?.is_none() {
        let ca = Authority::create(today)?;
        // The key last: where it is, its certificate is.
        state.write("ca.pem", ca.cert_pem.as_bytes(), false)?;
        state.write("ca-key.pem", ca.key_pem.as_bytes(), true)?;
    }
    let pair_there = state.read("server.pem")?.is_some() && state.read("server-key.pem")?.is_some();
    if !pair_there || before.as_ref().is_none_or(|before| before.names != settings.names) {
        let authority = Authority::load(&state.need("ca-key.pem")?)?;
        let server = authority.server(&settings.names, today)?;
        state.write("server.pem", server.cert_pem.as_bytes(), false)?;
        state.write("server-key.pem", server.key_pem.as_bytes(), true)?;
    }
    if state.read("sealing.key")?.is_none() {
        let mut key = Zeroizing::new([0; seal::KEY_BYTES]);
        random.fill(key.as_mut_slice());
        let text = Zeroizing::new(hex::encode(key.as_slice()));
        state.write("sealing.key", text.as_bytes(), true)?;
    }
    let sealer = Sealer::new(&*state.sealing_key()?);
    let store = SqliteStore::open(&state.database())?;
    let admin = first_account(state, &settings, &store, &sealer, &clock, &random)?;
    // Last: a directory with settings is a whole one.
    state.write_json("controller.json", &settings, false)?;
    Ok(admin)
}

fn settle(before: Option<&Settings>, options: &InitOptions) -> Result<Settings, StartError> {
    let keep = |what: &str, was: Option<&String>, wanted: Option<&String>, otherwise: &str| match (
        was, wanted,
    ) {
        (Some(was), Some(wanted)) if was != wanted => Err(StartError::Value(format!(
            "--{what} is {wanted:?}, but this state directory was made with {was:?}: what runs there says so"
        ))),
        (was, wanted) => Ok(was.or(wanted).map_or_else(|| otherwise.to_owned(), String::clone)),
    };
    let region = keep("region", before.map(|b| &b.region), options.region.as_ref(), REGION)?;
    let zone = keep("zone", before.map(|b| &b.zone), options.zone.as_ref(), ZONE)?;
    for (what, name) in [("region", &region), ("zone", &zone)] {
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        if !(1..=32).contains(&name.len()) || !name.bytes().all(plain) {
            let allowed = "allowed are 1 to 32 characters of a-z 0-9 -";
            return Err(StartError::Value(format!("--{what} is {name:?}, {allowed}")));
        }
    }
    let endpoint = options.endpoint.as_ref().or(before.map(|b| &b.endpoint));
    let endpoint = endpoint.map_or(ENDPOINT, String::as_str).trim_end_matches('/').to_owned();
    let mut names: Vec<String> = ["localhost", "127.0.0.1", "::1"].map(str::to_owned).into();
    names.push(host_of(&endpoint)?);
    names.extend(options.names.iter().cloned());
    names.extend(before.map(|b| b.names.clone()).unwrap_or_default());
    names.sort();
    names.dedup();
    Ok(Settings { region, zone, endpoint, names })
}

fn host_of(endpoint: &str) -> Result<String, StartError> {
    let uri = endpoint.parse::<Uri>().ok().filter(|uri| uri.scheme_str() == Some("https"));
    let host = uri.as_ref().filter(|uri| uri.path() == "/").and_then(Uri::host);
    host.map(|host| host.trim_matches(['[', ']']).to_owned()).ok_or_else(|| {
        StartError::Value(format!(
            "--endpoint is {endpoint:?}, expected https://NAME or https://NAME:PORT, such as {ENDPOINT}"
        ))
    })
}

/// The first account, and the file with its key. The file comes first: a key that only the database knows is lost.
fn first_account(
    state: &StateDir,
    settings: &Settings,
    store: &SqliteStore,
    sealer: &Sealer,
    clock: &dyn Clock,
    random: &dyn Random,
) -> Result<AdminFile, StartError> {
    let ca_pem = state.need("ca.pem")?.as_str().to_owned();
    let found: Option<AdminFile> = state.read_json("admin.json")?;
    let mut admin = if let Some(admin) = found {
        AdminFile { endpoint: settings.endpoint.clone(), ca_pem, region: settings.region.clone(), ..admin }
    } else {
        let existing = store.accounts()?.into_iter().find(|account| account.admin);
        let mut id = [0; 8];
        random.fill(&mut id);
        let key = AccessKey::generate(random);
        AdminFile {
            endpoint: settings.endpoint.clone(),
            ca_pem,
            region: settings.region.clone(),
            account_id: existing.map_or_else(|| AccountId::from_random(id), |account| account.account_id),
            access_key_id: key.id.clone(),
            secret_access_key: key.secret.as_str().to_owned(),
        }
    };
    state.write_json("admin.json", &admin, true)?;
    if store.access_key(&admin.access_key_id)?.is_none() {
        let key = AccessKey {
            id: admin.access_key_id.clone(),
            secret: Zeroizing::new(admin.secret_access_key.clone()),
        };
        let now = clock.now();
        let failed = |error: &dyn std::fmt::Display| StartError::Other(format!("the first account: {error}"));
        if store.account(&admin.account_id)?.is_some() {
            let row = key.seal(sealer, random, admin.account_id.clone(), now).map_err(|e| failed(&e))?;
            store.add_access_key(&row)?;
        } else {
            let account = Account {
                account_id: admin.account_id.clone(),
                name: ADMIN.to_owned(),
                admin: true,
                created_at: now,
            };
            let zones = [settings.zone.clone()];
            let rows = new_account_rows(account, &key, sealer, random, &settings.region, &zones);
            store.create_account(&rows.map_err(|e| failed(&e))?)?;
        }
    }
    // The caller prints where things are, never the secret.
    admin.secret_access_key.zeroize();
    Ok(admin)
}

/// What an agent is told about itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentIdentity {
    /// The host's id.
    pub host_id: HostId,
    /// The host's name.
    pub hostname: String,
    /// The zone it stands in.
    pub zone: String,
    /// Where its agent dials.
    pub controller_url: String,
}

/// Makes an agent's identity: its host id (kept, if there is one already), certificate and key.
///
/// # Errors
/// [`StartError`].
pub fn agent_identity(
    state: &StateDir,
    hostname: &str,
    zone: Option<&str>,
    controller: Option<&str>,
    out: &Path,
) -> Result<AgentIdentity, StartError> {
    let settings = state.made()?;
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    if !(1..=64).contains(&hostname.len()) || !hostname.bytes().all(plain) {
        return Err(StartError::Value(format!(
            "--hostname is {hostname:?}, allowed are 1 to 64 characters of a-z A-Z 0-9 . _ -"
        )));
    }
    if let Some(zone) = zone.filter(|zone| *zone != settings.zone) {
        return Err(StartError::Value(format!(
            "--zone is {zone:?}, but the one zone of this controller is {:?}",
            settings.zone
        )));
    }
    let folder = StateDir::new(out);
    folder.create()?;
    let before: Option<AgentIdentity> = folder.read_json("identity.json")?;
    let mut random = [0; ID_BYTES];
    SystemRandom.fill(&mut random);
    let default_url = format!("https://{}:{AGENT_PORT}", bracketed(&host_of(&settings.endpoint)?));
    let identity = AgentIdentity {
        host_id: before.as_ref().map_or_else(|| HostId::from_random(random), |b| b.host_id.clone()),
        hostname: hostname.to_owned(),
        zone: settings.zone.clone(),
        controller_url: controller
            .map(str::to_owned)
            .or(before.map(|b| b.controller_url))
            .unwrap_or(default_url),
    };
    host_of(&identity.controller_url)?;
    let authority = Authority::load(&state.need("ca-key.pem")?)?;
    let certificate = authority.agent(&identity.host_id, today(SystemClock::new().now()))?;
    write_file(&out.join("ca.pem"), state.need("ca.pem")?.as_bytes(), false)?;
    write_file(&out.join("cert.pem"), certificate.cert_pem.as_bytes(), false)?;
    write_file(&out.join("key.pem"), certificate.key_pem.as_bytes(), true)?;
    folder.write_json("identity.json", &identity, false)?;
    Ok(identity)
}

fn bracketed(host: &str) -> String {
    if host.contains(':') { format!("[{host}]") } else { host.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admin(state: &StateDir) -> AdminFile {
        state.read_json("admin.json").unwrap().unwrap()
    }

    #[test]
    fn init_makes_everything_and_again_keeps_it() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::new(dir.path().join("c"));
        init(&state, &InitOptions::default()).unwrap();
        let names = ["ca.pem", "ca-key.pem", "server.pem", "server-key.pem", "sealing.key", "admin.json"];
        let read = || names.map(|name| state.need(name).unwrap());
        let first = read();
        init(&state, &InitOptions::default()).unwrap();
        assert!(first == read());
        let running = state.lock().unwrap();
        init(&state, &InitOptions::default()).unwrap();
        let changed = InitOptions { names: vec!["roost.lan".into()], ..InitOptions::default() };
        assert!(matches!(init(&state, &changed), Err(StartError::Running { .. })));
        drop(running);
        assert_eq!(state.made().unwrap().region, "home-1");
        let store = SqliteStore::open(&state.database()).unwrap();
        assert_eq!(store.accounts().unwrap().len(), 1);
        let (row, account) = store.access_key(&admin(&state).access_key_id).unwrap().unwrap();
        assert!(account.admin);
        let sealer = Sealer::new(&state.sealing_key().unwrap());
        let secret = sealer.open(&row.access_key_id, &row.sealed_secret).unwrap();
        assert_eq!(secret.as_slice(), admin(&state).secret_access_key.as_bytes());
    }

    #[test]
    fn an_init_that_was_cut_short_is_completed() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::new(dir.path());
        init(&state, &InitOptions::default()).unwrap();
        let before = admin(&state);
        // As if it had ended right after writing the file: the account is missing, and so are the settings.
        std::fs::remove_file(state.path("controller.json")).unwrap();
        std::fs::remove_file(state.database()).unwrap();
        for side in ["roost.db-wal", "roost.db-shm"] {
            let _ = std::fs::remove_file(state.path(side));
        }
        drop(SqliteStore::open(&state.database()).unwrap());
        init(&state, &InitOptions::default()).unwrap();
        assert!(before == admin(&state));
        // As if the file were lost: the account gets another key, and stays the same account.
        std::fs::remove_file(state.path("admin.json")).unwrap();
        init(&state, &InitOptions::default()).unwrap();
        assert_eq!(before.account_id, admin(&state).account_id);
        assert_ne!(before.access_key_id, admin(&state).access_key_id);
    }

    #[test]
    fn another_endpoint_is_a_new_certificate_and_another_region_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::new(dir.path());
        init(&state, &InitOptions::default()).unwrap();
        let before = state.need("server.pem").unwrap();
        let moved = InitOptions { endpoint: Some("https://roost.lan:7443".into()), ..InitOptions::default() };
        init(&state, &moved).unwrap();
        assert!(before != state.need("server.pem").unwrap());
        assert!(state.made().unwrap().names.contains(&"roost.lan".to_owned()));
        assert_eq!(admin(&state).endpoint, "https://roost.lan:7443");
        let other = InitOptions { region: Some("elsewhere-1".into()), ..InitOptions::default() };
        let Err(error) = init(&state, &other) else { panic!("accepted") };
        assert!(error.to_string().contains("elsewhere-1") && error.to_string().contains("home-1"), "{error}");
        for bad in ["http://x", "roost.lan", "https://", "https://x/path"] {
            let options = InitOptions { endpoint: Some(bad.into()), ..InitOptions::default() };
            let Err(error) = init(&state, &options) else { panic!("{bad}") };
            assert_eq!(error.exit_code(), 3, "{bad}");
        }
    }

    #[test]
    fn whatever_half_is_left_nothing_new_is_made_beside_it_and_the_missing_file_is_named() {
        for lost in ["ca.pem", "ca-key.pem", "sealing.key", "roost.db"] {
            for more in [None, Some("controller.json"), Some("admin.json")] {
                let dir = tempfile::tempdir().unwrap();
                let state = StateDir::new(dir.path());
                init(&state, &InitOptions::default()).unwrap();
                for name in [Some(lost), more].into_iter().flatten() {
                    std::fs::remove_file(state.path(name)).unwrap();
                }
                for error in [
                    init(&state, &InitOptions::default()).err().expect("no new identity"),
                    state.made().expect_err("no start"),
                ] {
                    let text = error.to_string();
                    assert!(matches!(error, StartError::Half { .. }), "{lost}: {text}");
                    assert!(text.contains(lost) && text.contains("roost-controller restore"), "{text}");
                }
                assert!(!state.path(lost).exists(), "{lost} was made anew");
            }
        }
        // Settings of a controller that has served are not guessed either.
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::new(dir.path());
        init(&state, &InitOptions::default()).unwrap();
        std::fs::remove_file(state.path("controller.json")).unwrap();
        std::fs::create_dir(state.path("blobs")).unwrap();
        assert!(matches!(init(&state, &InitOptions::default()), Err(StartError::Half { .. })));
    }

    #[test]
    fn a_lost_server_certificate_is_made_again_by_init() {
        for lost in ["server.pem", "server-key.pem"] {
            let dir = tempfile::tempdir().unwrap();
            let state = StateDir::new(dir.path());
            init(&state, &InitOptions::default()).unwrap();
            std::fs::remove_file(state.path(lost)).unwrap();
            init(&state, &InitOptions::default()).unwrap();
            assert!(state.server().is_ok(), "{lost}");
        }
    }

    #[test]
    fn an_agents_identity_keeps_its_host_id() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::new(dir.path().join("c"));
        init(&state, &InitOptions::default()).unwrap();
        let out = dir.path().join("a");
        let first = agent_identity(&state, "box-1", None, None, &out).unwrap();
        assert_eq!(first.controller_url, "https://127.0.0.1:7444");
        let again = agent_identity(&state, "box-1", None, Some("https://[::1]:9"), &out).unwrap();
        assert_eq!((again.host_id, again.controller_url.as_str()), (first.host_id, "https://[::1]:9"));
        for file in ["identity.json", "cert.pem", "key.pem", "ca.pem"] {
            assert!(out.join(file).exists(), "{file}");
        }
        assert!(agent_identity(&state, "a b", None, None, &out).is_err());
        assert!(agent_identity(&state, "box-1", Some("mars-1a"), None, &out).is_err());
    }
}
