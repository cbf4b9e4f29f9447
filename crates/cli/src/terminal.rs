//! The terminal itself: raw mode and hidden input, always put back.

use crate::error::{Error, Result};
use crate::harmless::Stream;
use crate::stderr;
use nix::sys::termios::{LocalFlags, SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use std::io::{self, BufRead, IsTerminal, Write};
use std::sync::Mutex;

/// What to put back if the program dies of a panic.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// Holds the terminal in another mode; dropping it puts the old one back.
pub struct Mode {
    repaint: bool,
}

impl Mode {
    /// Every key goes to the guest, and none is obeyed here.
    pub fn raw() -> Result<Self> {
        Self::enter(true, cfmakeraw)
    }

    fn hidden() -> Result<Self> {
        Self::enter(false, |termios| termios.local_flags.remove(LocalFlags::ECHO))
    }

    fn enter(repaint: bool, change: impl FnOnce(&mut Termios)) -> Result<Self> {
        let stdin = io::stdin();
        let mut termios = tcgetattr(&stdin).map_err(io::Error::from)?;
        *BEFORE.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(termios.clone());
        change(&mut termios);
        tcsetattr(&stdin, SetArg::TCSADRAIN, &termios).map_err(io::Error::from)?;
        Ok(Self { repaint })
    }
}

impl Drop for Mode {
    fn drop(&mut self) {
        restore();
        if self.repaint && io::stdout().is_terminal() {
            let mut out = io::stdout();
            let _ = out.write_all(Stream::restore().as_bytes());
            let _ = out.flush();
        }
    }
}

/// Puts the terminal back in the mode in which it was found.
pub fn restore() {
    let before = BEFORE.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
    if let Some(termios) = before {
        let _ = tcsetattr(io::stdin(), SetArg::TCSADRAIN, &termios);
    }
}

/// Asks for a line; an empty one means `default`.
pub fn ask(what: &str, default: Option<&str>) -> Result<String> {
    let shown = default.map(|default| format!(" [{default}]")).unwrap_or_default();
    stderr::write(&format!("{what}{shown}: "));
    let line = read_line()?;
    match (line.as_str(), default) {
        ("", Some(default)) => Ok(default.to_owned()),
        ("", None) => Err(Error::Usage(format!("{what} is needed"))),
        _ => Ok(line),
    }
}

/// Asks for a line that is not shown.
pub fn ask_hidden(what: &str) -> Result<String> {
    stderr::write(&format!("{what} (not shown): "));
    let mode = Mode::hidden()?;
    let line = read_line();
    drop(mode);
    stderr::line("");
    line
}

fn read_line() -> Result<String> {
    let mut line = String::new();
    if io::stdin().lock().read_line(&mut line)? == 0 {
        return Err(Error::Usage("the input ended before everything was answered".to_owned()));
    }
    Ok(line.trim().to_owned())
}
