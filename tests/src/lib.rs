//! What the end-to-end tests stand on: the `roost` command as a user has it, and a shell on the host where the
//! instances live (the virtual host, or this machine with `ROOST_TEST_ON=host`).
//!
//! `scripts/test` starts the host, the controller and the agent, imports the images, and names all of it in the
//! file that `ROOST_E2E_RIG` points to. Nothing here starts a stand-in for anything.

#![forbid(unsafe_code)]
#![allow(missing_docs, clippy::unwrap_used, reason = "a test harness: every failure is a test's failure")]

pub mod lesson;
mod own_host;
pub mod session;
pub mod user_data;

pub use own_host::{EmulatedCpusStay, OwnHost};

use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Where everything is; written by `scripts/test`.
#[derive(Debug, Clone, Deserialize)]
pub struct Rig {
    /// The folder of `roost` on this side.
    pub bin: PathBuf,
    /// The words that run a command as root on the host.
    pub host: Vec<String>,
    /// The folder of the programs on the host.
    pub host_bin: PathBuf,
    /// State folder of controller and agent on the host.
    pub state: PathBuf,
    /// Run folder of the agent on the host.
    pub run: PathBuf,
    /// Prefix of the systemd units on the host.
    pub units: String,
    /// The administrator's CLI configuration.
    pub config: PathBuf,
    /// The checkout.
    pub checkout: PathBuf,
    /// Folders of the guest images that were built, by name.
    pub images: BTreeMap<String, PathBuf>,
    /// What the names of virtual hosts of a test's own begin with: `scripts/test` ends those that a test left.
    pub own_hosts: String,
    /// Every point of the kill matrix, not only the chosen ones (`scripts/test --full`).
    pub full: bool,
    /// Where the kill matrix notes its points and outcomes.
    pub points: PathBuf,
}

/// How a command ended.
#[derive(Debug)]
pub struct Ran {
    pub what: String,
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
    pub took: Duration,
}

impl Ran {
    /// Standard output of a command that must have succeeded.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(
            self.code,
            Some(0),
            "{} failed\nstdout: {}\nstderr: {}",
            self.what,
            self.stdout,
            self.stderr
        );
        self.stdout
    }

    /// Standard output, as JSON, of a command that must have succeeded.
    #[track_caller]
    pub fn json(self) -> Value {
        let what = self.what.clone();
        let text = self.ok();
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{what} printed no JSON ({error}): {text}"))
    }
}

fn run(mut command: Command, what: String) -> Ran {
    let began = Instant::now();
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{what}: {error}"));
    Ran {
        what,
        code: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        took: began.elapsed(),
    }
}

