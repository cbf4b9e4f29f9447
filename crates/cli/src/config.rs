//! Profiles: where a controller is and what to sign with. One TOML file, readable by its owner only.
//!
//! ```toml
//! [profiles.default]
//! endpoint = "https://127.0.0.1:7443"
//! region = "home-1"
//! access_key_id = "AKIA…"
//! secret_access_key = "…"
//! ca_pem = """-----BEGIN CERTIFICATE-----…"""
//! ```

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, Permissions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// The profile that is used when none is named.
pub const DEFAULT_PROFILE: &str = "default";

/// One profile.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// `https://HOST:PORT` of the controller.
    pub endpoint: String,
    /// Its region; part of every signature.
    pub region: String,
    /// `AKIA…`.
    pub access_key_id: String,
    /// 40 characters; never shown.
    pub secret_access_key: String,
    /// The only certificates that are trusted, as PEM.
    pub ca_pem: String,
    /// The account, where it is known; for people only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub account_id: Option<String>,
}

impl fmt::Debug for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Profile")
            .field("endpoint", &self.endpoint)
            .field("access_key_id", &self.access_key_id)
            .finish_non_exhaustive()
    }
}

/// The file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// By name.
    #[serde(default)]
    pub profiles: BTreeMap<String, Profile>,
}

impl Config {
    /// Reads the file; a missing one is an empty one.
    pub fn load(path: &Path) -> Result<Config> {
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Config::default()),
            Err(source) => return Err(Error::File { action: "read", path: path.into(), source }),
        };
        toml::from_str(&text).map_err(|error| {
            // The source line may hold a secret: say where and what, not the line.
            let at =
                error.span().map_or(0, |span| text[..span.start.min(text.len())].matches('\n').count() + 1);
            Error::Usage(format!(
                "{}, line {at}: {}; mend it, or move it away and run `roost configure`",
                path.display(),
                error.message()
            ))
        })
    }

    /// Writes the file, readable by its owner only, at once or not at all.
    pub fn save(&self, path: &Path) -> Result<()> {
        let text = toml::to_string(self).map_err(|error| Error::Internal(error.to_string()))?;
        write_private(path, text.as_bytes(), true)
    }

    /// The profile of this name.
    pub fn profile(&self, name: &str, path: &Path) -> Result<&Profile> {
        self.profiles.get(name).ok_or_else(|| {
            let have = self.profiles.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
            let have = if have.is_empty() { "it has none".to_owned() } else { format!("it has {have}") };
            Error::NoCredentials(format!("there is no profile {name:?} in {}: {have}", path.display()))
        })
    }
}

/// A profile's name is also a folder's name.
pub fn check_profile_name(name: &str) -> Result<()> {
    let fine = !name.is_empty()
        && name.len() <= 64
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
        && !name.starts_with('.');
    if fine {
        return Ok(());
    }
    Err(Error::parameter(format!(
        "profile name {name:?} is not allowed: give 1 to 64 characters of a-z A-Z 0-9 . _ -, not beginning with a dot"
    )))
}

/// Returns the folder that an environment variable names, if it is absolute: an empty or relative
/// path counts as unset.
pub fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute())
}

/// Where the file is unless `--config` or ROOST_CONFIG says otherwise.
pub fn default_path() -> Result<PathBuf> {
    let base = variable("XDG_CONFIG_HOME").or_else(|| variable("HOME").map(|home| home.join(".config")));
    base.map(|base| base.join("roost/config.toml"))
        .ok_or_else(|| Error::Usage("HOME is not set: name the configuration file with --config".to_owned()))
}

/// Writes a file of mode 0600 by way of a temporary one beside it.
pub fn write_private(path: &Path, bytes: &[u8], replace: bool) -> Result<()> {
    let failed = |source| Error::File { action: "write", path: path.into(), source };
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !folder.exists() {
        fs::create_dir_all(folder).map_err(failed)?;
        fs::set_permissions(folder, Permissions::from_mode(0o700)).map_err(failed)?;
    }
    // Made with mode 0600 from its first moment.
    let mut file = tempfile::NamedTempFile::new_in(folder).map_err(failed)?;
    file.write_all(bytes).map_err(failed)?;
    file.as_file().sync_all().map_err(failed)?;
    if replace {
        file.persist(path).map_err(|error| failed(error.error))?;
    } else {
        file.persist_noclobber(path).map_err(|error| failed(error.error))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile() -> Profile {
        Profile {
            endpoint: "https://127.0.0.1:7443".into(),
            region: "home-1".into(),
            access_key_id: "AKIAIOSFODNN7EXAMPLE".into(),
            secret_access_key: "hush".into(),
            ca_pem: "-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n".into(),
            account_id: None,
        }
    }

    #[test]
    fn a_saved_file_reads_back_and_only_its_owner_may() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/config.toml");
        let config = Config { profiles: BTreeMap::from([("default".to_owned(), profile())]) };
        config.save(&path).unwrap();
        assert_eq!(Config::load(&path).unwrap(), config);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_broken_file_is_named_by_line_and_never_shown() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.toml");
        fs::write(&path, "[profiles.a]\nsecret_access_key = 'hush\n").unwrap();
        let error = Config::load(&path).unwrap_err();
        assert!(error.to_string().contains("line 2"), "{error}");
        assert!(!error.to_string().contains("hush"), "{error}");
        assert_eq!(error.exit_code(), 2);
    }

    #[test]
    fn a_missing_profile_says_which_there_are() {
        let config = Config { profiles: BTreeMap::from([("home".to_owned(), profile())]) };
        let error = config.profile("work", Path::new("/c.toml")).unwrap_err();
        assert_eq!(error.to_string(), "there is no profile \"work\" in /c.toml: it has home");
        assert_eq!(error.exit_code(), 4);
    }

    #[test]
    fn a_private_file_is_not_overwritten_unless_meant() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key.pem");
        write_private(&path, b"one", false).unwrap();
        assert!(write_private(&path, b"two", false).is_err());
        assert_eq!(fs::read(&path).unwrap(), b"one");
    }

    #[test]
    fn a_profile_does_not_show_its_secret() {
        assert!(!format!("{:?}", profile()).contains("hush"));
    }
}
