//! What an agent remembers of an instance, in two files below `instances/<id>/`:
//!
//! | file | written by | holds |
//! |---|---|---|
//! | `spec.json` | whoever takes in `ensure` | the newest accepted `ensure`, durable *before* anything acts on it |
//! | `run.json` | the instance's own task | what became of the incarnation at hand |
//!
//! Each file states the version of its format (`"v"`). A file of an older version is migrated when
//! it is read. A damaged file, or one of a newer version, moves its whole folder to
//! `quarantine/<id>/`. No task acts on a quarantined instance until a person restores it; all other
//! instances continue.
//!
//! The refusal rules are pure: [`verdict`].

use crate::error::Result;
use crate::names::Folders;
use crate::{durable, error::Error};
use roost_types::UserDataForm;
use roost_types::agent::{Ensure, InstanceSpec, StateReason, TimedPart};
use roost_types::ids::InstanceId;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The version of the records that this agent writes.
///
/// | version | what changed |
/// |---|---|
/// | 1 | without a `"v"` |
/// | 2 | `"v"`; a run says whether its volume was made and since when a reboot lasts |
pub const VERSION: u64 = 2;

/// An `ensure` that was accepted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accepted {
    /// What was asked.
    pub ensure: Ensure,
    /// [`spec_hash`] of its spec.
    pub spec_hash: String,
    /// The instance's number on this host: its user id is the base plus this.
    pub slot: u32,
}

impl Accepted {
    /// The instance.
    pub const fn id(&self) -> &InstanceId {
        &self.ensure.instance_id
    }

    /// What to make of it.
    pub const fn spec(&self) -> &InstanceSpec {
        &self.ensure.spec
    }
}

/// SHA-256 over the spec's JSON, as hex, without `root_bytes`: an older controller does not send
/// that field, and the hash must not change.
pub fn spec_hash(spec: &InstanceSpec) -> String {
    let mut spec = spec.clone();
    spec.image.root_bytes = None;
    hash_of(&spec)
}

/// SHA-256 over the JSON of anything, as hex.
pub fn hash_of<T: Serialize>(value: &T) -> String {
    // Types of ours have string keys only, so that they always serialize.
    let bytes = serde_json::to_vec(value).unwrap_or_default();
    hex::encode(Sha256::digest(bytes))
}

/// What to do with an `ensure`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The very one that is already accepted.
    Same,
    /// A newer one.
    Accept,
    /// Refused, with the reason for the report.
    Refuse(String),
}

/// The rule: a newer generation is accepted, an older one refused, and so is another spec under the same one.
pub fn verdict(current: Option<&Accepted>, new: &Ensure) -> Verdict {
    let Some(current) = current else { return Verdict::Accept };
    let (have, got) = (current.ensure.generation, new.generation);
    if got < have {
        return Verdict::Refuse(format!(
            "generation {got} is older than {have}, which this host has accepted"
        ));
    }
    if got > have {
        return Verdict::Accept;
    }
    if spec_hash(&new.spec) == current.spec_hash {
        Verdict::Same
    } else {
        Verdict::Refuse(format!(
            "generation {got} came with another spec before; a change needs a new generation"
        ))
    }
}

/// A monitor process, told apart from any later process with its number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MonitorId {
    /// Process id.
    pub pid: i32,
    /// Field 22 of `/proc/<pid>/stat`: clock ticks from boot to its start.
    pub start_ticks: u64,
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// CLOCK_BOOTTIME of this run's boot, nanoseconds; `None` when no one saw it.
    pub at_ns: Option<u64>,
    /// Why; `None` when it was asked for.
    pub reason: Option<StateReason>,
    /// It never ran, or could not be made to run.
    pub failed: bool,
}

