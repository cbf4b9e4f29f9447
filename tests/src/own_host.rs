//! A virtual host of a test's own, for what cannot be done to the one that all tests share: rebooting it, cutting its
//! power, installing on it. Its data is kept over `down` and `up`, as it is for people.

use crate::{Ran, Rig, TempFile, run, wait_for};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

/// See the module. It is taken down, and its data is thrown away, when the value goes.
pub struct OwnHost {
    script: PathBuf,
    name: String,
    options: Vec<String>,
}

impl OwnHost {
    /// Starts one; `options` are those of `scripts/virtual-host up`, and are given again at each later start.
    #[track_caller]
    pub fn up(rig: &Rig, what: &str, options: &[&str]) -> OwnHost {
        let host = OwnHost {
            script: rig.checkout.join("scripts/virtual-host"),
            name: format!("{}{what}", rig.own_hosts),
            options: options.iter().map(|option| (*option).to_owned()).collect(),
        };
        host.up_again();
        host
    }

    /// Starts it again after it went down.
    #[track_caller]
    pub fn up_again(&self) {
        let options: Vec<&str> = self.options.iter().map(String::as_str).collect();
        self.command(&[&options[..], &["up"]].concat()).ok();
    }

    /// `scripts/virtual-host` for this one.
    pub fn command(&self, words: &[&str]) -> Ran {
        let mut command = Command::new(&self.script);
        command.args(["--name", &self.name]).args(words);
        run(command, format!("scripts/virtual-host --name {} {}", self.name, words.join(" ")))
    }

    /// Runs a shell command as root inside.
    pub fn ssh(&self, script: &str) -> Ran {
        self.command(&["ssh", script])
    }

    /// SIGKILL for its QEMU: to everything inside, a power cut.
    #[track_caller]
    pub fn cut_power(&self) {
        let process = process_of(&self.command(&["status"]).ok());
        let mut kill = Command::new("kill");
        kill.args(["-9", &process]);
        run(kill, format!("kill -9 {process}")).ok();
        wait_for("QEMU to be gone", Duration::from_secs(10), || {
            let code = self.command(&["status"]).code;
            if code == Some(3) { Ok(()) } else { Err(format!("status: exit code {code:?}")) }
        });
    }

    /// This one as the host of tests, with the programs but without controller and agent.
    #[must_use]
    pub fn rig(&self, rig: &Rig) -> Rig {
        Rig {
            host: vec![self.script.display().to_string(), "--name".into(), self.name.clone(), "ssh".into()],
            host_bin: "/opt/roost/bin".into(),
            ..rig.clone()
        }
    }

    /// Controller and agent as `scripts/install --in-virtual-host` starts them, and the CLI's configuration, which
    /// is gone with the second value.
    #[track_caller]
    pub fn with_stack(&self, rig: &Rig) -> (Rig, TempFile) {
        let state = "/var/lib/roost/stack";
        self.ssh(&format!(
            "/opt/roost/scripts/lib/stack start --persistent --name roost --bin /opt/roost/bin --state {state} --listen 0.0.0.0"
        ))
        .ok();
        let admin = self.ssh(&format!("cat {state}/controller/admin.json")).ok();
        let admin = TempFile::new(&format!("{}-admin.json", self.name), &admin);
        let config = TempFile::new(&format!("{}-config.toml", self.name), "");
        let own = Rig {
            state: state.into(),
            run: "/run/roost".into(),
            units: "roost".into(),
            config: config.0.clone(),
            ..self.rig(rig)
        };
        own.admin(&["configure", "--from", admin.path(), "--endpoint", &self.endpoint()]).ok();
        (own, config)
    }

    /// Where its API is reached. Another port after a restart, if that of before has been taken.
    #[track_caller]
    pub fn endpoint(&self) -> String {
        format!("https://127.0.0.1:{}", self.command(&["port"]).ok().trim())
    }
}

/// The number of a virtual host's QEMU, out of what `status` says.
fn process_of(status: &str) -> String {
    let mut words = status.split([' ', ',']).skip_while(|word| *word != "process");
    words.nth(1).expect("status names the process").to_owned()
}

/// Each CPU of the virtual host stays on one CPU of this machine until the value goes: see [`Rig::emulated_cpus_stay`].
pub struct EmulatedCpusStay(Vec<String>);

impl Rig {
    /// Whether the host's CPUs are a virtual host's, which a program makes.
    #[must_use]
    pub fn is_emulated(&self) -> bool {
        self.host.last().is_some_and(|last| last == "ssh")
    }

    /// Keeps each emulated CPU of the virtual host on one CPU of this machine, for a measurement. An emulated CPU that wakes
    /// is else put beside another one at times, and both run at half their speed until the kernel moves one, milliseconds
    /// later: that is lost to whoever runs inside, and most to who is woken most. Nothing to do on hardware.
    #[track_caller]
    pub fn emulated_cpus_stay(&self) -> EmulatedCpusStay {
        if !self.is_emulated() {
            return EmulatedCpusStay(Vec::new());
        }
        let words = &self.host[..self.host.len() - 1];
        let mut status = Command::new(&words[0]);
        status.args(&words[1..]).arg("status");
        let process = process_of(&run(status, "the virtual host's status".into()).ok());
        let threads = std::fs::read_dir(format!("/proc/{process}/task")).unwrap().flatten();
        let cpus: Vec<String> = threads
            .filter(|thread| {
                std::fs::read_to_string(thread.path().join("comm")).is_ok_and(|name| name.starts_with("CPU "))
            })
            .map(|thread| thread.file_name().into_string().unwrap())
            .collect();
        assert!(!cpus.is_empty(), "process {process} emulates no CPU");
        let allowed = std::thread::available_parallelism().unwrap().get();
        for (n, thread) in cpus.iter().enumerate() {
            keep(thread, &(n % allowed).to_string()).ok();
        }
        EmulatedCpusStay(cpus)
    }
}

fn keep(thread: &str, cpus: &str) -> Ran {
    let mut taskset = Command::new("taskset");
    taskset.args(["-cp", cpus, thread]);
    run(taskset, format!("taskset -cp {cpus} {thread}"))
}

impl Drop for EmulatedCpusStay {
    fn drop(&mut self) {
        for thread in &self.0 {
            // As before: anywhere. The kernel leaves out what there is not.
            keep(thread, "0-1023");
        }
    }
}

impl Drop for OwnHost {
    fn drop(&mut self) {
        self.command(&["down", "--discard"]);
    }
}
