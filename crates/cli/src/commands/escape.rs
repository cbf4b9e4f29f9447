//! What the user types on an attached console: everything goes to the guest but the way out.
//!
//! As in ssh, `~.` at the beginning of a line ends, `~~` there types one `~`, `~?` explains; Ctrl-] ends anywhere.

/// Ctrl-].
const GROUP_SEPARATOR: u8 = 0x1d;

/// What to do with typed bytes.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Typed {
    /// For the guest.
    pub bytes: Vec<u8>,
    /// The user wants out.
    pub end: bool,
    /// The user wants to know how.
    pub help: bool,
}

/// Where in a line the user is.
#[derive(Debug, PartialEq, Eq)]
pub enum Escape {
    /// At the beginning of a line.
    LineStart,
    /// After a `~` there.
    Tilde,
    /// Elsewhere.
    Within,
}

impl Escape {
    /// Takes what was typed apart.
    pub fn feed(&mut self, typed: &[u8]) -> Typed {
        let mut out = Typed::default();
        for byte in typed {
            let tilde = *self == Escape::Tilde;
            *self = match (*byte, &*self) {
                (GROUP_SEPARATOR, _) | (b'.', Escape::Tilde) => {
                    out.end = true;
                    return out;
                }
                (b'?', Escape::Tilde) => {
                    out.help = true;
                    Escape::LineStart
                }
                (b'~', Escape::LineStart) => Escape::Tilde,
                (byte, _) => {
                    if tilde && byte != b'~' {
                        out.bytes.push(b'~');
                    }
                    out.bytes.push(byte);
                    if matches!(byte, b'\r' | b'\n') { Escape::LineStart } else { Escape::Within }
                }
            };
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(keys: &[u8]) -> Typed {
        // Byte by byte, as keys come.
        let mut escape = Escape::LineStart;
        let mut all = Typed::default();
        for key in keys {
            let one = escape.feed(&[*key]);
            all.bytes.extend(one.bytes);
            all.help |= one.help;
            all.end |= one.end;
            if all.end {
                break;
            }
        }
        let at_once = Escape::LineStart.feed(keys);
        assert_eq!(at_once, all, "keys in one piece mean the same");
        all
    }

    #[test]
    fn the_way_out_is_tilde_dot_at_a_line_start_or_ctrl_bracket() {
        assert!(typed(b"~.").end);
        assert!(typed(b"ls\r~.").end);
        assert!(typed(b"ls\x1d").end);
        assert!(!typed(b"ls ~.").end);
        assert!(!typed(b"a~.\x03").end);
    }

    #[test]
    fn all_else_reaches_the_guest() {
        assert_eq!(typed(b"ls ~/x\r").bytes, b"ls ~/x\r");
        assert_eq!(typed(b"~/x\r").bytes, b"~/x\r");
        assert_eq!(typed(b"~~.\r").bytes, b"~.\r");
        assert_eq!(typed(b"\r~?\x03\x04\x1a").bytes, b"\r\x03\x04\x1a");
        assert!(typed(b"\r~?").help);
    }
}
