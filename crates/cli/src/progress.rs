//! What is being waited for, said on standard error: a spinner on a terminal once a second has passed, otherwise one
//! line per change.

use crate::{harmless, stderr};
use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// Waits shorter than this are not worth a spinner.
const SILENT: Duration = Duration::from_secs(1);

/// A line is repeated after this long without a change.
const REPEATED: Duration = Duration::from_secs(5);

enum Shown {
    Nothing,
    Lines,
    Terminal(Option<ProgressBar>),
}

/// Progress of one wait.
pub struct Progress {
    shown: Shown,
    began: Instant,
    said: Instant,
    last: String,
}

impl Progress {
    /// Nothing has been said yet.
    pub fn new(quiet: bool) -> Self {
        let shown = match (quiet, std::io::stderr().is_terminal()) {
            (true, _) => Shown::Nothing,
            (false, true) => Shown::Terminal(None),
            (false, false) => Shown::Lines,
        };
        let now = Instant::now();
        Self { shown, began: now, said: now, last: String::new() }
    }

    /// Prints the current step. An unchanged step is repeated only after a while, which shows in a
    /// log that the wait continues.
    pub fn set(&mut self, text: &str) {
        let text = harmless::text(text);
        match &mut self.shown {
            Shown::Nothing => {}
            Shown::Lines if text != self.last || self.said.elapsed() >= REPEATED => {
                let waited = self.began.elapsed().as_secs();
                stderr::line(&if waited == 0 { text.clone() } else { format!("{text} ({waited} s)") });
                self.said = Instant::now();
            }
            Shown::Lines => {}
            Shown::Terminal(Some(bar)) => bar.set_message(text.clone()),
            Shown::Terminal(bar) if self.began.elapsed() >= SILENT => {
                let style = ProgressStyle::with_template("{spinner} {wide_msg} {elapsed}");
                let spinner = ProgressBar::new_spinner().with_elapsed(self.began.elapsed());
                let spinner = match style {
                    Ok(style) => spinner.with_style(style),
                    Err(_) => spinner,
                };
                spinner.enable_steady_tick(Duration::from_millis(120));
                spinner.set_message(text.clone());
                *bar = Some(spinner);
            }
            Shown::Terminal(None) => {}
        }
        self.last = text;
    }

    /// Clears the spinner away.
    pub fn finish(&mut self) {
        if let Shown::Terminal(bar) = &mut self.shown
            && let Some(bar) = bar.take()
        {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.finish();
    }
}

/// A bar for so many bytes.
pub fn bytes(quiet: bool, what: &str, total: u64) -> ProgressBar {
    if quiet || !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(total).with_message(what.to_owned());
    match ProgressStyle::with_template("{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta}") {
        Ok(style) => bar.with_style(style.progress_chars("=> ")),
        Err(_) => bar,
    }
}
