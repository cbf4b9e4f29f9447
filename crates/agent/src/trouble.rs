//! Troubles of the host itself, for its owner: one sentence per subject, set by the subject's
//! watcher.
//!
//! The sentences go to the controller with every report (`roost hosts`), and into a file of the run
//! folder, where `roost doctor` finds them without a controller.

use crate::names::Folders;
use roost_types::agent::{TROUBLES, bounded};
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio::sync::watch;

/// The host's troubles, by subject.
#[derive(Debug, Default)]
pub struct Troubles {
    /// The file of the sentences; `None` in tests.
    file: Option<PathBuf>,
    by_subject: Mutex<BTreeMap<String, String>>,
    changed: watch::Sender<()>,
}

impl Troubles {
    /// Creates an empty set.
    pub fn new(folders: &Folders) -> Self {
        let troubles = Self { file: Some(folders.troubles()), ..Self::default() };
        troubles.write(&troubles.lock());
        troubles
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, String>> {
        self.by_subject.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets or clears the trouble of `subject` (`firewall`, `clock`, `records` …). A change is
    /// logged.
    pub fn set(&self, subject: &str, trouble: Option<String>) {
        let mut by_subject = self.lock();
        let before = by_subject.get(subject);
        if before == trouble.as_ref() {
            return;
        }
        match &trouble {
            Some(sentence) => tracing::error!(subject, %sentence, "trouble with the host"),
            None => tracing::info!(subject, "the trouble with the host is over"),
        }
        match trouble {
            Some(sentence) => by_subject.insert(subject.to_owned(), sentence),
            None => by_subject.remove(subject),
        };
        self.write(&by_subject);
        self.changed.send_replace(());
    }

    /// The sentences, by subject: at most [`TROUBLES`] of at most
    /// [`roost_types::agent::SENTENCE_BYTES`] each.
    pub fn sentences(&self) -> Vec<String> {
        self.lock().values().take(TROUBLES).map(|sentence| bounded(sentence)).collect()
    }

    /// The receiver is marked changed whenever a sentence is added, changed or removed.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    fn write(&self, by_subject: &BTreeMap<String, String>) {
        let text: String = by_subject
            .values()
            .map(|sentence| format!("{}\n", bounded(sentence).replace('\n', " ")))
            .collect();
        // Written aside and renamed: a reader never sees half a file. After a failed write, the
        // sentences are still in the log and the reports.
        let Some(file) = &self.file else { return };
        let aside = file.with_extension("new");
        if let Err(error) = fs::write(&aside, text).and_then(|()| fs::rename(&aside, file)) {
            tracing::debug!(%error, ?file, "the host's troubles cannot be written down");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trouble_is_told_until_it_is_over() {
        let folder = tempfile::tempdir().unwrap();
        let folders =
            Folders { state: folder.path().into(), run: folder.path().into(), netns: folder.path().into() };
        let troubles = Troubles::new(&folders);
        let mut changes = troubles.changes();
        troubles.set("firewall", Some("the table\nis gone".into()));
        troubles.set("clock", Some("x".repeat(10_000)));
        assert!(changes.has_changed().unwrap());
        changes.borrow_and_update();
        assert_eq!(troubles.sentences().len(), 2);
        assert!(troubles.sentences().iter().all(|sentence| sentence.len() <= 512));
        let file = fs::read_to_string(folders.troubles()).unwrap();
        assert_eq!(file.lines().count(), 2, "one line each: {file}");
        troubles.set("clock", None);
        troubles.set("firewall", None);
        troubles.set("firewall", None);
        assert!(changes.has_changed().unwrap());
        assert!(troubles.sentences().is_empty());
        assert_eq!(fs::read_to_string(folders.troubles()).unwrap(), "");
    }
}
