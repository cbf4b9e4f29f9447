//! The folder of one virtual host, and where caches and state live.

use super::{Error, Result};
use std::collections::BTreeMap;
use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// `$XDG_CACHE_HOME/roost`: what can be built again.
pub(super) fn cache_dir() -> PathBuf {
    base("XDG_CACHE_HOME", ".cache")
}

/// `$XDG_STATE_HOME/roost`: what cannot.
pub(super) fn state_dir() -> PathBuf {
    base("XDG_STATE_HOME", ".local/state")
}

fn base(variable: &str, below_home: &str) -> PathBuf {
    match env::var_os(variable) {
        Some(dir) if !dir.is_empty() => PathBuf::from(dir),
        _ => PathBuf::from(env::var_os("HOME").unwrap_or_else(|| "/root".into())).join(below_home),
    }
    .join("roost")
}

/// Creates a folder that only its owner may enter.
pub(super) fn private_dir(path: &Path) -> Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(Error::file("cannot create", path))
}

/// One virtual host's folder: data disk, console, identity, and the record of the running process.
#[derive(Debug, Clone)]
pub(super) struct Seat {
    pub dir: PathBuf,
}

impl Seat {
    pub fn of(name: &str) -> Self {
        Self { dir: state_dir().join("virtual-hosts").join(name) }
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Held while a start or stop is under way, so that two of them never meet.
    pub fn lock(&self) -> Result<File> {
        private_dir(&self.dir)?;
        let path = self.file("lock");
        let file = File::options()
            .create(true)
            .append(true)
            .open(&path)
            .map_err(Error::file("cannot open", &path))?;
        file.lock().map_err(Error::file("cannot lock", &path))?;
        Ok(file)
    }

    /// `key=value` lines, written whole or not at all.
    pub fn write_record(&self, record: &BTreeMap<String, String>) -> Result<()> {
        let text: String = record.iter().map(|(key, value)| format!("{key}={value}\n")).collect();
        let (new, path) = (self.file("record.new"), self.file("record"));
        fs::write(&new, text).map_err(Error::file("cannot write", &new))?;
        fs::rename(&new, &path).map_err(Error::file("cannot write", &path))
    }

    pub fn read_record(&self) -> Option<BTreeMap<String, String>> {
        let text = fs::read_to_string(self.file("record")).ok()?;
        Some(
            text.lines()
                .filter_map(|line| line.split_once('='))
                .map(|(k, v)| (k.to_owned(), v.to_owned()))
                .collect(),
        )
    }

    /// The end of a text file in this folder, for error messages.
    pub fn tail(&self, name: &str, lines: usize) -> String {
        let bytes = fs::read(self.file(name)).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        let all: Vec<&str> = text.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::Seat;
    use std::process::Command;

    #[test]
    fn the_scripts_name_the_same_folder() {
        let common = super::super::repository_root().join("scripts/lib/common.sh");
        let script = format!(". '{}' && virtual_host_dir main", common.display());
        let output = Command::new("bash").args(["-c", &script]).output().expect("bash runs");
        assert_eq!(
            String::from_utf8_lossy(&output.stdout).trim(),
            Seat::of("main").dir.display().to_string()
        );
    }
}
