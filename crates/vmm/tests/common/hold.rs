//! Stops a monitor at its first KVM_RUN, wherever in its threads that is, and holds it there: whatever it took to come
//! so far can be measured from outside, without the monitor's help and the same way for every monitor.

use std::io;
use std::os::fd::OwnedFd;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use super::notify::{self, Calls};

/// `_IO(KVMIO, 0x80)`.
const KVM_RUN: u32 = 0xae80;

/// A monitor that stands before its first KVM_RUN. Ends with this value.
pub struct Held {
    child: Child,
    /// As long as this is open, the call is not answered.
    _listener: OwnedFd,
    /// From just before the fork to the call.
    pub elapsed: Duration,
}

impl Held {
    /// Starts the program and waits until it makes the call.
    ///
    /// # Errors
    /// It does not start, ends, or makes no such call within `limit`.
    pub fn start(command: &mut Command, limit: Duration) -> io::Result<Self> {
        let start = Instant::now();
        let (mut child, listener) = notify::spawn(command, Calls::Ioctl(KVM_RUN))?;
        match notify::next(&listener, limit) {
            // The notification is never answered.
            Ok(Some(_)) => Ok(Self { child, _listener: listener, elapsed: start.elapsed() }),
            Ok(None) => {
                let _ = child.kill();
                Err(io::Error::other(format!("no KVM_RUN; it ended with {}", child.wait()?)))
            }
            Err(error) => {
                let _ = child.kill();
                child.wait()?;
                Err(error)
            }
        }
    }

    /// The monitor's process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
