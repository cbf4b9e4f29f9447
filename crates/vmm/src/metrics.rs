//! Metrics as lines of JSON in a file or pipe, in the shape of Firecracker's `PUT /metrics`.
//!
//! Firecracker's own counters have other names: a line here is what `GET /metrics` answers, with the time and what the log and the
//! metrics have missed. The main thread writes them, as a disk under a file may be slow and devices should not wait for it.

use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// How often a line is written, as Firecracker does.
pub const PERIOD: Duration = Duration::from_secs(60);

/// Where metrics go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MetricsConfig {
    /// A file that lines are appended to, or a named pipe.
    pub metrics_path: String,
}

/// Writes lines, each whole or not at all.
#[derive(Debug)]
pub struct MetricsWriter {
    file: File,
    /// The end of a line that the pipe had no room for.
    rest: Vec<u8>,
    missed: u64,
}

impl MetricsWriter {
    /// Writes to a file that never waits ([`crate::descriptors::Descriptors::output`]).
    #[must_use]
    pub const fn new(file: File) -> Self {
        Self { file, rest: Vec::new(), missed: 0 }
    }

    /// Writes a line.
    ///
    /// # Errors
    /// Why it is missed: the pipe is full, or the file cannot be written. The machine goes on.
    pub fn write(&mut self, metrics: &impl Serialize) -> io::Result<()> {
        let mut line = json!(metrics);
        line["utc_timestamp_ms"] = json!(now_ms());
        line["logger"] =
            json!({ "missed_log_count": crate::log::missed(), "missed_metrics_count": self.missed });
        let result = self.write_line(&line);
        self.missed += u64::from(result.is_err());
        result
    }

    fn write_line(&mut self, line: &Value) -> io::Result<()> {
        self.write_rest()?;
        self.rest = line.to_string().into_bytes();
        self.rest.push(b'\n');
        let whole = self.rest.len();
        match self.write_rest() {
            // It has begun, and will be whole before the next one.
            Err(_) if self.rest.len() < whole => Ok(()),
            Err(error) => {
                self.rest.clear();
                Err(error)
            }
            Ok(()) => Ok(()),
        }
    }

    fn write_rest(&mut self) -> io::Result<()> {
        while !self.rest.is_empty() {
            match self.file.write(&self.rest) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(count) => drop(self.rest.drain(..count)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::{AsRawFd, OwnedFd};

    use super::*;

    /// Lines longer than what a pipe takes whole: one that had begun is ended before the next, however late that is.
    #[test]
    fn a_line_that_had_begun_is_ended_first() {
        let (mut reader, writer) = io::pipe().unwrap();
        for descriptor in [reader.as_raw_fd(), writer.as_raw_fd()] {
            // SAFETY: sets a flag of an open descriptor.
            assert_eq!(unsafe { libc::fcntl(descriptor, libc::F_SETFL, libc::O_NONBLOCK) }, 0);
        }
        let mut writer = MetricsWriter::new(File::from(OwnedFd::from(writer)));
        let line = |number: usize| json!({ "number": number, "text": "x".repeat(10_000) });
        let mut written = 0;
        while writer.rest.is_empty() {
            writer.write(&line(written)).unwrap();
            written += 1;
            assert!(written < 10_000, "a pipe without an end");
        }
        assert!(writer.write(&line(written)).is_err());
        let mut text = Vec::new();
        let _ = reader.read_to_end(&mut text);
        writer.write(&line(written)).unwrap();
        let _ = reader.read_to_end(&mut text);
        let lines: Vec<Value> = text
            .split_inclusive(|byte| *byte == b'\n')
            .map(|line| serde_json::from_slice(line).unwrap())
            .collect();
        let numbers: Vec<usize> =
            lines.iter().map(|line| usize::try_from(line["number"].as_u64().unwrap()).unwrap()).collect();
        assert_eq!(numbers, (0..=written).collect::<Vec<_>>());
        assert_eq!(lines[written]["logger"]["missed_metrics_count"], json!(1));
    }
}
