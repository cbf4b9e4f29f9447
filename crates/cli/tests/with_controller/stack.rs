//! A controller, and the command configured for it.

use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// Longest that anything here may take on a busy machine.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// The controller's program: named by ROOST_CONTROLLER_BIN, or built beside this one.
fn controller_program() -> PathBuf {
    let beside = || Path::new(env!("CARGO_BIN_EXE_roost")).with_file_name("roost-controller");
    let program = std::env::var_os("ROOST_CONTROLLER_BIN").map_or_else(beside, PathBuf::from);
    assert!(
        program.is_file(),
        "these tests need the controller, and {} is not there: `cargo build -p roost-controller` builds it, \
         ROOST_CONTROLLER_BIN names another",
        program.display()
    );
    program
}

/// What a command did.
#[derive(Debug)]
pub struct Ran {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Ran {
    pub fn of(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.code, 0, "{self:#?}");
        self.stdout
    }

    #[track_caller]
    pub fn json(self) -> Value {
        let text = self.ok();
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    #[track_caller]
    pub fn fails(self, code: i32, said: &[&str]) {
        assert_eq!(self.code, code, "{self:#?}");
        assert_eq!(self.stdout, "", "{self:#?}");
        for part in said {
            assert!(self.stderr.contains(part), "{part:?} is not in: {}", self.stderr);
        }
    }
}

/// A running controller with a configuration for the command; all of it is gone when this is.
pub struct Stack {
    pub folder: tempfile::TempDir,
    pub endpoint: String,
    pub agents: String,
    controller: Child,
}

impl Stack {
    #[track_caller]
    pub fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("controller");
        let program = controller_program();
        let made = Command::new(&program).arg("init").arg("--state-dir").arg(&state).output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let mut controller = Command::new(&program)
            .args(["serve", "--listen", "127.0.0.1:0", "--agent-listen", "127.0.0.1:0", "--state-dir"])
            .arg(&state)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (endpoint, agents) = ready(&mut controller);
        let stack = Self { folder, endpoint, agents, controller };
        let admin = state.join("admin.json");
        let endpoint = stack.endpoint.clone();
        stack.roost(&["configure", "--from", admin.to_str().unwrap(), "--endpoint", &endpoint]).ok();
        stack
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn state_dir(&self) -> PathBuf {
        self.path("controller")
    }

    /// Runs the controller's program to its end.
    #[track_caller]
    pub fn controller(&self, args: &[&str]) {
        let output = Command::new(controller_program()).args(args).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// The command, not started yet.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_roost"));
        command
            .args(args)
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("ROOST_CONFIG", self.path("cli/config.toml"));
        command
    }

    pub fn roost(&self, args: &[&str]) -> Ran {
        Ran::of(self.command(args).stdin(Stdio::null()).output().unwrap())
    }

    /// The same, with JSON.
    #[track_caller]
    pub fn json(&self, args: &[&str]) -> Value {
        let mut all = vec!["--output", "json"];
        all.extend(args);
        self.roost(&all).json()
    }

    /// Sets in the manifest of an image's folder whether its instances run an ssh server.
    pub fn has_ssh(folder: &str, ssh: bool) {
        let file = Path::new(folder).join("manifest.json");
        let mut manifest: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        manifest["ssh"] = ssh.into();
        std::fs::write(file, manifest.to_string()).unwrap();
    }

    /// A folder that `image import` takes, with a root disk of this many MiB.
    pub fn image_folder(&self, name: &str, root_mib: u64) -> String {
        let folder = self.path(name);
        std::fs::create_dir_all(&folder).unwrap();
        let mut kernel = vec![7; 100_000];
        kernel[..4].copy_from_slice(b"\x7fELF");
        std::fs::write(folder.join("vmlinux"), kernel).unwrap();
        std::fs::write(folder.join("initrd"), b"070701 initrd").unwrap();
        std::fs::File::create(folder.join("root.raw")).unwrap().set_len(root_mib << 20).unwrap();
        let manifest = serde_json::json!({
            "name": name, "kernel": "vmlinux", "initrd": "initrd", "root": "root.raw", "description": "of a test",
            "boot_args": "console=ttyS0", "default_user": "admin", "min_volume_gib": 1,
        });
        std::fs::write(folder.join("manifest.json"), manifest.to_string()).unwrap();
        folder.to_str().unwrap().to_owned()
    }
}

/// Waits for the controller's word that it is ready, and takes its addresses from it.
fn ready(controller: &mut Child) -> (String, String) {
    let (sender, lines) = mpsc::channel();
    let stderr = controller.stderr.take().unwrap();
    // Reads to the end, so that the controller can always write.
    std::thread::spawn(move || {
        for line in BufReader::new(stderr).lines().map_while(Result::ok) {
            let _ = sender.send(line);
        }
    });
    let deadline = Instant::now() + DEADLINE;
    let mut said = Vec::new();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let line =
            lines.recv_timeout(left).unwrap_or_else(|_| panic!("the controller is not ready: {said:#?}"));
        if let Some((_, addresses)) = line.split_once("ready: API on ") {
            let (api, agents) = addresses.split_once(", agents on ").unwrap();
            return (api.to_owned(), agents.to_owned());
        }
        said.push(line);
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        let _ = self.controller.kill();
        let _ = self.controller.wait();
    }
}