/// What became of one incarnation.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// Which.
    pub incarnation: u64,
    /// The host's boot that all times here belong to.
    pub boot_id: String,
    /// Its monitor, recorded before it may run vCPUs.
    pub monitor: Option<MonitorId>,
    /// Monitors that ended before vCPUs ran.
    pub failed_starts: u32,
    /// Reboots done, out of `spec.reboots`.
    pub reboots_done: u64,
    /// When vCPUs first ran, nanoseconds of CLOCK_BOOTTIME.
    pub began_ns: Option<u64>,
    /// How it ended.
    pub ended: Option<Ended>,
    /// When an agent last saw it alive.
    pub last_seen_ns: Option<u64>,
    /// Where in the console's stream this incarnation begins.
    pub console_from: u64,
    /// The guest said that it is ready.
    pub guest_ready: bool,
    /// The guest's host key, kept over incarnations.
    pub ssh_host_key: Option<String>,
    /// User data that the guest did not run. The value belongs to the instance, as user data does.
    #[serde(default)]
    pub user_data_not_run: Option<UserDataForm>,
    /// CPU time at the end, microseconds.
    pub cpu_usage_us: Option<u64>,
    /// Parts of the latest start.
    pub timing: Vec<TimedPart>,
    /// When a reboot took the monitor down; `None` once the next monitor's vCPUs run.
    pub restart_ns: Option<u64>,
    /// Set once the root volume was made: a monitor may have written to it. Kept across
    /// incarnations.
    pub volume_made: bool,
}

impl Run {
    /// Creates the run of a new incarnation. The host key and the volume's mark stay: the disk
    /// keeps both.
    pub fn begin(spec: &InstanceSpec, boot_id: &str, before: &Run) -> Self {
        Self {
            incarnation: spec.incarnation,
            boot_id: boot_id.to_owned(),
            // Reboots that were asked for before it began are done by its start.
            reboots_done: spec.reboots,
            ssh_host_key: before.ssh_host_key.clone(),
            user_data_not_run: before.user_data_not_run,
            volume_made: before.volume_made,
            ..Self::default()
        }
    }

    /// Whether it ran and has not ended.
    pub const fn is_open(&self) -> bool {
        self.began_ns.is_some() && self.ended.is_none()
    }
}

/// A record with the version of its format.
#[derive(Serialize)]
struct Stored<'a, T> {
    v: u64,
    #[serde(flatten)]
    record: &'a T,
}

/// Reads a record. `forward` migrates one of an older version. Returns `None` if the file does not
/// exist.
fn read<T: DeserializeOwned>(path: &Path, forward: fn(u64, &mut Value)) -> Result<Option<T>> {
    let Some(mut value) = durable::read_json::<Value>(path)? else { return Ok(None) };
    let version = value.get("v").map_or(Some(1), Value::as_u64);
    let Some(version) = version.filter(|version| (1..=VERSION).contains(version)) else {
        return Err(Error::NotNow(format!(
            "{path:?} has the form {}, and this agent reads 1 to {VERSION}: a newer agent wrote it, or it is damaged",
            value.get("v").unwrap_or(&Value::Null)
        )));
    };
    forward(version, &mut value);
    serde_json::from_value(value).map(Some).map_err(|source| Error::Damaged { path: path.to_owned(), source })
}

/// Migrates a run of an older version.
fn run_from(version: u64, run: &mut Value) {
    let Some(run) = run.as_object_mut().filter(|_| version < 2) else { return };
    let began = run.get("began_ns").is_some_and(Value::is_u64);
    let again = run.get("incarnation").and_then(Value::as_u64) > Some(1);
    let rebooting = began && run.get("ended").is_none_or(Value::is_null);
    let monitor = run.get("monitor").is_some_and(Value::is_object);
    // A volume whose monitor never ran holds no writes yet.
    run.insert("volume_made".into(), (began || again || monitor).into());
    let since = run.get("last_seen_ns").cloned().filter(|_| rebooting && !monitor).unwrap_or_default();
    run.insert("restart_ns".into(), since);
}

/// What the state folder holds.
#[derive(Debug, Default)]
pub struct Loaded {
    /// Instances whose records can be read.
    pub instances: Vec<(Accepted, Run)>,
    /// Instances whose records cannot be read, each with the reason.
    pub quarantined: BTreeMap<InstanceId, String>,
}

