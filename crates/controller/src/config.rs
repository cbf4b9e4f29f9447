//! The controller's state directory: what lies where in it, and how programs fail on it.
//!
//! ```text
//! DIR (0700)/controller.json   region, zone, endpoint, names in the server certificate
//!            admin.json  0600  the first account's access key, for `roost configure --from`
//!            ca.pem, ca-key.pem 0600, server.pem, server-key.pem 0600
//!            sealing.key 0600  opens the secrets in the database
//!            roost.db          the database
//!            blobs/            uploaded files
//!            lock              held by the running controller
//! ```
//! `init` makes them in the order of [`MADE`]. A directory that has a later file without an earlier
//! one has lost data. No code makes a new identity in such a directory.

use crate::auth::seal::KEY_BYTES;
use crate::tls::{Identity, TlsError};
use roost_billing::PriceError;
use roost_store::StoreError;
use roost_types::instance_type::CatalogueError;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use zeroize::Zeroizing;

/// Small files of the directory that cannot be made again, and whether each is for its owner only.
/// Together with the database and `blobs/` they are the controller's whole state.
pub const FILES: [(&str, bool); 7] = [
    ("ca.pem", false),
    ("ca-key.pem", true),
    ("server.pem", false),
    ("server-key.pem", true),
    ("sealing.key", true),
    ("admin.json", true),
    ("controller.json", false),
];
/// The database, in the directory.
pub const DATABASE: &str = "roost.db";
/// The folder of uploaded files, in the directory.
pub const BLOBS: &str = "blobs";

/// Files of a controller's directory in the order of creation. The flag marks a file that `init`
/// must not make again if later ones exist.
const MADE: [(&str, bool); 9] = [
    ("ca.pem", true),
    ("ca-key.pem", true),
    // The authority can issue another one.
    ("server.pem", false),
    ("server-key.pem", false),
    ("sealing.key", true),
    (DATABASE, true),
    // The first account can get another key.
    ("admin.json", false),
    ("controller.json", true),
    (BLOBS, false),
];

/// Why the program ends with an error. Each class has its exit code.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The state directory was not made yet.
    #[error("{0} is no controller's state directory: make one with `roost-controller init --state-dir {0}`")]
    NotInitialized(PathBuf),
    /// The state directory has lost files that only a backup has.
    #[error(
        "{dir} holds half of a controller: {} missing. Restore all of it from a backup: move {dir} away, then \
         `roost-controller restore FILE --state-dir {dir}`. (Only to give up every account, instance and agent that it \
         knew: move {dir} away, then `roost-controller init`)",
        missing(lost)
    )]
    Half {
        /// The state directory.
        dir: PathBuf,
        /// Missing files.
        lost: Vec<&'static str>,
    },
    /// A value that was given is not allowed.
    #[error("{0}")]
    Value(String),
    /// A file that should be there or make sense is not or does not.
    #[error("cannot use {path}: {detail}")]
    Unusable {
        /// The file.
        path: PathBuf,
        /// Why.
        detail: String,
    },
    /// A file cannot be read or written.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The instance types are not valid.
    #[error("{path}: {source}")]
    Types {
        /// The file.
        path: PathBuf,
        /// Why.
        source: CatalogueError,
    },
    /// The prices are not valid.
    #[error("{path}: {source}")]
    Prices {
        /// The file.
        path: PathBuf,
        /// Why.
        source: PriceError,
    },
    /// Another controller has the state directory.
    #[error("another controller (process {pid}) runs on {dir}: stop it first, or use another --state-dir")]
    Running {
        /// The state directory.
        dir: PathBuf,
        /// The other's process id.
        pid: String,
    },
    /// An address cannot be listened on.
    #[error("cannot listen on {address}: {source}; choose another address with {flag}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The flag that sets it.
        flag: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The database cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Certificates cannot be made or used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Anything else.
    #[error("{0}")]
    Other(String),
}

impl StartError {
    /// The exit code of the error's class; `roost-controller --help` lists them.
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::Other(_) | Self::File { .. } => 1,
            Self::NotInitialized(_)
            | Self::Half { .. }
            | Self::Value(_)
            | Self::Unusable { .. }
            | Self::Types { .. }
            | Self::Prices { .. }
            | Self::Tls(_) => 3,
            Self::Running { .. } => 4,
            Self::Listen { .. } => 5,
            Self::Store(_) => 6,
        }
    }
}

