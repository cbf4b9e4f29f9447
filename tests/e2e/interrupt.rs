//! Ctrl-C: what `scripts/demo` has started goes with it, also when it is only half started.
#![allow(clippy::unwrap_used, missing_docs)]

use roost_e2e::{Rig, tail, wait_for};
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

const SOON: Duration = Duration::from_secs(60);

/// A demo that runs as a shell's job does: in a process group of its own. Its state and its temporary files are its own,
/// and whatever it starts can be told by a mark in the environment.
struct Demo {
    script: PathBuf,
    child: Child,
    folder: PathBuf,
}

impl Demo {
    fn start(rig: &Rig, what: &str) -> Demo {
        let folder = std::env::temp_dir().join(format!("demo-{}-{what}", std::process::id()));
        for part in ["tmp", "state"] {
            fs::create_dir_all(folder.join(part)).unwrap();
        }
        let said = File::create(folder.join("said")).unwrap();
        let child = with_folder(Command::new(rig.checkout.join("scripts/demo")), &folder)
            .args(["--virtual-host", "--yes"])
            .env("ROOST_NO_BUILD", "1")
            .stdin(Stdio::null())
            .stdout(said.try_clone().unwrap())
            .stderr(said)
            .process_group(0)
            .spawn()
            .unwrap();
        Demo { script: rig.checkout.join("scripts/virtual-host"), child, folder }
    }

    fn said(&self) -> String {
        tail(&fs::read_to_string(self.folder.join("said")).unwrap_or_default())
    }

    fn signal(&self, signal: &str) {
        let group = format!("-{}", self.child.id());
        assert!(Command::new("kill").args(["-s", signal, "--", &group]).status().unwrap().success());
    }

    /// The folders of its virtual hosts. What begins with a dot is the user's key.
    fn virtual_hosts(&self) -> Vec<PathBuf> {
        let all = files(&self.folder.join("state/roost/virtual-hosts"));
        all.into_iter().filter(|path| !path.file_name().unwrap().to_string_lossy().starts_with('.')).collect()
    }

    /// The command lines of all that it started and that lives.
    fn processes(&self) -> Vec<String> {
        let mark = format!("ROOST_TEST_DEMO={}\0", self.folder.display());
        let of = |path: PathBuf| {
            let environment = fs::read(path.join("environ")).ok()?;
            environment.windows(mark.len()).any(|part| part == mark.as_bytes()).then_some(())?;
            Some(String::from_utf8_lossy(&fs::read(path.join("cmdline")).ok()?).replace('\0', " "))
        };
        files(Path::new("/proc")).into_iter().filter_map(of).collect()
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            self.signal("KILL");
            let _ = self.child.wait();
        }
        for host in self.virtual_hosts() {
            let mut down = with_folder(Command::new(&self.script), &self.folder);
            let _ = down.arg("--name").arg(host.file_name().unwrap()).args(["down", "--discard"]).status();
        }
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn with_folder(mut command: Command, folder: &Path) -> Command {
    command.env("TMPDIR", folder.join("tmp")).env("XDG_STATE_HOME", folder.join("state"));
    command.env("ROOST_TEST_DEMO", folder);
    command
}

fn files(folder: &Path) -> Vec<PathBuf> {
    fs::read_dir(folder).map(|all| all.flatten().map(|entry| entry.path()).collect()).unwrap_or_default()
}

#[test]
fn ctrl_c_while_the_virtual_host_starts_leaves_nothing() {
    let rig = Rig::get();
    // Before there is a QEMU, and when it runs, but nobody inside would hear a power button yet.
    for (what, moment) in [("early", "data="), ("booting", "pid=")] {
        let mut demo = Demo::start(&rig, what);
        wait_for(&format!("the start of the virtual host ({moment})"), SOON, || {
            let hosts = demo.virtual_hosts();
            let record = hosts.first().and_then(|host| fs::read_to_string(host.join("record")).ok());
            if record.is_some_and(|record| record.contains(moment)) { Ok(()) } else { Err(demo.said()) }
        });
        demo.signal("INT");
        let ended = wait_for("the demo's end", Duration::from_secs(20), || {
            demo.child.try_wait().unwrap().ok_or_else(|| demo.processes().join("\n"))
        });
        assert_eq!(ended.code(), Some(130), "{what}: {}", demo.said());
        assert_eq!(demo.virtual_hosts(), Vec::<PathBuf>::new(), "{what}: virtual hosts");
        assert_eq!(files(&demo.folder.join("tmp")), Vec::<PathBuf>::new(), "{what}: temporary files");
        wait_for(&format!("{what}: its processes to be gone"), Duration::from_secs(5), || {
            let left = demo.processes();
            if left.is_empty() { Ok(()) } else { Err(left.join("\n")) }
        });
    }
}