/// The two files of every instance.
#[derive(Debug, Clone)]
pub struct Records {
    folders: Folders,
}

impl Records {
    /// Records below `folders.state`.
    pub const fn new(folders: Folders) -> Self {
        Self { folders }
    }

    fn spec_path(&self, id: &InstanceId) -> PathBuf {
        self.folders.file(id, "spec.json")
    }

    fn run_path(&self, id: &InstanceId) -> PathBuf {
        self.folders.file(id, "run.json")
    }

    /// Makes an accepted `ensure` durable.
    ///
    /// # Errors
    /// The state folder is read-only or full.
    pub fn save_spec(&self, accepted: &Accepted) -> Result<()> {
        durable::make_folder(&self.folders.instance(accepted.id()))?;
        durable::write_json(&self.spec_path(accepted.id()), &Stored { v: VERSION, record: accepted })
    }

    /// Makes a run durable.
    ///
    /// # Errors
    /// The state folder is read-only or full.
    pub fn save_run(&self, id: &InstanceId, run: &Run) -> Result<()> {
        durable::write_json(&self.run_path(id), &Stored { v: VERSION, record: run })
    }

    /// Reads the run of an instance; a fresh one if there is none.
    ///
    /// # Errors
    /// It is damaged.
    pub fn load_run(&self, id: &InstanceId) -> Result<Run> {
        Ok(read(&self.run_path(id), run_from)?.unwrap_or_default())
    }

    /// Reads every instance, and quarantines those that cannot be read. A folder without a spec
    /// remains from an interrupted removal or acceptance. No object of that instance exists, so the
    /// folder is removed.
    ///
    /// # Errors
    /// The folder of all instances cannot be read.
    pub fn load_all(&self) -> Result<Loaded> {
        let root = self.folders.instances();
        durable::make_folder(&root)?;
        let mut all = Vec::new();
        let mut quarantined = self.quarantined();
        for entry in std::fs::read_dir(&root).map_err(Error::file("list", &root))? {
            let entry = entry.map_err(Error::file("list", &root))?;
            let Some(id) = entry.file_name().to_str().and_then(|name| name.parse::<InstanceId>().ok()) else {
                continue;
            };
            match self.load(&id) {
                Ok(Some(one)) => all.push(one),
                Ok(None) => durable::remove_folder(&entry.path())?,
                Err(error) => {
                    self.quarantine(&id, &error);
                    quarantined.insert(id, error.chain());
                }
            }
        }
        all.sort_by(|(a, _), (b, _)| a.id().cmp(b.id()));
        Ok(Loaded { instances: all, quarantined })
    }

    fn load(&self, id: &InstanceId) -> Result<Option<(Accepted, Run)>> {
        let path = self.spec_path(id);
        let Some(accepted) = read::<Accepted>(&path, |_, _| ())? else { return Ok(None) };
        if accepted.id() != id {
            return Err(Error::NotNow(format!("{path:?} is the record of {}", accepted.id())));
        }
        Ok(Some((accepted, self.load_run(id)?)))
    }

    /// Moves an instance's files to the quarantine. Files that a running monitor has open keep
    /// their content.
    fn quarantine(&self, id: &InstanceId, error: &Error) {
        let (from, to) = (self.folders.instance(id), self.folders.quarantine().join(id.as_str()));
        tracing::error!(instance = %id, error = %error.chain(), ?to, "a record cannot be read; it is quarantined");
        let moved = durable::make_folder(&self.folders.quarantine())
            // The newest quarantined copy of an instance is kept.
            .and_then(|()| durable::remove_folder(&to))
            .and_then(|()| std::fs::rename(&from, &to).map_err(Error::file("move", &from)))
            .and_then(|()| durable::write(&to.join("why"), error.chain().as_bytes()))
            .and_then(|()| durable::sync_parent(&from));
        if let Err(error) = moved {
            // The next start finds the record again, and tries again.
            tracing::error!(instance = %id, error = %error.chain(), "a record cannot be quarantined");
        }
    }

