//! Results on standard output: tables for people, the API's own responses as JSON for programs.

pub mod format;
mod json;
#[cfg(test)]
pub mod samples;
mod table;
pub mod views;

pub use table::{Table, Tone};

use crate::args::Format;
use crate::error::{Error, Result};
use crate::{harmless, stderr};
use serde::Serialize;
use std::io::{IsTerminal, Write};

/// Where results go, and in which shape.
#[derive(Debug)]
pub struct Output {
    format: Format,
    quiet: bool,
    color: bool,
    terminal: bool,
}

impl Output {
    /// For standard output as it is.
    pub fn new(format: Format, quiet: bool, no_color: bool) -> Self {
        let terminal = std::io::stdout().is_terminal();
        let plain = no_color || std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self { format, quiet, color: terminal && !plain, terminal }
    }

    /// Prints a response: as JSON, or as this table.
    pub fn response<T: Serialize>(&self, response: &T, table: impl FnOnce() -> Table) -> Result<()> {
        match self.format {
            Format::Json => self.json(response),
            Format::Table => {
                let (text, hidden) = table().render(self.terminal.then_some(()), self.color);
                self.write(&text)?;
                if !hidden.is_empty() {
                    self.note(&format!(
                        "(no room for {}: widen the terminal, or --output json)",
                        hidden.join(", ")
                    ));
                }
                Ok(())
            }
        }
    }

    /// Prints a response: as JSON, or as these lines.
    pub fn lines<T: Serialize>(&self, response: &T, lines: impl FnOnce() -> String) -> Result<()> {
        match self.format {
            Format::Json => self.json(response),
            Format::Table => self.write(&harmless::lines(&lines())),
        }
    }

    /// The JSON text of a value: printable ASCII controls and all else that a terminal could obey is escaped.
    pub fn json_text<T: Serialize>(&self, value: &T) -> Result<String> {
        json::text(value).map_err(|error| Error::Internal(error.to_string()))
    }

    /// Prints a value as JSON.
    pub fn json<T: Serialize>(&self, value: &T) -> Result<()> {
        self.write(&self.json_text(value)?)
    }

    /// Prints text, with a line end if it has none.
    pub fn write(&self, text: &str) -> Result<()> {
        let mut out = std::io::stdout().lock();
        out.write_all(text.as_bytes())?;
        if !text.is_empty() && !text.ends_with('\n') {
            out.write_all(b"\n")?;
        }
        out.flush()?;
        Ok(())
    }

    /// A remark for the user, on standard error.
    pub fn note(&self, text: &str) {
        if !self.quiet {
            stderr::line(&harmless::lines(text));
        }
    }
}