fn missing(lost: &[&str]) -> String {
    format!("{} {}", lost.join(", "), if lost.len() == 1 { "is" } else { "are" })
}

/// What was chosen when the controller was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Its region.
    pub region: String,
    /// Its first zone.
    pub zone: String,
    /// Where clients find it, such as `https://127.0.0.1:7443`.
    pub endpoint: String,
    /// Names and addresses in its server certificate.
    pub names: Vec<String>,
}

/// The first account's access key, as `roost configure --from` reads it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdminFile {
    /// Where the controller is.
    pub endpoint: String,
    /// The authority's certificate.
    pub ca_pem: String,
    /// Region.
    pub region: String,
    /// The account.
    pub account_id: roost_types::AccountId,
    /// Its access key.
    pub access_key_id: String,
    /// That key's secret.
    pub secret_access_key: String,
}

/// A controller's state directory.
#[derive(Debug, Clone)]
pub struct StateDir {
    dir: PathBuf,
}

impl StateDir {
    /// The directory at a path, which need not exist.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    /// Makes the directory, for its owner only.
    ///
    /// # Errors
    /// [`StartError::File`].
    pub fn create(&self) -> Result<(), StartError> {
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.dir);
        made.map_err(file_error(&self.dir))
    }

    /// A file in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The directory itself.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The database.
    pub fn database(&self) -> PathBuf {
        self.path(DATABASE)
    }

    /// Checks that no file is missing whose successors exist. The check passes for a complete
    /// directory, for an empty one, and after an interrupted `init`.
    ///
    /// # Errors
    /// [`StartError::Half`].
    pub fn lost_nothing(&self) -> Result<(), StartError> {
        let there = |name: &str| self.path(name).exists();
        let newest = MADE.iter().rposition(|(name, _)| there(name)).unwrap_or(0);
        let earlier = MADE.iter().take(newest);
        let lost: Vec<_> =
            earlier.filter(|(name, keep)| *keep && !there(name)).map(|(name, _)| *name).collect();
        if lost.is_empty() { Ok(()) } else { Err(StartError::Half { dir: self.dir.clone(), lost }) }
    }

    /// Settings, if the controller was made.
    ///
    /// # Errors
    /// [`StartError::Unusable`] or [`StartError::File`].
    pub fn settings(&self) -> Result<Option<Settings>, StartError> {
        self.read_json("controller.json")
    }

    /// Settings of a controller that was made.
    ///
    /// # Errors
    /// [`StartError::NotInitialized`] if `init` never completed, [`StartError::Half`] if files are
    /// missing.
    pub fn made(&self) -> Result<Settings, StartError> {
        let settings = self.settings()?;
        self.lost_nothing()?;
        settings.ok_or_else(|| StartError::NotInitialized(self.dir.clone()))
    }

    /// Reads a text file, if it is there.
    ///
    /// # Errors
    /// [`StartError::File`].
    pub fn read(&self, name: &str) -> Result<Option<Zeroizing<String>>, StartError> {
        match std::fs::read_to_string(self.path(name)) {
            Ok(text) => Ok(Some(Zeroizing::new(text))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(file_error(&self.path(name))(error)),
        }
    }

    /// Reads a text file that must be there.
    ///
    /// # Errors
    /// [`StartError::Unusable`] if it is not.
    pub fn need(&self, name: &str) -> Result<Zeroizing<String>, StartError> {
        self.read(name)?.ok_or_else(|| StartError::Unusable {
            path: self.path(name),
            detail: "it is missing: run `roost-controller init` again, which completes the directory"
                .to_owned(),
        })
    }

    /// Reads a JSON file, if it is there.
    ///
    /// # Errors
    /// [`StartError::Unusable`] if it does not make sense.
    pub fn read_json<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, StartError> {
        let Some(text) = self.read(name)? else { return Ok(None) };
        serde_json::from_str(&text)
            .map(Some)
            .map_err(|error| StartError::Unusable { path: self.path(name), detail: error.to_string() })
    }

    /// Writes a JSON file.
    ///
    /// # Errors
    /// [`StartError::File`].
    pub fn write_json(&self, name: &str, value: &impl Serialize, secret: bool) -> Result<(), StartError> {
        let text =
            serde_json::to_string_pretty(value).map_err(|error| StartError::Other(error.to_string()))?;
        let text = Zeroizing::new(text + "\n");
        self.write(name, text.as_bytes(), secret)
    }

    /// Writes a file: the old one or the new one is there at any time, whole.
    ///
    /// # Errors
    /// [`StartError::File`].
    pub fn write(&self, name: &str, bytes: &[u8], secret: bool) -> Result<(), StartError> {
        write_file(&self.path(name), bytes, secret)
    }

    /// The server certificate and its key.
    ///
    /// # Errors
    /// [`StartError::Unusable`] if one is missing.
    pub fn server(&self) -> Result<Identity, StartError> {
        let (cert, key) = (self.need("server.pem")?, self.need("server-key.pem")?);
        Ok(Identity { cert_pem: cert.as_str().to_owned(), key_pem: key.as_str().to_owned() })
    }

    /// The key that opens the secrets in the database.
    ///
    /// # Errors
    /// [`StartError::Unusable`] if it is missing or of the wrong length.
    pub fn sealing_key(&self) -> Result<Zeroizing<[u8; KEY_BYTES]>, StartError> {
        let path = self.path("sealing.key");
        let mut key = Zeroizing::new([0; KEY_BYTES]);
        let unusable = |detail: String| StartError::Unusable { path: path.clone(), detail };
        let text = self.read("sealing.key")?.ok_or_else(|| {
            unusable("it is missing: without it no access key opens; restore it from a backup".to_owned())
        })?;
        hex::decode_to_slice(text.trim(), key.as_mut_slice())
            .map_err(|_| unusable(format!("expected {} hexadecimal digits", 2 * KEY_BYTES)))?;
        Ok(key)
    }

    /// Holds the directory against other controllers, as long as the answer lives.
    ///
    /// # Errors
    /// [`StartError::Running`] if another holds it.
    pub fn lock(&self) -> Result<File, StartError> {
        let path = self.path("lock");
        let mut options = OpenOptions::new();
        let opened = options.read(true).write(true).create(true).truncate(false).mode(0o600).open(&path);
        let mut file = opened.map_err(file_error(&path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut pid = String::new();
                let _ = file.read_to_string(&mut pid);
                let pid = if pid.trim().is_empty() { "unknown".to_owned() } else { pid.trim().to_owned() };
                return Err(StartError::Running { dir: self.dir.clone(), pid });
            }
            Err(TryLockError::Error(error)) => return Err(file_error(&path)(error)),
        }
        let noted = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
        noted.map_err(file_error(&path))?;
        Ok(file)
    }
}