    /// Quarantined instances, each with the reason.
    fn quarantined(&self) -> BTreeMap<InstanceId, String> {
        let folder = self.folders.quarantine();
        let why = |id: InstanceId| {
            let told = std::fs::read_to_string(folder.join(id.as_str()).join("why"));
            (id, told.unwrap_or_else(|_| "nothing says why".to_owned()))
        };
        let entries = std::fs::read_dir(&folder).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).map(why).collect()
    }

    /// Forgets an instance: first its spec, so that a cut-short removal is finished at the next start.
    ///
    /// # Errors
    /// A file cannot be removed.
    pub fn remove(&self, id: &InstanceId) -> Result<()> {
        durable::remove_file(&self.spec_path(id))?;
        durable::remove_folder(&self.folders.instance(id))?;
        durable::sync_parent(&self.folders.instance(id))
    }
}

/// The lowest number that none of `taken` has.
pub fn free_slot(taken: impl IntoIterator<Item = u32>) -> u32 {
    let taken: std::collections::BTreeSet<u32> = taken.into_iter().collect();
    (0..=u32::MAX).find(|slot| !taken.contains(slot)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::ensure;

    #[test]
    fn a_newer_generation_is_accepted_and_an_older_one_refused() {
        let new = ensure(5);
        let accepted = Accepted { spec_hash: spec_hash(&new.spec), ensure: new.clone(), slot: 0 };
        assert_eq!(verdict(None, &new), Verdict::Accept);
        assert_eq!(verdict(Some(&accepted), &new), Verdict::Same);
        assert_eq!(verdict(Some(&accepted), &Ensure { generation: 6, ..new.clone() }), Verdict::Accept);
        let Verdict::Refuse(why) = verdict(Some(&accepted), &Ensure { generation: 4, ..new }) else {
            panic!("an older generation was not refused")
        };
        assert!(why.contains("generation 4 is older than 5"), "{why}");
    }

    #[test]
    fn another_spec_under_the_same_generation_is_refused() {
        let new = ensure(5);
        let accepted = Accepted { spec_hash: spec_hash(&new.spec), ensure: new.clone(), slot: 0 };
        let mut other = new;
        other.spec.memory_mib += 1;
        assert!(
            matches!(verdict(Some(&accepted), &other), Verdict::Refuse(why) if why.contains("another spec"))
        );
    }

    #[test]
    fn a_newer_controller_that_says_more_of_an_image_is_not_refused() {
        let old = ensure(5);
        let accepted = Accepted { spec_hash: spec_hash(&old.spec), ensure: old.clone(), slot: 0 };
        let mut new = old;
        new.spec.image.root_bytes = Some(1 << 30);
        assert_eq!(verdict(Some(&accepted), &new), Verdict::Same);
    }

    #[test]
    fn slots_are_reused() {
        assert_eq!(free_slot([0, 1, 3]), 2);
        assert_eq!(free_slot([]), 0);
    }

    #[test]
    fn records_are_read_back_and_a_cut_short_removal_is_finished() {
        let folder = tempfile::tempdir().unwrap();
        let folders =
            Folders { state: folder.path().into(), run: folder.path().join("run"), netns: "/nowhere".into() };
        let records = Records::new(folders.clone());
        let new = ensure(1);
        let accepted = Accepted { spec_hash: spec_hash(&new.spec), ensure: new, slot: 7 };
        records.save_spec(&accepted).unwrap();
        let run = Run { incarnation: 3, ..Run::default() };
        records.save_run(accepted.id(), &run).unwrap();
        assert_eq!(records.load_all().unwrap().instances, vec![(accepted.clone(), run)]);
        durable::remove_file(&folders.file(accepted.id(), "spec.json")).unwrap();
        assert_eq!(records.load_all().unwrap().instances, vec![]);
        assert!(!folders.instance(accepted.id()).exists());
    }
}
