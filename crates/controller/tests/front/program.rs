//! The program itself: how it starts, refuses to start, and ends.

use crate::harness::DEADLINE;
use rustix::process::{Pid, Signal, kill_process};
use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Instant;

fn program(dir: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_roost-controller"));
    command.args(arguments).arg("--state-dir").arg(dir).env_remove("NOTIFY_SOCKET");
    command
}

pub fn run(dir: &Path, arguments: &[&str]) -> (Option<i32>, String) {
    let Output { status, stdout, stderr } = program(dir, arguments).output().unwrap();
    (status.code(), String::from_utf8_lossy(&[stdout, stderr].concat()).into_owned())
}

/// A served controller; killed if the test ends early.
struct Served {
    child: Child,
    stderr: BufReader<std::process::ChildStderr>,
}

impl Drop for Served {
    fn drop(&mut self) {
        // It has ended already where the test went well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const ANYWHERE: [&str; 5] = ["serve", "--listen", "127.0.0.1:0", "--agent-listen", "127.0.0.1:0"];

fn serve(dir: &Path) -> Served {
    let mut child = program(dir, &ANYWHERE).stderr(Stdio::piped()).spawn().unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("ready: API on https://127.0.0.1:") {
        line.clear();
        assert!(stderr.read_line(&mut line).unwrap() > 0, "it ended before it was ready");
    }
    Served { child, stderr }
}

#[test]
fn it_says_when_it_is_ready_and_ends_well_when_told_to() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(run(dir.path(), &["init"]).0, Some(0));
    for signal in [Signal::TERM, Signal::INT] {
        let mut served = serve(dir.path());
        let began = Instant::now();
        kill_process(Pid::from_child(&served.child), signal).unwrap();
        let mut rest = String::new();
        served.stderr.read_to_string(&mut rest).unwrap();
        assert_eq!(served.child.wait().unwrap().code(), Some(0), "{rest}");
        assert!(began.elapsed() < DEADLINE, "{:?}", began.elapsed());
    }
}

#[test]
fn a_second_controller_on_the_same_state_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    run(dir.path(), &["init"]);
    let first = serve(dir.path());
    for arguments in [&ANYWHERE[..], &["init", "--name", "roost.lan"]] {
        let (code, text) = run(dir.path(), arguments);
        assert_eq!(code, Some(4), "{text}");
        assert!(text.contains(&first.child.id().to_string()), "{text}");
    }
    // To make it again as it is, or to look at its log and its bill, does not disturb it.
    assert_eq!(run(dir.path(), &["init"]).0, Some(0));
    assert_eq!(run(dir.path(), &["usage-log", "export"]).0, Some(0));
    assert_eq!(run(dir.path(), &["bill", "recompute", "--by", "day"]).0, Some(0));
}

#[test]
fn what_keeps_it_from_starting_is_named_and_has_its_exit_code() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let (code, text) = run(&state, &ANYWHERE);
    assert_eq!(code, Some(3));
    assert!(text.contains("roost-controller init"), "{text}");
    run(&state, &["init"]);

    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let (code, text) = run(&state, &["serve", "--listen", &address, "--agent-listen", "127.0.0.1:0"]);
    assert_eq!(code, Some(5));
    assert!(text.contains(&address) && text.contains("--listen"), "{text}");

    let types = dir.path().join("types.toml");
    std::fs::write(
        &types,
        "[family.a]\ncategory = \"general\"\n[family.a.sizes]\nb = { vcpus = 0, memory_mib = 1 }\n",
    )
    .unwrap();
    let (code, text) = run(&state, &[&ANYWHERE[..], &["--types", types.to_str().unwrap()]].concat());
    assert_eq!(code, Some(3));
    assert!(text.contains("types.toml") && text.contains("a.b") && text.contains("vcpus is 0"), "{text}");

    let prices = dir.path().join("prices.toml");
    std::fs::write(&prices, "currency = \"dollars\"\nversion = []\n").unwrap();
    let (code, text) = run(&state, &[&ANYWHERE[..], &["--prices", prices.to_str().unwrap()]].concat());
    assert_eq!(code, Some(3));
    assert!(text.contains("\"dollars\""), "{text}");

    for side in ["roost.db-wal", "roost.db-shm"] {
        let _ = std::fs::remove_file(state.join(side));
    }
    std::fs::write(
        state.join("roost.db"),
        "this is no database, and was never one; it is long enough to be read",
    )
    .unwrap();
    let (code, text) = run(&state, &ANYWHERE);
    assert_eq!(code, Some(6));
    assert!(text.contains("roost.db"), "{text}");
    std::fs::remove_file(state.join("roost.db")).unwrap();
    for arguments in [&ANYWHERE[..], &["init"], &["bill", "recompute"], &["backup", "/dev/null/x"]] {
        let (code, text) = run(&state, arguments);
        assert_eq!(code, Some(3), "{text}");
        assert!(text.contains("roost.db is missing") && text.contains("roost-controller restore"), "{text}");
        assert!(!state.join("roost.db").exists());
    }
}

#[test]
fn wrong_usage_is_exit_code_two() {
    let dir = tempfile::tempdir().unwrap();
    for arguments in [
        &["serve", "--listen", "nowhere"][..],
        &["serve", "--public-pool", "10.0.0.0/99"],
        &["bill", "recompute", "--by", "colour"],
        &["bill", "recompute", "--since", "yesterday"],
        &["backup"],
        &["restore"],
        &["fly"],
    ] {
        assert_eq!(run(dir.path(), arguments).0, Some(2), "{arguments:?}");
    }
}

#[test]
fn it_goes_on_and_ends_with_its_exit_code_though_nobody_reads_what_it_says() {
    let closed = || std::io::pipe().unwrap().1;
    let folder = tempfile::tempdir().unwrap();
    let quietly = |arguments: &[&str]| {
        let mut command = program(folder.path(), arguments);
        command.stdout(closed()).stderr(closed());
        command
    };
    assert_eq!(quietly(&["usage-log", "export"]).status().unwrap().code(), Some(3));
    assert_eq!(quietly(&["init"]).status().unwrap().code(), Some(0));
    // The log has no reader either. Several log lines precede the listener.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (api, agents) = (port.to_string(), "127.0.0.1:0");
    let mut child = quietly(&["serve", "--listen", &api, "--agent-listen", agents])
        .env("ROOST_LOG", "debug")
        .spawn()
        .unwrap();
    let deadline = Instant::now() + DEADLINE;
    while std::net::TcpStream::connect(port).is_err() {
        assert_eq!(child.try_wait().unwrap(), None, "it ended");
        assert!(Instant::now() < deadline, "it does not listen");
    }
    kill_process(Pid::from_child(&child), Signal::TERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn an_empty_log_filter_counts_as_unset_and_a_wrong_one_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let with = |filter: &str| program(folder.path(), &["init"]).env("ROOST_LOG", filter).output().unwrap();
    let wrong = with("nonsense=loud");
    assert_eq!(wrong.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("ROOST_LOG"), "{wrong:?}");
    assert!(with("").status.success());
}
