//! The guest's init: one line, then nothing.

use std::fs::{self, OpenOptions};
use std::io::Write;

use crate::host::mount;

/// What the guest says when it is up.
pub const LINE: &str = "the guest is up";

pub fn run() -> ! {
    // Whatever fails here is seen by the line that does not come.
    let _ = fs::create_dir_all("/dev");
    let _ = mount("devtmpfs", "/dev");
    if let Ok(mut console) = OpenOptions::new().write(true).open("/dev/console") {
        let _ = console.write_all(LINE.as_bytes());
        let _ = console.write_all(b"\n");
    }
    loop {
        // SAFETY: waits for a signal, of which none comes.
        unsafe { libc::pause() };
    }
}
