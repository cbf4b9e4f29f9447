//! Names that people give.

/// Returns true if a terminal shows every character of a text as itself: no control characters,
/// invisible characters or changes of text direction.
pub fn is_showable(text: &str) -> bool {
    !text.chars().any(|c| c.is_control() || is_invisible(c))
}

/// Unicode's line separators, directional marks and zero-width characters, except the two joiners
/// of scripts.
const fn is_invisible(c: char) -> bool {
    matches!(c,
        '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}'
        | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_terminal_shows_is_found() {
        for good in ["", "web 1", "grüße-näher", "データ", "👩\u{200d}💻", "می\u{200c}خواهم"]
        {
            assert!(is_showable(good), "{good:?}");
        }
        for bad in
            ["a\nb", "\u{1b}[31m", "a\u{202e}b", "a\u{200b}b", "\u{feff}a", "a\u{2066}b", "\u{7f}", "\u{9b}m"]
        {
            assert!(!is_showable(bad), "{bad:?}");
        }
    }
}
