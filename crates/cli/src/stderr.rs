//! Standard error, for progress, notes and errors. A closed or full stderr changes nothing, least
//! of all the exit code.

use std::io::{self, Write};

/// Prints a line.
pub fn line(text: &str) {
    write(&format!("{text}\n"));
}

/// Prints a text to which the user's input is appended in the same line.
pub fn write(text: &str) {
    let mut out = io::stderr().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}
