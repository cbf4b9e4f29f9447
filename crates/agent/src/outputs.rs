//! Files that a monitor writes, read and truncated within bounds. A compromised monitor can append
//! to them, overwrite them and lengthen them.

use crate::error::{Error, Result};
use crate::names::Folders;
use roost_types::ids::InstanceId;
use roost_vmm::console;
use roost_vmm::status::Event;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;

/// Bytes that are read of a file's beginning, where a status file dates the begin of its vCPUs.
const HEAD: u64 = 4 << 10;
/// Bytes that are read of a file's end.
const TAIL: u64 = 60 << 10;
/// Status file and log are cut to [`HEAD`] and [`TAIL`] beyond this many bytes.
pub const LONGEST: u64 = 1 << 20;
/// Most bytes of a sentence that a monitor adds to a report.
pub const MESSAGE: usize = 1 << 10;

/// Reads the events in the first 4 KiB and the last 60 KiB of a status file. A line that is no
/// event is skipped.
pub fn read_status(path: &Path) -> Vec<Event> {
    let text = ends(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    // A last line without its newline is still being written, or was cut by a crash.
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let event = |line: &str| serde_json::from_str(line).ok().map(clipped);
    whole.lines().filter_map(event).collect()
}

/// The last lines of a monitor's log.
pub fn tail(path: &Path) -> String {
    let text = ends(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let mut lines: Vec<&str> = text.lines().rev().take(3).collect();
    lines.reverse();
    if lines.is_empty() { "without a word".into() } else { clip(lines.join("; "), Keep::End) }
}

fn clipped(event: Event) -> Event {
    match event {
        Event::Exited { boottime_ns, reason, code, message } => {
            Event::Exited { boottime_ns, reason, code, message: clip(message, Keep::Beginning) }
        }
        event => event,
    }
}

#[derive(Clone, Copy)]
enum Keep {
    Beginning,
    End,
}

/// Cuts a text to at most [`MESSAGE`] bytes; `…` marks the cut.
fn clip(text: String, keep: Keep) -> String {
    if text.len() <= MESSAGE {
        return text;
    }
    let room = MESSAGE - '…'.len_utf8();
    match keep {
        Keep::Beginning => format!("{}…", &text[..text.floor_char_boundary(room)]),
        Keep::End => format!("…{}", &text[text.ceil_char_boundary(text.len() - room)..]),
    }
}

/// A file's beginning and end, or the whole of a short file. The line at the gap is skipped.
fn ends(path: &Path) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    let mut bytes = Vec::new();
    if length <= HEAD + TAIL {
        file.take(HEAD + TAIL).read_to_end(&mut bytes)?;
        return Ok(bytes);
    }
    (&file).take(HEAD).read_to_end(&mut bytes)?;
    bytes.truncate(bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1));
    file.seek(SeekFrom::Start(length - TAIL))?;
    let mut last = Vec::new();
    file.take(TAIL).read_to_end(&mut last)?;
    let from = last.iter().position(|byte| *byte == b'\n').map_or(last.len(), |at| at + 1);
    bytes.extend_from_slice(&last[from..]);
    Ok(bytes)
}

/// Cuts the instance's status file, log and console to the bytes that are read, if its monitor made
/// them longer.
///
/// # Errors
/// A file that is there cannot be cut.
pub fn keep_short(folders: &Folders, id: &InstanceId) -> Result<()> {
    for path in [folders.status(id), folders.monitor_log(id)] {
        if length(&path) > LONGEST {
            tracing::warn!(instance = %id, file = %path.display(), "cut: its monitor wrote more than 1 MiB");
            cut(&path).map_err(Error::file("cut", &path))?;
        }
    }
    let path = folders.console(id);
    if length(&path) > console::FILE_SIZE {
        tracing::warn!(instance = %id, file = %path.display(), "cut: a console ring has one size");
        let file = File::options().write(true).open(&path);
        let cut = file.and_then(|file| file.set_len(console::FILE_SIZE));
        cut.map_err(Error::file("cut", &path))?;
    }
    Ok(())
}

fn length(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |meta| meta.len())
}

