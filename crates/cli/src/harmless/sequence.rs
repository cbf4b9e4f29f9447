//! Control sequences of a terminal (ECMA-48 5.4, xterm's ctlseqs): which are only about the picture.

/// Longest parameter part of a sequence that is worth keeping, in bytes.
pub const MAX_PARAMETERS: usize = 64;

/// DEC private modes that may be switched: cursor keys, origin, wrap, blinking and visible cursor, the alternate
/// screen, bracketed paste. Mouse reports are not among them: they would type into the guest what the user points at.
const PRIVATE_MODES: &[&str] = &["1", "6", "7", "12", "25", "47", "1047", "1048", "1049", "2004"];

/// Whether `ESC [ parameters last` only paints. Everything that makes a terminal answer (DSR, DA, DECRQM, XTVERSION,
/// window reports), print, or change its window is not.
pub fn is_harmless_csi(parameters: &str, last: char) -> bool {
    if parameters.len() > MAX_PARAMETERS {
        return false;
    }
    let plain = parameters.bytes().all(|byte| byte.is_ascii_digit() || matches!(byte, b';' | b':'));
    match last {
        // Insert, move, erase, scroll, repeat, tabs, colours, scroll region, save and restore.
        '@'
        | 'A'..='I'
        | 'K'..='M'
        | 'P'
        | 'S'
        | 'T'
        | 'X'
        | 'Z'
        | '`'
        | 'a'
        | 'b'
        | 'd'
        | 'e'
        | 'f'
        | 'g'
        | 'm'
        | 'r'
        | 's'
        | 'u' => plain,
        // Erasing the picture, but not (3) what the user may scroll back to.
        'J' => plain && !parameters.split([';', ':']).any(|part| part.trim_start_matches('0') == "3"),
        'h' | 'l' => match parameters.strip_prefix('?') {
            Some(modes) => modes.split(';').all(|mode| PRIVATE_MODES.contains(&mode)),
            // 4: insert mode, 20: line feed mode.
            None => parameters.split(';').all(|mode| matches!(mode, "4" | "20")),
        },
        // Soft reset and the shape of the cursor.
        'p' => parameters == "!",
        'q' => {
            parameters.strip_suffix(' ').is_some_and(|shape| shape.bytes().all(|byte| byte.is_ascii_digit()))
        }
        _ => false,
    }
}

/// Whether `ESC intermediates last` only paints: save, restore, index, next line, tab stop, reverse index, keypad
/// modes, and ASCII or line drawing as character set.
pub fn is_harmless_escape(intermediates: &str, last: char) -> bool {
    match intermediates {
        "" => matches!(last, '7' | '8' | 'D' | 'E' | 'H' | 'M' | '=' | '>'),
        "(" | ")" => matches!(last, '0' | 'A' | 'B'),
        _ => false,
    }
}

/// What puts a terminal back in order after a guest painted on it.
pub const RESTORE: &str = "\x1b[?1l\x1b[?6l\x1b[?7h\x1b[?25h\x1b[?1049l\x1b[?2004l\x1b[4l\x1b[20l\x1b[0m\x1b[r\x1b(B\x1b)B\x1b>\x0f";