/// Waits until `condition` gives something, and fails with `what` and the last word when `limit` has passed.
#[track_caller]
pub fn wait_for<T>(what: &str, limit: Duration, mut condition: impl FnMut() -> Result<T, String>) -> T {
    let began = Instant::now();
    loop {
        match condition() {
            Ok(value) => return value,
            Err(last) => assert!(began.elapsed() < limit, "waited {limit:?} for {what}; last seen: {last}"),
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

impl Rig {
    /// The rig that `scripts/test` made.
    #[track_caller]
    pub fn get() -> Rig {
        let path = std::env::var("ROOST_E2E_RIG").expect(
            "ROOST_E2E_RIG is not set: end-to-end tests are run by scripts/test, which makes a host for them",
        );
        let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    /// Runs a shell command as root on the host.
    pub fn host(&self, script: &str) -> Ran {
        let mut command = Command::new(&self.host[0]);
        command.args(&self.host[1..]).arg(script);
        run(command, format!("on the host: {script}"))
    }

    /// Copies files into a folder of the host, which is made when missing.
    #[track_caller]
    pub fn copy_to_host(&self, files: &[&std::path::Path], folder: &str) {
        let mut command = if self.is_emulated() {
            let mut command = Command::new(&self.host[0]);
            command.args(&self.host[1..self.host.len() - 1]).arg("copy");
            command
        } else {
            self.host(&format!("mkdir -p {folder}")).ok();
            Command::new("cp")
        };
        command.args(files).arg(folder);
        run(command, format!("copying to {folder}")).ok();
    }

    /// Runs `roost` as the administrator.
    pub fn admin(&self, args: &[&str]) -> Ran {
        self.roost("default", args)
    }

    /// Runs `roost` as the account of a profile.
    pub fn roost(&self, profile: &str, args: &[&str]) -> Ran {
        let mut command = Command::new(self.bin.join("roost"));
        command.env("ROOST_CONFIG", &self.config).args(["--profile", profile]).args(args);
        run(command, format!("roost --profile {profile} {}", args.join(" ")))
    }

    /// A new account of a test's own.
    #[track_caller]
    pub fn tenant(&self, name: &str) -> Tenant<'_> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let unique = format!("{name}-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        self.admin(&["account", "create", &unique, "--save-profile", &unique]).ok();
        Tenant { rig: self, profile: unique }
    }

    /// Everything of an instance that is still on the host, as the agent lists it.
    #[track_caller]
    pub fn leftovers(&self, instance: &str) -> Value {
        let command = format!(
            "{}/roost-agent leftovers --state-dir {}/agent --run-dir {} --instance {instance} || true",
            self.host_bin.display(),
            self.state.display(),
            self.run.display()
        );
        self.host(&command).json()["leftovers"].clone()
    }
}

/// An account and what it has; its instances are terminated when the test ends, however it ends.
pub struct Tenant<'a> {
    pub rig: &'a Rig,
    pub profile: String,
}

impl Tenant<'_> {
    /// Runs `roost` as this account.
    pub fn roost(&self, args: &[&str]) -> Ran {
        self.rig.roost(&self.profile, args)
    }

    /// Launches one instance and returns its id at once.
    #[track_caller]
    pub fn launch(&self, image: &str, instance_type: &str, more: &[&str]) -> String {
        let mut args = vec!["launch", "--output", "json", "--image", image, "--type", instance_type];
        args.extend(more);
        if more.contains(&"--wait") && !more.contains(&"--wait-for") {
            // The guest's further behaviour is each test's own matter.
            args.extend(["--wait-for", "running"]);
        }
        let reservation = self.roost(&args).json();
        reservation["instances"][0]["instance_id"].as_str().unwrap().to_owned()
    }

    /// The instance as `roost describe` shows it.
    #[track_caller]
    pub fn describe(&self, id: &str) -> Value {
        self.roost(&["describe", id, "--output", "json"]).json()["instances"][0].clone()
    }

    /// Waits until the instance is in a state.
    #[track_caller]
    pub fn wait_state(&self, id: &str, state: &str, limit: Duration) -> Value {
        wait_for(&format!("{id} to be {state}"), limit, || {
            let seen = self.describe(id);
            if seen["state"] == state { Ok(seen) } else { Err(seen.to_string()) }
        })
    }

    /// Waits until the guest's console holds a text, and returns the console.
    #[track_caller]
    pub fn wait_console(&self, id: &str, text: &str, limit: Duration) -> String {
        wait_for(&format!("{text:?} on the console of {id}"), limit, || {
            let console = self.roost(&["console", id]).stdout;
            if console.contains(text) { Ok(console) } else { Err(tail(&console)) }
        })
    }

    /// Terminates, waits, and checks that nothing is left of it on the host.
    #[track_caller]
    pub fn terminate_clean(&self, id: &str) {
        self.roost(&["terminate", id, "--wait"]).ok();
        assert_eq!(self.describe(id)["state"], "terminated");
        assert_eq!(self.rig.leftovers(id), Value::Array(vec![]), "left behind by {id}");
    }

    /// This account's bill, one line per instance or volume.
    #[track_caller]
    pub fn bill(&self) -> Value {
        self.roost(&["bill", "--by", "instance", "--output", "json"]).json()
    }
}

impl Drop for Tenant<'_> {
    fn drop(&mut self) {
        let Ok(listed) = serde_json::from_str::<Value>(&self.roost(&["ls", "--output", "json"]).stdout)
        else {
            return;
        };
        let ids: Vec<&str> = listed["instances"]
            .as_array()
            .map(|all| all.iter().filter_map(|one| one["instance_id"].as_str()).collect())
            .unwrap_or_default();
        if !ids.is_empty() {
            let mut args = vec!["terminate", "--wait"];
            args.extend(ids);
            self.roost(&args);
        }
    }
}

/// The last lines of a text, for messages.
pub fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(25)..].join("\n")
}

/// A file with this content that is gone when the value is.
pub struct TempFile(pub PathBuf);

impl TempFile {
    #[must_use]
    pub fn new(name: &str, content: &(impl AsRef<[u8]> + ?Sized)) -> TempFile {
        let path = std::env::temp_dir().join(format!("roost-e2e-{}-{name}", std::process::id()));
        std::fs::File::create(&path).unwrap().write_all(content.as_ref()).unwrap();
        TempFile(path)
    }

    #[must_use]
    pub fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// The median of some times.
#[must_use]
pub fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}
