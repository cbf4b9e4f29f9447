//! What a guest or another tenant wrote, made safe to print.
//!
//! A terminal obeys what it is shown: it can be told to rename its window, to fill the clipboard, to type an answer
//! as if the user had, to hide text or to show it backwards. Three filters, from strict to lax:
//!
//! | for | keeps | filter |
//! |---|---|---|
//! | names, tags, reasons in tables and messages | printable characters | [`text`] |
//! | `console` without `--attach` | printable characters, `\n \t \r` | [`Stream::plain`] |
//! | `console --attach` | that, colours, cursor movement, erasing, scrolling | [`Stream::terminal`] |

mod sequence;
mod stream;

pub use stream::Stream;

/// Whether a character changes how its neighbours are shown, or hides: bidirectional controls, zero-width and
/// interlinear characters, line separators, and the invisible tag characters.
pub fn is_deceptive(letter: char) -> bool {
    matches!(letter,
        '\u{00ad}' | '\u{061c}' | '\u{180e}' | '\u{200b}' | '\u{200e}' | '\u{200f}'
        | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}'
        | '\u{e0000}'..='\u{e007f}')
}

/// One line of text in which nothing is obeyed: whatever is not plainly printable is spelled out.
pub fn text(input: &str) -> String {
    let mut safe = String::with_capacity(input.len());
    for letter in input.chars() {
        if letter.is_control() || is_deceptive(letter) {
            safe.extend(letter.escape_unicode());
        } else {
            safe.push(letter);
        }
    }
    safe
}

/// The same for a message that may have several lines.
pub fn lines(input: &str) -> String {
    input.split('\n').map(text).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_name_with_an_escape_is_spelled_out() {
        assert_eq!(text("web\u{1b}]0;pwned\u{7}"), "web\\u{1b}]0;pwned\\u{7}");
        assert_eq!(text("a\u{202e}txt.exe\n\u{9b}2J"), "a\\u{202e}txt.exe\\u{a}\\u{9b}2J");
        assert_eq!(text("Zürich 東京 🦆"), "Zürich 東京 🦆");
        assert_eq!(lines("a\nb\r"), "a\nb\\u{d}");
    }

    proptest! {
        #[test]
        fn no_text_keeps_anything_that_a_terminal_obeys(input in any::<String>()) {
            prop_assert!(!text(&input).chars().any(|c| c.is_control() || is_deceptive(c)));
        }
    }
}
