//! Lines for people: on stderr, each with the instance's id in front, or in the log that the machine's owner names (`PUT /logger`).
//!
//! Nothing here may fail or block the monitor: a stderr that is gone is ignored, and a line that the log has no room for is counted.

pub mod config;
mod time;

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, RawFd};
use std::panic::Location;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

pub use config::{Level, LoggerConfig};

/// Longest line: a pipe takes so much whole or not at all (`PIPE_BUF`).
const MAX_LINE: usize = 4096;

static ID: OnceLock<String> = OnceLock::new();
static LOGGER: Mutex<Option<Logger>> = Mutex::new(None);
static MISSED: AtomicU64 = AtomicU64::new(0);
/// The log's descriptor, for signal handlers, which may take no lock; -1: there is none.
static DESCRIPTOR: AtomicI32 = AtomicI32::new(-1);

/// Where lines go and what they look like, if anybody has said so.
struct Logger {
    config: LoggerConfig,
    /// Nothing: stderr.
    file: Option<File>,
}

/// Sets the instance's id (once; later calls change nothing).
pub fn set_id(id: &str) {
    let _ = ID.set(id.to_owned());
}

/// Sets the log. A file of before that is not replaced stays.
pub fn configure(config: LoggerConfig, file: Option<File>) {
    let mut logger = LOGGER.lock().unwrap_or_else(PoisonError::into_inner);
    let before = logger.take().and_then(|before| before.file);
    let (file, replaced) = if file.is_some() { (file, before) } else { (before, None) };
    DESCRIPTOR.store(file.as_ref().map_or(-1, AsRawFd::as_raw_fd), Ordering::SeqCst);
    *logger = Some(Logger { config, file });
    // A handler may have been at it until here.
    drop(replaced);
}

/// Where a signal handler says what ends the machine, beside stderr.
pub(crate) fn descriptor() -> Option<RawFd> {
    Some(DESCRIPTOR.load(Ordering::SeqCst)).filter(|descriptor| *descriptor >= 0)
}

/// Lines that could not be written.
#[must_use]
pub fn missed() -> u64 {
    MISSED.load(Ordering::Relaxed)
}

/// Writes one line about what ends the machine.
#[track_caller]
pub fn error(text: &str) {
    write(Level::Error, || text.to_owned(), Location::caller());
}

/// Writes one line on stderr if the log goes elsewhere. The line tells the caller why the machine
/// does not start.
pub fn beside_the_log(text: &str) {
    let logger = LOGGER.lock().unwrap_or_else(PoisonError::into_inner);
    if logger.as_ref().is_some_and(|logger| logger.file.is_some()) {
        to_stderr(text);
    }
}

fn to_stderr(text: &str) {
    let id = ID.get().map(|id| format!("[{id}]")).unwrap_or_default();
    let _ = std::io::stderr().write_all(format!("roost-vmm{id}: {text}\n").as_bytes());
}

/// Writes one line about what goes wrong while the machine goes on.
#[track_caller]
pub fn line(text: &str) {
    write(Level::Warning, || text.to_owned(), Location::caller());
}

/// Writes one line about what happens to the machine.
#[track_caller]
pub fn info(text: &str) {
    write(Level::Info, || text.to_owned(), Location::caller());
}

/// Writes one line for who looks for a fault; it is made only if it is wanted.
#[track_caller]
pub fn debug(text: impl FnOnce() -> String) {
    write(Level::Debug, text, Location::caller());
}

/// Prints a command's output on stdout. A closed stdout is no error.
///
/// # Errors
/// [`Error::Io`](crate::Error::Io) if stdout accepts no bytes, such as on a full disk.
pub fn print(text: &str) -> crate::Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(crate::Error::io("writing to stdout")(error))
        }
        _ => Ok(()),
    }
}

fn write(level: Level, text: impl FnOnce() -> String, origin: &Location<'_>) {
    let logger = LOGGER.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(Logger { config, file }) = &*logger else {
        if level <= Level::Info {
            to_stderr(&text());
        }
        return;
    };
    if !config.takes(level, &module(origin.file())) {
        return;
    }
    let mut line = format_line(config, level, origin, &text());
    line.truncate(line.floor_char_boundary(MAX_LINE - 1));
    line.push('\n');
    let written = match file {
        Some(file) => (&mut &*file).write_all(line.as_bytes()),
        None => std::io::stderr().write_all(line.as_bytes()),
    };
    MISSED.fetch_add(u64::from(written.is_err()), Ordering::Relaxed);
}

/// As Firecracker's lines: time, instance, thread, and what else is asked for.
fn format_line(config: &LoggerConfig, level: Level, origin: &Location<'_>, text: &str) -> String {
    let id = ID.get().map_or("anonymous", String::as_str);
    let thread = std::thread::current();
    let thread = thread.name().filter(|name| *name != "main").unwrap_or(crate::threads::API);
    let mut line = format!("{} [{id}:{thread}", time::now());
    if config.show_level == Some(true) {
        line.push(':');
        line.push_str(level.in_line());
    }
    if config.show_log_origin == Some(true) {
        line.push_str(&format!(":{}:{}", origin.file(), origin.line()));
    }
    line.push_str("] ");
    line.push_str(&text.replace('\n', "\\n"));
    line
}

/// The module that a file of the program is.
fn module(file: &str) -> String {
    let path = file.rsplit_once("src/").map_or(file, |(_, path)| path);
    let path = path.strip_suffix(".rs").unwrap_or(path);
    path.strip_suffix("/mod").unwrap_or(path).replace('/', "::")
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
    #[track_caller]
    pub fn line(&self, text: impl FnOnce() -> String) {
        let n = self.0.load(Ordering::Relaxed);
        if n > Self::MAX {
            return;
        }
        self.0.store(n + 1, Ordering::Relaxed);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_what_is_asked_for() {
        let origin = Location::caller();
        let line = |text: &str| {
            let line = format_line(&serde_json::from_str(text).unwrap(), Level::Info, origin, "a\nb");
            line.split_once(" [").unwrap().1.to_owned()
        };
        let thread = std::thread::current().name().unwrap().to_owned();
        assert_eq!(line("{}"), format!("anonymous:{thread}] a\\nb"));
        let place = format!("{}:{}", origin.file(), origin.line());
        assert_eq!(
            line(r#"{"show_level":true,"show_log_origin":true}"#),
            format!("anonymous:{thread}:INFO:{place}] a\\nb")
        );
        assert_eq!(module(origin.file()), "log");
        assert_eq!(module("crates/vmm/src/devices/virtio/block/uring.rs"), "devices::virtio::block::uring");
    }
}
