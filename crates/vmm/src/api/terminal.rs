//! In stand-alone mode on a terminal, the terminal is the guest's console: characters go to it one by one, unechoed.
//! Ctrl-C still ends the monitor.

use std::sync::Mutex;

static SAVED: Mutex<Option<libc::termios>> = Mutex::new(None);

/// Sets stdin's terminal to console mode, if it is one.
pub fn make_raw() {
    // SAFETY: a zeroed termios is a valid value, and tcgetattr fills it.
    let mut mode: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: the mode is valid; on what is no terminal the call fails.
    if unsafe { libc::tcgetattr(libc::STDIN_FILENO, &raw mut mode) } < 0 {
        return;
    }
    if let Ok(mut saved) = SAVED.lock() {
        *saved = Some(mode);
    }
    mode.c_lflag &= !(libc::ICANON | libc::ECHO);
    mode.c_iflag &= !libc::ICRNL;
    // SAFETY: the mode is valid.
    unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, &raw const mode) };
}

/// Puts the terminal's mode back.
pub fn restore() {
    let Ok(mut saved) = SAVED.try_lock() else { return };
    if let Some(mode) = saved.take() {
        // SAFETY: the mode is one that tcgetattr gave.
        unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, &raw const mode) };
    }
}
