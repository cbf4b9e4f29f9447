//! Backup and restore with the real programs, over a controller that serves meanwhile.

use crate::harness::{Agent, Server};
use crate::program::run;
use reqwest::{Method, StatusCode};
use roost_controller::backup;
use roost_controller::config::{FILES, StartError, StateDir};
use roost_controller::server::Limits;
use roost_controller::setup::{self, InitOptions};
use roost_store::{SqliteStore, Store};
use roost_types::agent::{HelloRequest, PROTOCOL};
use roost_types::api::{CreateAccount, DescribeInstances};
use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

async fn program(dir: &Path, arguments: &[&str]) -> (Option<i32>, String) {
    let dir = dir.to_owned();
    let arguments: Vec<_> = arguments.iter().map(|argument| (*argument).to_owned()).collect();
    let run = move || run(&dir, &arguments.iter().map(String::as_str).collect::<Vec<_>>());
    tokio::task::spawn_blocking(run).await.unwrap()
}

fn names(dir: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[tokio::test]
async fn a_backup_made_under_load_starts_elsewhere_with_the_newest_instance() {
    let server = Server::start().await;
    let agent = server.host("box").await;
    let admin = server.admin();
    admin.image("debian").await;
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let load = tokio::spawn({
        let admin = admin.clone();
        async move {
            let mut count = 0;
            while !*stopped.borrow() {
                let request = CreateAccount { name: format!("load-{count}"), admin: false };
                admin.call(&request).await.unwrap();
                count += 1;
            }
            count
        }
    });
    let newest = admin.launch("debian").await;
    let file = server.dir.path().join("roost.backup");
    let path = file.to_str().unwrap();
    let (code, text) = program(server.state.dir(), &["backup", path]).await;
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("took") && text.contains("uploaded files   3"), "{text}");
    let (code, text) = program(server.state.dir(), &["backup", path]).await;
    assert_eq!(code, Some(3), "never over a file: {text}");
    stop.send_replace(true);
    assert!(load.await.unwrap() > 0);
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    let beside = names(server.dir.path());
    assert!(!beside.iter().any(|name| name.contains("partial")), "nothing is left beside it: {beside:?}");

    // The lists of `backup` and `restore` cover every file of a controller.
    let known = FILES.map(|(name, _)| name).into_iter().chain(["blobs", "lock", "roost.db"]);
    let known: BTreeSet<_> = known.map(str::to_owned).collect();
    let made = names(server.state.dir());
    let strays: Vec<_> = made.iter().filter(|name| !known.contains(*name)).collect();
    assert!(strays.iter().all(|name| name.starts_with("roost.db-")), "{strays:?}");
    let (facts, host_dir) = (agent.facts, server.dir.path().join("box"));

    let (dir, state) = server.stop().await;
    let elsewhere = StateDir::new(dir.path().join("elsewhere"));
    let (code, text) = program(elsewhere.dir(), &["restore", path]).await;
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("took"), "{text}");
    let (code, text) = program(elsewhere.dir(), &["restore", path]).await;
    assert_eq!(code, Some(3), "never over a directory: {text}");
    assert!(text.contains("not empty"), "{text}");
    for (name, secret) in FILES {
        assert!(state.need(name).unwrap() == elsewhere.need(name).unwrap(), "{name}");
        let mode = std::fs::metadata(elsewhere.path(name)).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, if secret { 0o600 } else { 0o644 }, "{name}");
    }
    assert_eq!(
        names(&state.path("blobs")),
        &names(&elsewhere.path("blobs")) | &BTreeSet::from(["incoming".to_owned()])
    );
    std::fs::remove_dir_all(state.dir()).unwrap();

    let again = Server::again(dir, elsewhere, Limits::default()).await;
    let all = DescribeInstances { instance_ids: vec![], include_terminated: false, all_accounts: false };
    let found = again.admin().call(&all).await.unwrap().instances;
    assert_eq!(found.iter().map(|one| &one.instance_id).collect::<Vec<_>>(), [&newest]);
    // The agent continues with its certificate.
    let identity = serde_json::from_slice(&std::fs::read(host_dir.join("identity.json")).unwrap()).unwrap();
    let agent = Agent::new(identity, &host_dir, again.agents);
    let hello = HelloRequest { protocol: PROTOCOL, version: "test".into(), host: facts };
    let reply = agent.request(Method::POST, "hello").json(&hello).send().await.unwrap();
    assert_eq!(reply.status(), StatusCode::OK, "{}", reply.text().await.unwrap());
}

