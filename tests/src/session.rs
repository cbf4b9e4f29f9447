//! A `roost` command that goes on while a test does: a console that is followed or typed on.

use crate::{Tenant, tail, wait_for};
use std::io::{Read, Write};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A running command; it is killed when the value goes.
pub struct Session {
    what: String,
    child: Child,
    stdin: Option<ChildStdin>,
    shown: Arc<Mutex<Vec<u8>>>,
}

impl Session {
    /// Starts `roost` as an account.
    #[track_caller]
    pub fn start(tenant: &Tenant<'_>, args: &[&str]) -> Session {
        let mut child = Command::new(tenant.rig.bin.join("roost"))
            .env("ROOST_CONFIG", &tenant.rig.config)
            .args(["--profile", &tenant.profile])
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let shown = Arc::new(Mutex::new(Vec::new()));
        let (mut stdout, sink) = (child.stdout.take().unwrap(), Arc::clone(&shown));
        // Ends with the command.
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = stdout.read(&mut bytes) {
                sink.lock().unwrap_or_else(PoisonError::into_inner).extend(&bytes[..count]);
            }
        });
        let stdin = child.stdin.take();
        Session { what: format!("roost {}", args.join(" ")), child, stdin, shown }
    }

    /// What it has printed.
    #[must_use]
    pub fn shown(&self) -> String {
        String::from_utf8_lossy(&self.shown.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }

    /// Types a line.
    #[track_caller]
    pub fn enter(&mut self, line: &str) {
        let stdin = self.stdin.as_mut().unwrap();
        writeln!(stdin, "{line}").and_then(|()| stdin.flush()).unwrap();
    }

    /// Waits until `pick` finds something in what was printed.
    #[track_caller]
    pub fn wait<T>(&self, what: &str, limit: Duration, pick: impl Fn(&str) -> Option<T>) -> T {
        wait_for(&format!("{what} from {}", self.what), limit, || {
            let shown = self.shown();
            pick(&shown).ok_or_else(|| tail(&shown))
        })
    }

    /// Waits until it has printed a text.
    #[track_caller]
    pub fn wait_text(&self, text: &str, limit: Duration) {
        self.wait(&format!("{text:?}"), limit, |shown| shown.contains(text).then_some(()));
    }

    /// Whether it prints a text in time.
    #[must_use]
    pub fn shows(&self, text: &str, limit: Duration) -> bool {
        let began = Instant::now();
        while !self.shown().contains(text) {
            if began.elapsed() > limit {
                return false;
            }
            std::thread::sleep(Duration::from_millis(200));
        }
        true
    }

    /// Waits until it ends by itself.
    #[track_caller]
    pub fn wait_end(&mut self, limit: Duration) -> ExitStatus {
        let (child, shown) = (&mut self.child, &self.shown);
        wait_for(&format!("the end of {}", self.what), limit, || {
            child.try_wait().unwrap().ok_or_else(|| {
                tail(&String::from_utf8_lossy(&shown.lock().unwrap_or_else(PoisonError::into_inner)))
            })
        })
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
