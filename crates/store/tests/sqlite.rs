//! SQLite behind the trait: the conformance suite, and what a file can go through.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use roost_store::{SqliteStore, Store, StoreError, conformance};
use std::cell::RefCell;
use std::path::Path;

#[test]
fn sqlite_conforms() {
    let folders = RefCell::new(Vec::new());
    let empty = || -> Box<dyn Store> {
        let folder = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(&folder.path().join("roost.db")).unwrap();
        folders.borrow_mut().push(folder);
        Box::new(store)
    };
    conformance::run_all(&empty);
}

#[test]
fn what_was_committed_is_there_after_the_file_is_opened_again_and_in_a_backup() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("roost.db");
    let facts = serde_json::from_value(serde_json::json!({
        "host_id": "h-0123456789abcdef0", "hostname": "h", "zone": "z", "cpus": 1, "cpu_milli": 1000,
        "memory_mib": 1, "disk_gib": 1, "max_vcpus": 1, "overhead_mib": 1
    }))
    .unwrap();
    let store = SqliteStore::open(&path).unwrap();
    store.put_host(&facts, roost_types::Micros(5)).unwrap();
    let copy = folder.path().join("copy.db");
    store.backup(&copy).unwrap();
    assert!(matches!(store.backup(&copy), Err(StoreError::Unusable { .. })), "never over another file");
    drop(store);
    for path in [&path, &copy] {
        let store = SqliteStore::open(path).unwrap();
        store.check().unwrap();
        assert_eq!(store.hosts().unwrap()[0].facts, facts);
    }
}

fn message(path: &Path) -> (StoreError, String) {
    let error = SqliteStore::open(path).unwrap_err();
    let text = error.to_string();
    assert!(text.contains(&path.display().to_string()), "it names the file: {text}");
    (error, text)
}

#[test]
fn a_file_that_is_no_database_or_a_damaged_one_is_named_as_that() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("roost.db");
    std::fs::write(&path, vec![b'x'; 8192]).unwrap();
    let (error, text) = message(&path);
    assert!(matches!(error, StoreError::Corrupt { .. }), "{text}");
    assert!(text.contains("restore it from a backup"), "{text}");
    std::fs::remove_file(&path).unwrap();
    drop(SqliteStore::open(&path).unwrap());
    let mut bytes = std::fs::read(&path).unwrap();
    let length = bytes.len();
    bytes[4096..length].fill(0xa5);
    std::fs::write(&path, bytes).unwrap();
    assert!(matches!(message(&path).0, StoreError::Corrupt { .. }));
}

#[test]
fn a_schema_of_a_newer_program_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("roost.db");
    drop(SqliteStore::open(&path).unwrap());
    let raw = rusqlite::Connection::open(&path).unwrap();
    raw.pragma_update(None, "user_version", 99).unwrap();
    drop(raw);
    assert!(matches!(message(&path).0, StoreError::TooNew { found: 99, .. }));
}

#[test]
fn a_database_that_another_process_holds_is_called_locked() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("roost.db");
    drop(SqliteStore::open(&path).unwrap());
    let raw = rusqlite::Connection::open(&path).unwrap();
    raw.pragma_update(None, "locking_mode", "EXCLUSIVE").unwrap();
    raw.execute_batch("BEGIN EXCLUSIVE; CREATE TABLE held (x); ").unwrap();
    let (error, text) = message(&path);
    assert!(matches!(error, StoreError::Locked { .. }), "{text}");
}

#[test]
fn a_lock_that_another_process_takes_later_stops_writers_only_and_only_while_it_is_held() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("roost.db");
    let store = SqliteStore::open(&path).unwrap();
    let facts = serde_json::from_value(serde_json::json!({
        "host_id": "h-0123456789abcdef0", "hostname": "h", "zone": "z", "cpus": 1, "cpu_milli": 1000,
        "memory_mib": 1, "disk_gib": 1, "max_vcpus": 1, "overhead_mib": 1
    }))
    .unwrap();
    let raw = rusqlite::Connection::open(&path).unwrap();
    raw.execute_batch("BEGIN IMMEDIATE").unwrap();
    let error = store.put_host(&facts, roost_types::Micros(5)).unwrap_err();
    assert!(matches!(error, StoreError::Locked { .. }), "{error}");
    assert!(error.to_string().contains("roost.db"), "{error}");
    assert!(store.hosts().unwrap().is_empty(), "readers go on, and nothing was half written");
    raw.execute_batch("COMMIT").unwrap();
    store.put_host(&facts, roost_types::Micros(6)).unwrap();
    assert_eq!(store.hosts().unwrap().len(), 1);
}

#[test]
fn a_folder_that_is_not_there_is_named() {
    assert!(matches!(message(Path::new("/nonexistent/roost.db")).0, StoreError::Unusable { .. }));
}
