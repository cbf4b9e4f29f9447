//! Lines for people, on stderr, each with the instance's id in front.
//!
//! Nothing here may fail or block the monitor: a stderr that is gone is ignored.

use std::io::Write;
use std::sync::OnceLock;

static PREFIX: OnceLock<String> = OnceLock::new();

/// Sets what stands in front of each line (once; later calls change nothing).
pub fn set_id(id: &str) {
    let _ = PREFIX.set(format!("roost-vmm[{id}]"));
}

/// Writes one line.
pub fn line(text: &str) {
    let prefix = PREFIX.get().map_or("roost-vmm", String::as_str);
    let _ = std::io::stderr().write_all(format!("{prefix}: {text}\n").as_bytes());
}

/// Writes the first few lines that one place produces, then one that says it goes quiet: a hostile guest must not
/// fill the host's log.
#[derive(Debug)]
pub struct Limited(std::sync::atomic::AtomicU32);

impl Limited {
    /// How many lines one place may write.
    pub const MAX: u32 = 10;

    /// A fresh limiter.
    #[must_use]
    pub const fn new() -> Self {
        Self(std::sync::atomic::AtomicU32::new(0))
    }

    /// Writes the line unless this place has written enough.
    pub fn line(&self, text: impl FnOnce() -> String) {
        let n = self.0.load(std::sync::atomic::Ordering::Relaxed);
        if n > Self::MAX {
            return;
        }
        self.0.store(n + 1, std::sync::atomic::Ordering::Relaxed);
        if n == Self::MAX {
            line("(more of the same is not shown)");
        } else {
            line(&text());
        }
    }
}

impl Default for Limited {
    fn default() -> Self {
        Self::new()
    }
}
