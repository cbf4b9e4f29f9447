//! The status file: one JSON object per line, appended by the monitor, read by the agent.
//!
//! Times are CLOCK_BOOTTIME nanoseconds, so that a reader on the same boot can date an event exactly, however late
//! it reads, and no two wall clocks are compared.

use std::fs::File;
use std::io::Write;

use serde::{Deserialize, Serialize};

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The machine is built, its threads are parked and locked down.
    Built {
        /// When.
        boottime_ns: u64,
        /// The monitor's process id.
        pid: u32,
        /// The monitor's version.
        version: String,
    },
    /// vCPUs run for the first time.
    VcpusRunning {
        /// When they were let go: no instruction of the guest is older.
        boottime_ns: u64,
    },
    /// The guest reset itself and was started again in the same process.
    GuestReset {
        /// When.
        boottime_ns: u64,
    },
    /// The monitor is about to end.
    Exited {
        /// When.
        boottime_ns: u64,
        /// What kind of end.
        reason: ExitReason,
        /// The process exit code (see [`crate::exit::ExitCode`]).
        code: i32,
        /// One sentence or more for people.
        message: String,
    },
}

/// Why the monitor ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitReason {
    /// The guest powered off.
    PowerOff,
    /// The guest reset and the configuration says to end then.
    Reset,
    /// The guest crashed.
    Crash,
    /// The API or a signal ended it.
    KilledByApi,
    /// An error of the monitor, the host or KVM.
    Error,
    /// A forbidden system call.
    Seccomp,
}

/// CLOCK_BOOTTIME now, in nanoseconds.
#[must_use]
pub fn boottime_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is a valid timespec that outlives the call; CLOCK_BOOTTIME exists since Linux 2.6.39.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut now) };
    debug_assert_eq!(result, 0);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

/// Appends events to the handed descriptor. A status file that is full or gone never stops a guest.
#[derive(Debug, Default)]
pub struct StatusWriter {
    file: Option<File>,
}

impl StatusWriter {
    /// Writes to `file`, or nowhere.
    #[must_use]
    pub const fn new(file: Option<File>) -> Self {
        Self { file }
    }

    /// The descriptor, for the handler of forbidden system calls.
    #[must_use]
    pub fn raw_fd(&self) -> Option<std::os::fd::RawFd> {
        self.file.as_ref().map(std::os::fd::AsRawFd::as_raw_fd)
    }

    /// Appends one event as one write.
    pub fn append(&mut self, event: &Event) {
        let Some(file) = &mut self.file else { return };
        let Ok(mut line) = serde_json::to_string(event) else { return };
        line.push('\n');
        if let Err(error) = file.write_all(line.as_bytes()) {
            crate::log::line(&format!("the status file cannot be written: {error}"));
        }
    }
}

/// Parses the text of a status file. A last line without its newline (still being written, or cut by a crash) is
/// left out; a line that is no event is an error that names its number.
///
/// # Errors
/// The number and the text of the first broken line.
pub fn parse(text: &str) -> Result<Vec<Event>, String> {
    let mut events = Vec::new();
    for (index, line) in text.split_inclusive('\n').enumerate() {
        let Some(line) = line.strip_suffix('\n') else { break };
        if line.trim().is_empty() {
            continue;
        }
        let event = serde_json::from_str(line)
            .map_err(|error| format!("status file, line {}: {error}: {line:?}", index + 1))?;
        events.push(event);
    }
    Ok(events)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_events_are_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("status");
        let mut writer = StatusWriter::new(Some(File::create(&path).unwrap()));
        let events = vec![
            Event::Built { boottime_ns: 1, pid: 7, version: "0.1.0".into() },
            Event::VcpusRunning { boottime_ns: 2 },
            Event::GuestReset { boottime_ns: 3 },
            Event::Exited {
                boottime_ns: 4,
                reason: ExitReason::Crash,
                code: 4,
                message: "triple fault".into(),
            },
        ];
        for event in &events {
            writer.append(event);
        }
        let text = std::fs::read_to_string(path).unwrap();
        assert_eq!(parse(&text).unwrap(), events);
        assert!(text.starts_with("{\"event\":\"built\","), "{text}");
        assert!(text.contains("{\"event\":\"vcpus_running\",\"boottime_ns\":2}\n"), "{text}");
    }

    #[test]
    fn a_cut_last_line_is_left_out_and_a_broken_one_is_named() {
        let good = "{\"event\":\"vcpus_running\",\"boottime_ns\":5}\n";
        assert_eq!(parse(&format!("{good}{{\"event\":\"exi")).unwrap().len(), 1);
        let error = parse(&format!("{good}nonsense\n")).unwrap_err();
        assert!(error.contains("line 2"), "{error}");
    }

    #[test]
    fn boottime_runs() {
        let first = boottime_ns();
        assert!(first > 0 && boottime_ns() >= first);
    }
}
