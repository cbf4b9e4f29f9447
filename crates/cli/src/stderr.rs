//! Standard error: where progress, notes and errors go. Nobody need read it, so that a closed or full one changes
//! nothing, least of all the exit code.

use std::io::{self, Write};

/// Says a line.
pub fn line(text: &str) {
    write(&format!("{text}\n"));
}

/// Says a text that the user goes on with in the same line.
pub fn write(text: &str) {
    let mut out = io::stderr().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}
