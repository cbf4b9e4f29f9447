//! SQLite behind the trait: the conformance suite, and what a file can go through.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use roost_store::{InstanceFilter, SqliteStore, Store, StoreError, conformance};
use roost_types::Micros;
use std::cell::RefCell;
use std::collections::BTreeMap;
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
    store.put_host(&facts, Micros(5)).unwrap();
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
    let error = store.put_host(&facts, Micros(5)).unwrap_err();
    assert!(matches!(error, StoreError::Locked { .. }), "{error}");
    assert!(error.to_string().contains("roost.db"), "{error}");
    assert!(store.hosts().unwrap().is_empty(), "readers go on, and nothing was half written");
    raw.execute_batch("COMMIT").unwrap();
    store.put_host(&facts, Micros(6)).unwrap();
    assert_eq!(store.hosts().unwrap().len(), 1);
}

#[test]
fn a_copy_is_of_one_moment_and_writers_go_on_while_it_is_made() {
    let folder = tempfile::tempdir().unwrap();
    let (path, copy) = (folder.path().join("roost.db"), folder.path().join("copy.db"));
    let store = SqliteStore::open(&path).unwrap();
    let raw = rusqlite::Connection::open(&path).unwrap();
    raw.execute_batch("CREATE TABLE ballast AS SELECT zeroblob(5 << 20)").unwrap();
    drop(raw);
    let mut steps = 0;
    SqliteStore::copy(&path, &copy, || {
        steps += 1;
        store.begin_epoch(0).unwrap();
    })
    .unwrap();
    assert!((4..100).contains(&steps), "it is made in steps, each once: {steps}");
    assert_eq!(store.epoch().unwrap(), steps + 1);
    let copied = SqliteStore::open(&copy).unwrap();
    assert_eq!(copied.epoch().unwrap(), 1, "what came later is not in it");
    copied.check().unwrap();
}

#[test]
fn to_read_a_database_of_another_release_does_not_change_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("roost.db");
    assert!(matches!(SqliteStore::open_read_only(&path), Err(StoreError::Unusable { .. })));
    assert!(!path.exists(), "nothing is made");
    let raw = sample(&path);
    let error = SqliteStore::open_read_only(&path).unwrap_err();
    assert!(matches!(error, StoreError::TooOld { found: 1, .. }), "{error}");
    let version: i64 = raw.pragma_query_value(None, "user_version", |row| row.get(0)).unwrap();
    assert_eq!(version, 1);
    let store = SqliteStore::open(&path).unwrap();
    let reader = SqliteStore::open_read_only(&path).unwrap();
    assert_eq!(reader.proofs().unwrap(), store.proofs().unwrap());
    assert!(reader.begin_epoch(9).is_err());
}

/// A database of schema 1 with a running, a stopped and a terminated instance.
fn sample(path: &Path) -> rusqlite::Connection {
    let raw = rusqlite::Connection::open(path).unwrap();
    raw.execute_batch(include_str!("data/schema-1.sql")).unwrap();
    raw
}

/// Every row of every table, as text: what migrations must keep.
fn rows(db: &rusqlite::Connection) -> BTreeMap<String, Vec<String>> {
    let mut tables = db
        .prepare("SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")
        .unwrap();
    let names: Vec<String> = tables.query_map([], |row| row.get(0)).unwrap().map(Result::unwrap).collect();
    let read = |table: &String| {
        let mut query = db.prepare(&format!("SELECT * FROM {table}")).unwrap();
        let columns = query.column_names().into_iter().map(str::to_owned).collect::<Vec<_>>();
        let text = |row: &rusqlite::Row<'_>| {
            let values = columns.iter().enumerate();
            Ok(values
                .map(|(at, name)| format!("{name}={:?}\n", row.get_ref(at).unwrap()))
                .collect::<String>())
        };
        let mut rows: Vec<String> = query.query_map([], text).unwrap().map(Result::unwrap).collect();
        rows.sort();
        (table.clone(), rows)
    };
    names.iter().map(read).collect()
}

#[test]
fn a_database_of_the_first_schema_comes_through_every_migration_whole() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("roost.db");
    let before = rows(&sample(&path));
    let store = SqliteStore::open(&path).unwrap();
    store.check().unwrap();
    let after = rows(&rusqlite::Connection::open(&path).unwrap());
    for (table, rows) in before {
        assert_eq!(after[&table].len(), rows.len(), "rows of {table}");
        // Migrations add columns; none drops or changes a value.
        for (old, new) in rows.iter().zip(&after[&table]) {
            for value in old.lines() {
                assert!(new.lines().any(|line| line == value), "{table} lost {value} of {old}");
            }
        }
    }
    let everything = InstanceFilter { gone_since: Some(Micros(i64::MIN)), ..InstanceFilter::default() };
    let mut states: Vec<_> =
        store.instances(&everything).unwrap().iter().map(|record| record.row.state().to_string()).collect();
    states.sort();
    assert_eq!(states, ["running", "running", "stopped", "terminated"]);
    let host = store.hosts().unwrap().remove(0);
    assert_eq!((host.claims, host.claimed_disk_gib), (2, 3), "what is there is claimed");
    assert_eq!(store.epoch().unwrap(), 1);
}

#[test]
fn a_folder_that_is_not_there_is_named() {
    assert!(matches!(message(Path::new("/nonexistent/roost.db")).0, StoreError::Unusable { .. }));
}
