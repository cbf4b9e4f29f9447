//! The agent's program, in what needs no root.

#![allow(clippy::unwrap_used, reason = "a failing test is what an unwrap is for here")]

use std::process::Command;

#[test]
fn errors_that_nobody_reads_change_no_exit_code() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("cgroup-root.json"), "no json").unwrap();
    let agent = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_roost-agent"));
        command.args(arguments).arg("--state-dir").arg(folder.path());
        command.arg("--run-dir").arg(folder.path()).stderr(std::io::pipe().unwrap().1);
        command.status().unwrap().code()
    };
    assert_eq!(agent(&["leftovers"]), Some(1));
    assert_eq!(agent(&["nonsense"]), Some(2));
}
