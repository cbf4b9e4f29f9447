//! A filter for bytes that come in pieces: decodes UTF-8 across them, follows control sequences, lets pass what is
//! allowed.
//!
//! ```text
//!            ┌─ printable, \n \t \r ──→ out
//!  Ground ───┼─ ESC ──→ Escape ─┬─ [ ──────────────→ Csi ──(final)──→ Ground
//!            │                  ├─ ] P X ^ _ ──────→ Text ──(BEL, ST, newline, too long)──→ Ground
//!            │                  └─ (final) ────────→ Ground
//!            └─ C1 (U+0080–U+009F) = ESC and a letter: same machine, never passed on
//! ```

use super::is_deceptive;
use super::sequence::{MAX_PARAMETERS, RESTORE, is_harmless_csi, is_harmless_escape};

/// Longest text sequence (OSC, DCS, …) that is waited out; a guest that never ends one hides no more than this.
const MAX_TEXT: usize = 4096;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Ground,
    Escape,
    Csi,
    /// Inside a text sequence, so many characters in.
    Text(usize),
    /// The same, after an ESC that may begin its end.
    TextEscape(usize),
}

/// The filter; feed it with [`Stream::feed`].
#[derive(Debug)]
pub struct Stream {
    painting: bool,
    state: State,
    sequence: String,
    undecoded: Vec<u8>,
}

impl Stream {
    /// Lets printable characters and `\n \t \r` pass.
    pub fn plain() -> Self {
        Self { painting: false, state: State::Ground, sequence: String::new(), undecoded: Vec::new() }
    }

    /// Lets also pass what paints: colours, cursor movement, erasing, scrolling, backspace and bell.
    pub fn terminal() -> Self {
        Self { painting: true, ..Self::plain() }
    }