/// A backup of a new controller, and the folder of all files.
fn made() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let state = StateDir::new(dir.path().join("controller"));
    setup::init(&state, &InitOptions::default()).unwrap();
    let file = dir.path().join("roost.backup");
    backup::backup(&state, &file).unwrap();
    (dir, file)
}

#[test]
fn each_restore_begins_another_epoch_even_of_the_same_backup() {
    let (dir, file) = made();
    let epoch = |name: &str| {
        let state = StateDir::new(dir.path().join(name));
        if name != "controller" {
            backup::restore(&state, &file).unwrap();
        }
        SqliteStore::open(&state.database()).unwrap().epoch().unwrap()
    };
    let (first, second) = (epoch("controller"), epoch("second"));
    assert!(first < second, "{first} {second}");
    // A backup of the restored controller, restored within the same second, gets a further epoch.
    let later = dir.path().join("later.backup");
    backup::backup(&StateDir::new(dir.path().join("second")), &later).unwrap();
    let third = StateDir::new(dir.path().join("third"));
    backup::restore(&third, &later).unwrap();
    assert!(SqliteStore::open(&third.database()).unwrap().epoch().unwrap() > second);
}

#[test]
fn a_backup_that_is_damaged_cut_short_or_none_is_refused_and_leaves_nothing() {
    let (dir, file) = made();
    let whole = std::fs::read(&file).unwrap();
    let bad = dir.path().join("bad.backup");
    let target = StateDir::new(dir.path().join("target"));
    let refused = |what: &str, bytes: &[u8]| {
        std::fs::write(&bad, bytes).unwrap();
        let error = backup::restore(&target, &bad).expect_err(what);
        let text = error.to_string();
        assert!(matches!(error, StartError::Unusable { .. }), "{what}: {text}");
        assert!(text.contains("bad.backup"), "{what}: {text}");
        assert_eq!(names(target.dir()), ["lock".to_owned()].into(), "{what}");
        text
    };
    for length in [0, 1, 511, 512, 700, 5000, whole.len() / 2, whole.len() - 2048] {
        let text = refused(&format!("{length} bytes"), &whole[..length]);
        assert!(text.contains("damaged"), "{text}");
    }
    refused("another file", &[b'x'; 4096]);
    // The change is in the database's content, which is most of the file.
    for at in (4096..whole.len() - 40_000).step_by(30_011) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x10;
        refused(&format!("byte {at}"), &bytes);
    }
    std::fs::write(&bad, &whole).unwrap();
    backup::restore(&target, &bad).unwrap();
}

#[test]
fn names_that_lead_out_of_the_directory_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let evil = dir.path().join("evil.backup");
    for name in ["../outside", "/etc/outside", "blobs/../../outside", "blobs/x", "sealing.key/x", "other"] {
        let mut header = tar::Header::new_gnu();
        header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_size(1);
        header.set_cksum();
        let mut archive = tar::Builder::new(std::fs::File::create(&evil).unwrap());
        archive.append(&header, &b"x"[..]).unwrap();
        archive.finish().unwrap();
        let error = backup::restore(&StateDir::new(dir.path().join("target")), &evil).expect_err(name);
        assert!(error.to_string().contains("no backup of a controller holds"), "{name}: {error}");
        assert!(!dir.path().join("outside").exists());
    }
}