/// Writes a file: the old one or the new one is there at any time, whole; a secret one for its owner only.
///
/// # Errors
/// [`StartError::File`].
pub fn write_file(path: &Path, bytes: &[u8], secret: bool) -> Result<(), StartError> {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let new = PathBuf::from(new);
    let write = || {
        let mode = if secret { 0o600 } else { 0o644 };
        // An unfinished file of an earlier try could have another mode.
        match std::fs::remove_file(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&new)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&new, path)?;
        File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
    };
    write().map_err(file_error(path))
}

/// An error about a file, with its path.
pub fn file_error(path: &Path) -> impl Fn(io::Error) -> StartError + use<> {
    let path = path.to_owned();
    move |source| StartError::File { path: path.clone(), source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_second_controller_on_the_same_directory_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::new(dir.path());
        let held = state.lock().unwrap();
        let error = state.lock().unwrap_err();
        assert_eq!(error.exit_code(), 4);
        let text = error.to_string();
        assert!(text.contains(&std::process::id().to_string()), "{text}");
        assert!(text.contains(dir.path().to_str().unwrap()), "{text}");
        drop(held);
        assert!(state.lock().is_ok());
    }

    #[test]
    fn secrets_are_for_their_owner_only() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::new(dir.path().join("state"));
        state.create().unwrap();
        state.write("key", b"hush", true).unwrap();
        state.write("key", b"hush again", true).unwrap();
        let mode = |path: PathBuf| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(state.path("key")), 0o600);
        assert_eq!(mode(dir.path().join("state")), 0o700);
        assert_eq!(state.need("key").unwrap().as_str(), "hush again");
    }

    #[test]
    fn what_is_missing_or_broken_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::new(dir.path());
        assert!(state.made().unwrap_err().to_string().contains("roost-controller init"));
        state.write("controller.json", b"{\"region\":1}", false).unwrap();
        assert!(state.made().unwrap_err().to_string().contains("controller.json"));
        state.write("sealing.key", b"abc", true).unwrap();
        assert!(state.sealing_key().unwrap_err().to_string().contains("64 hexadecimal digits"));
    }
}