/// The monitor keeps appending. Bytes written during the cut may be lost.
fn cut(path: &Path) -> io::Result<()> {
    let kept = ends(path)?;
    let mut file = File::options().append(true).open(path)?;
    file.set_len(0)?;
    file.write_all(&kept)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::ensure;
    use std::time::{Duration, Instant};

    const BEGAN: &str = "{\"event\":\"vcpus_running\",\"boottime_ns\":5}\n";

    fn world() -> (tempfile::TempDir, Folders, InstanceId) {
        let folder = tempfile::tempdir().unwrap();
        let folders =
            Folders { state: folder.path().into(), run: "/nowhere".into(), netns: "/nowhere".into() };
        let id = ensure(1).instance_id;
        fs::create_dir_all(folders.instance(&id)).unwrap();
        (folder, folders, id)
    }

    fn exited(message: &str) -> String {
        format!(
            "{{\"event\":\"exited\",\"boottime_ns\":9,\"reason\":\"error\",\"code\":1,\"message\":\"{message}\"}}\n"
        )
    }

    #[test]
    fn a_status_file_of_4_gib_is_read_in_no_time_and_its_first_and_last_events_are_known() {
        let (_folder, folders, id) = world();
        let path = folders.status(&id);
        fs::write(&path, BEGAN).unwrap();
        let mut file = File::options().append(true).open(&path).unwrap();
        file.set_len(4 << 30).unwrap();
        file.write_all(format!("\n{}", exited("the end")).as_bytes()).unwrap();
        let begin = Instant::now();
        let events = read_status(&path);
        assert!(begin.elapsed() < Duration::from_millis(500), "{:?}", begin.elapsed());
        assert_eq!(events[0], Event::VcpusRunning { boottime_ns: 5 });
        assert!(
            matches!(&events[1..], [Event::Exited { message, .. }] if message == "the end"),
            "{events:?}"
        );
    }

    #[test]
    fn a_million_lines_and_a_message_of_17_mib_leave_a_short_report() {
        let (_folder, folders, id) = world();
        let path = folders.status(&id);
        fs::write(&path, "{\"event\":\"guest_reset\",\"boottime_ns\":7}\n".repeat(1_000_000)).unwrap();
        assert!(read_status(&path).len() < 2000);
        // A line longer than the bound is no event, and no other line is lost.
        fs::write(&path, format!("{BEGAN}{}", exited(&"x".repeat(17 << 20)))).unwrap();
        assert_eq!(read_status(&path), [Event::VcpusRunning { boottime_ns: 5 }]);
        fs::write(&path, format!("{BEGAN}{}", exited(&"ü".repeat(20 << 10)))).unwrap();
        let events = read_status(&path);
        let Some(Event::Exited { message, .. }) = events.get(1) else { panic!("{events:?}") };
        assert!(message.len() <= MESSAGE && message.ends_with("ü…"), "{} bytes", message.len());
        fs::write(folders.monitor_log(&id), "y".repeat(3 << 20)).unwrap();
        assert!(tail(&folders.monitor_log(&id)).len() <= MESSAGE);
    }

    #[test]
    fn a_broken_or_cut_line_hides_no_other() {
        let (_folder, folders, id) = world();
        let path = folders.status(&id);
        fs::write(&path, format!("\u{0}\n{BEGAN}nonsense\n{}{{\"event\":\"exi", exited("gone"))).unwrap();
        assert_eq!(read_status(&path).len(), 2);
        assert_eq!(read_status(Path::new("/no/such/status")), []);
    }

    #[test]
    fn what_a_monitor_makes_longer_than_it_may_be_is_cut_and_written_on() {
        let (_folder, folders, id) = world();
        let (status, log, ring) = (folders.status(&id), folders.monitor_log(&id), folders.console(&id));
        for path in [&status, &log, &ring] {
            let mut file = File::create(path).unwrap();
            file.write_all(BEGAN.as_bytes()).unwrap();
            file.set_len(1 << 40).unwrap();
        }
        let mut monitor = File::options().append(true).open(&status).unwrap();
        writeln!(monitor).unwrap();
        keep_short(&folders, &id).unwrap();
        for path in [&status, &log] {
            assert!(length(path) <= HEAD + TAIL, "{}: {}", path.display(), length(path));
        }
        assert_eq!(length(&ring), console::FILE_SIZE);
        monitor.write_all(exited("after the cut").as_bytes()).unwrap();
        assert_eq!(read_status(&status).len(), 2);

        // A short file stays unchanged.
        let before = fs::read(&status).unwrap();
        keep_short(&folders, &id).unwrap();
        assert_eq!(fs::read(&status).unwrap(), before);
        fs::remove_file(&log).unwrap();
        keep_short(&folders, &id).unwrap();
    }
}