    /// What puts a terminal back in order after a painting guest.
    pub const fn restore() -> &'static str {
        RESTORE
    }

    /// The harmless part of what came.
    pub fn feed(&mut self, bytes: &[u8]) -> String {
        self.undecoded.extend_from_slice(bytes);
        let pending = std::mem::take(&mut self.undecoded);
        let mut out = String::with_capacity(pending.len());
        let mut rest = pending.as_slice();
        while !rest.is_empty() {
            match std::str::from_utf8(rest) {
                Ok(text) => {
                    text.chars().for_each(|letter| self.step(letter, &mut out));
                    rest = &[];
                }
                Err(error) => {
                    let (valid, wrong) = rest.split_at(error.valid_up_to());
                    let text = String::from_utf8_lossy(valid);
                    text.chars().for_each(|letter| self.step(letter, &mut out));
                    let Some(length) = error.error_len() else {
                        self.undecoded = wrong.to_vec();
                        break;
                    };
                    // A lone 0x80–0x9f is a C1 control to an eight-bit terminal; as U+FFFD it is nothing to any.
                    self.step(char::REPLACEMENT_CHARACTER, &mut out);
                    rest = &wrong[length..];
                }
            }
        }
        out
    }

    fn step(&mut self, letter: char, out: &mut String) {
        match self.state {
            State::Ground => self.ground(letter, out),
            State::Escape => self.escape(letter, out),
            State::Csi => self.csi(letter, out),
            State::Text(_) | State::TextEscape(_) => self.text(letter, out),
        }
    }

    fn begin(&mut self, state: State) {
        self.sequence.clear();
        self.state = state;
    }

    fn ground(&mut self, letter: char, out: &mut String) {
        match letter {
            '\n' | '\t' | '\r' => out.push(letter),
            '\u{1b}' => self.begin(State::Escape),
            '\u{9b}' => self.begin(State::Csi),
            '\u{90}' | '\u{98}' | '\u{9d}' | '\u{9e}' | '\u{9f}' => self.begin(State::Text(0)),
            // Bell, backspace, shift out and in (line drawing).
            '\u{7}' | '\u{8}' | '\u{e}' | '\u{f}' if self.painting => out.push(letter),
            _ if letter.is_control() => {}
            _ if is_deceptive(letter) => out.push(char::REPLACEMENT_CHARACTER),
            _ => out.push(letter),
        }
    }

    /// Characters that end any sequence at once: controls begin anew (ECMA-48: CAN, SUB; here all of them).
    fn abandon(&mut self, letter: char, out: &mut String) {
        self.begin(State::Ground);
        self.ground(letter, out);
    }

    fn escape(&mut self, letter: char, out: &mut String) {
        match letter {
            '[' if self.sequence.is_empty() => self.begin(State::Csi),
            ']' | 'P' | 'X' | '^' | '_' if self.sequence.is_empty() => self.begin(State::Text(0)),
            ' '..='/' if self.sequence.len() < MAX_PARAMETERS => self.sequence.push(letter),
            '0'..='~' => {
                if self.painting && is_harmless_escape(&self.sequence, letter) {
                    out.push('\u{1b}');
                    out.push_str(&self.sequence);
                    out.push(letter);
                }
                self.begin(State::Ground);
            }
            _ => self.abandon(letter, out),
        }
    }

    fn csi(&mut self, letter: char, out: &mut String) {
        match letter {
            ' '..='?' => {
                // One more than is kept, so that a long one is known to be long; the rest is not stored.
                if self.sequence.len() <= MAX_PARAMETERS {
                    self.sequence.push(letter);
                }
            }
            '@'..='~' => {
                if self.painting && is_harmless_csi(&self.sequence, letter) {
                    out.push_str("\u{1b}[");
                    out.push_str(&self.sequence);
                    out.push(letter);
                }
                self.begin(State::Ground);
            }
            _ => self.abandon(letter, out),
        }
    }

    fn text(&mut self, letter: char, out: &mut String) {
        match (self.state, letter) {
            (_, '\u{7}' | '\u{9c}' | '\u{18}' | '\u{1a}') | (State::TextEscape(_), '\\') => {
                self.begin(State::Ground);
            }
            // A line end inside is a guest's stray opener: what follows is output again.
            (_, '\n' | '\r') => self.abandon(letter, out),
            (State::Text(count), '\u{1b}') => self.state = State::TextEscape(count),
            (State::TextEscape(_), _) => {
                self.begin(State::Escape);
                self.escape(letter, out);
            }
            (State::Text(count), _) if count < MAX_TEXT => self.state = State::Text(count + 1),
            _ => self.begin(State::Ground),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn plain(bytes: &[u8]) -> String {
        Stream::plain().feed(bytes)
    }

    fn terminal(bytes: &[u8]) -> String {
        Stream::terminal().feed(bytes)
    }

    #[test]
    fn a_plain_console_keeps_text_and_lines_and_nothing_else() {
        assert_eq!(plain(b"\x1b[31mred\x1b[0m\r\n\ttab\x08\x07\x00"), "red\r\n\ttab");
        assert_eq!(plain("grün 東京\n".as_bytes()), "grün 東京\n");
        assert_eq!(plain(b"\x1b]0;title\x07a\x1b]52;c;cm0=\x1b\\b\x1bP$q\x1b\\c"), "abc");
        assert_eq!(plain(b"\x1b(Bx\x1bcy\x1b[?1049hz"), "xyz");
        assert_eq!(plain("a\u{9b}31mb\u{9d}0;t\u{9c}c\u{85}".as_bytes()), "abc");
        assert_eq!(plain("x\u{202e}y".as_bytes()), "x\u{fffd}y");
    }

    #[test]
    fn raw_c1_bytes_are_not_controls_any_more() {
        assert_eq!(plain(b"a\x9b2Jb"), "a\u{fffd}2Jb");
        assert_eq!(terminal(b"a\x9d0;x\x9cb"), "a\u{fffd}0;x\u{fffd}b");
    }

    #[test]
    fn an_attached_terminal_keeps_what_paints() {
        for kept in
            ["\x1b[1;31m", "\x1b[2J", "\x1b[10;20H", "\x1b[?25l", "\x1b[?1049h", "\x1b7", "\x1b(0", "\x08"]
        {
            assert_eq!(terminal(kept.as_bytes()), kept, "{kept:?}");
        }
    }

    #[test]
    fn an_attached_terminal_drops_what_answers_prints_or_reaches_outside() {
        for dropped in [
            "\x1b]0;title\x07",
            "\x1b]52;c;aGk=\x07",
            "\x1b]8;;http://x\x1b\\",
            "\x1bP+q544e\x1b\\",
            "\x1b[6n",
            "\x1b[c",
            "\x1b[>q",
            "\x1b[?1003h",
            "\x1b[21t",
            "\x1b[5i",
            "\x1b[?25$p",
            "\x1bc",
            "\x1bZ",
            "\x1b_G;x\x1b\\",
            "\x05",
            "\x1b[1;2\u{9b}3J",
        ] {
            let left = terminal(dropped.as_bytes());
            assert!(!left.contains('\u{1b}') && !left.contains('\u{5}'), "{dropped:?} left {left:?}");
        }
    }

    #[test]
    fn an_unfinished_sequence_hides_at_most_its_line() {
        assert_eq!(plain(b"a\x1b]0;never ended\nb"), "a\nb");
        assert_eq!(plain(b"a\x1b[12\nb"), "a\nb");
        let long = format!("a\x1b]{}b", "x".repeat(MAX_TEXT + 1));
        assert_eq!(plain(long.as_bytes()), "ab");
    }

    #[test]
    fn what_is_restored_is_itself_only_painting() {
        assert_eq!(terminal(RESTORE.as_bytes()), RESTORE);
    }

    /// Bytes in which sequences are likely.
    fn guest_bytes() -> impl Strategy<Value = Vec<u8>> {
        let byte = prop_oneof![
            4 => any::<u8>(),
            3 => prop::sample::select(b"\x1b[]P_^X\\\x07\x9b\x9d\x9c\xc2;?!0123456789ABCHJKhlmnctqp>$( \n\r".to_vec()),
        ];
        prop::collection::vec(byte, 0..400)
    }

    proptest! {
        #[test]
        fn plain_output_never_holds_a_control(bytes in guest_bytes()) {
            let out = plain(&bytes);
            prop_assert!(out.chars().all(|c| matches!(c, '\n' | '\t' | '\r') || !(c.is_control() || is_deceptive(c))));
        }

        #[test]
        fn cutting_the_stream_anywhere_changes_nothing(bytes in guest_bytes(), at in any::<prop::sample::Index>()) {
            for make in [Stream::plain, Stream::terminal] {
                let whole = make().feed(&bytes);
                let cut = at.index(bytes.len() + 1);
                let mut pieces = make();
                let joined = pieces.feed(&bytes[..cut]) + &pieces.feed(&bytes[cut..]);
                prop_assert_eq!(&joined, &whole);
            }
        }

        #[test]
        fn every_escape_that_passes_begins_an_allowed_sequence(bytes in guest_bytes()) {
            let out = terminal(&bytes);
            for part in out.split('\u{1b}').skip(1) {
                let (intermediates, rest) = match part.strip_prefix('[') {
                    Some(csi) => {
                        let end = csi.find(|c| ('@'..='~').contains(&c)).unwrap();
                        let last = csi[end..].chars().next().unwrap();
                        prop_assert!(is_harmless_csi(&csi[..end], last), "{:?}", part);
                        continue;
                    }
                    None => {
                        let end = part.find(|c| ('0'..='~').contains(&c)).unwrap();
                        part.split_at(end)
                    }
                };
                prop_assert!(is_harmless_escape(intermediates, rest.chars().next().unwrap()), "{:?}", part);
            }
            let c1 = out.chars().any(|c| ('\u{80}'..='\u{9f}').contains(&c));
            prop_assert!(!c1);
        }

        #[test]
        fn filtering_twice_is_filtering_once(bytes in guest_bytes()) {
            let once = terminal(&bytes);
            prop_assert_eq!(terminal(once.as_bytes()), once);
        }
    }
}
