//! A kernel's command line: what the user says, and the words that are put behind it.

use crate::layout;

/// Words of a user's who says something of clocks. Linux takes `_` for `-` in these.
const CLOCKS: [&str; 4] = ["tsc=", "clocksource=", "no-kvmclock", "nopv"];
/// A guest that keeps time by KVM's clock need not look twice a second whether its TSC agrees with that.
const NO_WATCHDOG: &str = "tsc=nowatchdog";

/// The line.
pub struct CommandLine {
    kernel: String,
    /// What Linux gives to init: a word `--`, and all behind it.
    init: String,
}

impl CommandLine {
    /// What the user says.
    #[must_use]
    pub fn new(text: &str) -> Self {
        let (mut at, mut quoted) = (0, false);
        for word in text.split(' ') {
            if word == "--" && !quoted {
                break;
            }
            quoted ^= word.matches('"').count() % 2 == 1;
            at += word.len() + 1;
        }
        let (kernel, init) = text.split_at(at.min(text.len()));
        Self { kernel: kernel.trim().to_owned(), init: init.to_owned() }
    }

    /// The kernel's words.
    #[must_use]
    pub fn kernel(&self) -> &str {
        &self.kernel
    }

    /// Whether the kernel has a word with this start.
    #[must_use]
    pub fn says(&self, start: &str) -> bool {
        self.kernel.split(' ').any(|word| word.starts_with(start))
    }

    /// Puts words behind the kernel's.
    pub fn add(&mut self, words: &str) {
        if !self.kernel.is_empty() && !words.is_empty() {
            self.kernel.push(' ');
        }
        self.kernel.push_str(words);
    }

    /// Tells Linux not to watch its TSC, which it does not use, unless the user says something of clocks. It does without where there
    /// is no room.
    pub fn trust_clock(&mut self) {
        let says = |word: &str| {
            let word = word.replace('_', "-");
            CLOCKS.iter().any(|start| word.starts_with(start))
        };
        let parts = [&self.kernel, NO_WATCHDOG, &self.init].into_iter().filter(|part| !part.is_empty());
        // With what is between the parts, and the byte at the end.
        let bytes: usize = parts.map(|part| part.len() + 1).sum();
        if !self.kernel.split(' ').any(says) && bytes <= layout::CMDLINE_MAX {
            self.add(NO_WATCHDOG);
        }
    }

    /// The whole.
    #[must_use]
    pub fn finish(mut self) -> String {
        let init = std::mem::take(&mut self.init);
        self.add(&init);
        self.kernel
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(text: &str, words: &str) -> String {
        let mut line = CommandLine::new(text);
        line.add(words);
        line.finish()
    }

    fn trusting(text: &str) -> String {
        let mut line = CommandLine::new(text);
        line.trust_clock();
        line.finish()
    }

    #[test]
    fn words_come_behind_the_kernels_and_before_inits() {
        for (text, whole) in [
            ("", "a=b"),
            ("quiet", "quiet a=b"),
            ("quiet ", "quiet a=b"),
            ("-- x --", "a=b -- x --"),
            ("init=/app -- --port 80", "init=/app a=b -- --port 80"),
            ("quiet --", "quiet a=b --"),
            ("x=\"a -- b\" --y", "x=\"a -- b\" --y a=b"),
        ] {
            assert_eq!(with(text, "a=b"), whole);
            assert_eq!(with(text, ""), text.trim(), "{text}");
        }
        let line = CommandLine::new("xroot=1 -- root=/dev/vda");
        assert!(!line.says("root=") && line.says("xroot") && line.kernel() == "xroot=1");
    }

    #[test]
    fn whoever_says_something_of_clocks_is_not_overruled() {
        for line in ["quiet", "x=tsc=reliable notsc", "quiet -- tsc=reliable"] {
            assert!(trusting(line).contains(" tsc=nowatchdog"), "{line}");
        }
        for line in
            ["tsc=reliable", "quiet clocksource=tsc", "a no_kvmclock b", "no-kvmclock-vsyscall", "nopv"]
        {
            assert_eq!(trusting(line), line);
        }
    }

    #[test]
    fn a_line_that_has_room_for_the_users_words_alone_is_left_alone() {
        let most = layout::CMDLINE_MAX - 1;
        for (length, added) in [(most, 0), (most - 14, 0), (most - 15, 15)] {
            assert_eq!(trusting(&"x".repeat(length)).len(), length + added);
            let with_init = format!("{} -- ab", "x".repeat(length - 6));
            assert_eq!(trusting(&with_init).len(), length + added);
        }
    }
}
