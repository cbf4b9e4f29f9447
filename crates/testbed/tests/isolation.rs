//! Checks that every test that `docs/isolation.md` names exists.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The names in backquotes in the last cell of each row of a table.
fn named(page: &str) -> BTreeSet<String> {
    let rows = page.lines().filter(|line| line.starts_with('|'));
    let last = rows.filter_map(|row| row.trim_end_matches('|').rsplit('|').next());
    last.flat_map(|cell| cell.split('`').skip(1).step_by(2)).map(str::to_owned).collect()
}

/// The names of the functions in all Rust files below a folder.
fn functions(folder: &Path, into: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).unwrap().flatten() {
        let path = entry.path();
        let name = entry.file_name();
        if path.is_dir() && name != "target" {
            functions(&path, into);
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            into.extend(
                text.split("fn ").skip(1).filter_map(|rest| Some(rest.split_once('(')?.0.to_owned())),
            );
        }
    }
}

#[test]
fn every_test_that_the_list_of_attempts_names_exists() {
    let page = fs::read_to_string(root().join("docs/isolation.md")).unwrap();
    let named = named(&page);
    assert!(named.len() > 40, "the page is read: {named:?}");
    let mut there = BTreeSet::new();
    functions(&root().join("crates"), &mut there);
    functions(&root().join("tests"), &mut there);
    let missing: Vec<_> = named.difference(&there).collect();
    assert!(missing.is_empty(), "docs/isolation.md names tests that do not exist: {missing:#?}");
}
