//! Processes of other programs: finding them again, waiting for their end, ending them.

use super::{Error, Result};
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// How often a condition is looked at that nothing announces.
pub(super) const POLL: Duration = Duration::from_millis(50);

/// A process that may not be our child. The start time tells it from a later one with the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Process {
    pub pid: u32,
    pub started: u64,
}

impl Process {
    /// The process with this number, if it lives now.
    pub fn find(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let started = start_time(&stat)?;
        Some(Self { pid, started })
    }

    /// A process that was started with this word on its command line, if there is one.
    pub fn started_with(word: &str) -> Option<Self> {
        let numbers =
            fs::read_dir("/proc").ok()?.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok());
        numbers.filter(|&pid| pid != std::process::id()).find_map(|pid: u32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            line.split(|&byte| byte == 0).any(|found| found == word.as_bytes()).then(|| Self::find(pid))?
        })
    }

    pub fn lives(self) -> bool {
        Self::find(self.pid) == Some(self)
    }

    /// False when it still lives after `limit`.
    pub fn wait(self, limit: Duration) -> bool {
        let began = Instant::now();
        while self.lives() {
            if began.elapsed() > limit {
                return false;
            }
            sleep(POLL);
        }
        true
    }

    /// Asks with SIGTERM, then insists.
    pub fn end(self, patience: Duration) {
        for signal in ["TERM", "KILL"] {
            if !self.lives() {
                return;
            }
            let _ = Command::new("kill")
                .args(["-s", signal, &self.pid.to_string()])
                .stderr(Stdio::null())
                .status();
            self.wait(patience);
        }
    }
}

/// Field 22 of proc(5) `/proc/PID/stat`, unless the process is dead and only waits to be collected. The
/// second field is the program's name, in parentheses and with anything inside.
fn start_time(stat: &str) -> Option<u64> {
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    match *fields.first()? {
        "Z" | "X" => None,
        _ => fields.get(19)?.parse().ok(),
    }
}

/// Runs a program to its end and returns its standard output; its standard error becomes the error's text.
pub(super) fn run(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output =
        command.stdin(Stdio::null()).output().map_err(|error| Error::program(&program, error.to_string()))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        let words = String::from_utf8_lossy(&output.stderr);
        Err(Error::program(&program, format!("{}: {}", output.status, words.trim())))
    }
}

/// Waits for a file that another process is about to put in place.
pub(super) fn wait_for_file(path: &Path) -> Result<()> {
    let began = Instant::now();
    while !path.exists() {
        if began.elapsed() > Duration::from_secs(10) {
            return Err(Error::file("cannot find", path)(std::io::ErrorKind::NotFound.into()));
        }
        sleep(POLL);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{Process, start_time};
    use std::io::Read;
    use std::process::{Command, Stdio};

    #[test]
    fn a_start_time_is_read_past_any_program_name() {
        let tail = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 777 20";
        assert_eq!(start_time(&format!("12 (a) b (c) {tail}")), Some(777));
        assert_eq!(start_time(&format!("12 (sh) {}", tail.replacen('S', "Z", 1))), None);
        assert_eq!(start_time("nonsense"), None);
    }

    #[test]
    fn a_process_is_found_by_a_word_of_its_command_line() {
        let word = format!("roost-test-{}", std::process::id());
        assert_eq!(Process::started_with(&word), None);
        let mut child = Command::new("sh")
            .args(["-c", "echo; read line; :", &word])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("sh is there");
        // A new program's command line is readable a little later than `spawn` returns: once it speaks, it is.
        child.stdout.take().expect("piped").read_exact(&mut [0]).expect("it says a line");
        let (found, other) = (Process::started_with(&word), Process::started_with(&word[1..]));
        child.kill().and_then(|()| child.wait()).expect("it is ours");
        assert_eq!(found.map(|process| process.pid), Some(child.id()));
        assert_eq!(other, None, "a whole word");
    }

    #[test]
    fn this_process_lives_and_one_with_another_start_time_does_not() {
        let me = Process::find(std::process::id()).expect("/proc is mounted");
        assert!(me.lives());
        assert!(!Process { started: me.started + 1, ..me }.lives());
    }
}
