//! Scans a guest's console for its three reports: the guest is ready, its ssh host key, and user
//! data that it did not run.
//!
//! The guest is hostile: lines are cut at [`LINE_MAX`], only one exact form of each line counts, and a key must look
//! like one, so that nothing a guest prints can be more than a claim about that guest.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use roost_types::UserDataForm;

/// Longest line that is looked at, in bytes.
pub const LINE_MAX: usize = 1024;
/// What a ready guest prints at the start of a line.
const READY: &[u8] = b"roost-guest: ready";
/// The console line's prefix before the form of user data that the guest does not run
/// (`guest-images/shared/user-data`).
const NOT_RUN: &[u8] = b"roost-guest: user data not run: ";
const KEY_KIND: &[u8] = b"ssh-ed25519 ";
const KEYS_BEGIN: &[u8] = b"-----BEGIN SSH HOST KEY KEYS-----";
const KEYS_END: &[u8] = b"-----END SSH HOST KEY KEYS-----";

/// Something that the guest said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Said {
    /// It is ready.
    Ready,
    /// Its ed25519 host key: `ssh-ed25519 AAAA…`, without a comment.
    HostKey(String),
    /// The guest did not run user data of this form.
    UserDataNotRun(UserDataForm),
}

/// Where the reading stands.
#[derive(Debug, Clone, Default)]
pub struct Scan {
    line: Vec<u8>,
    too_long: bool,
    in_keys: bool,
}

impl Scan {
    /// Reads on.
    pub fn feed(&mut self, bytes: &[u8]) -> Vec<Said> {
        let mut said = Vec::new();
        for &byte in bytes {
            if byte == b'\n' {
                if !self.too_long {
                    said.extend(self.end_of_line());
                }
                self.line.clear();
                self.too_long = false;
            } else if self.line.len() < LINE_MAX {
                self.line.push(byte);
            } else {
                self.too_long = true;
            }
        }
        said
    }

    /// Bytes are missing: the line at hand is void.
    pub fn gap(&mut self) {
        self.line.clear();
        self.too_long = true;
    }

    fn end_of_line(&mut self) -> Option<Said> {
        // A getty or kernel message may share the line's beginning; ours begin lines, apart from carriage returns.
        let line = self.line.trim_ascii();
        if let Some(rest) = line.strip_prefix(READY) {
            return matches!(rest.first(), None | Some(b' ')).then_some(Said::Ready);
        }
        if let Some(word) = line.strip_prefix(NOT_RUN) {
            let form = std::str::from_utf8(word).ok().and_then(|word| word.parse().ok());
            return Some(Said::UserDataNotRun(form.unwrap_or(UserDataForm::Unknown)));
        }
        if line.ends_with(KEYS_BEGIN) {
            self.in_keys = true;
        } else if line.ends_with(KEYS_END) {
            self.in_keys = false;
        } else if self.in_keys {
            // systemd's progress line may stand before the key on the same line.
            let start = line.windows(KEY_KIND.len()).position(|window| window == KEY_KIND)?;
            return host_key(&line[start..]).map(Said::HostKey);
        }
        None
    }
}

/// `ssh-ed25519 BASE64 [comment]` with a blob of exactly the right form (RFC 8709: name, 32-byte key).
fn host_key(line: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(line).ok()?;
    let mut words = text.split_ascii_whitespace();
    let (kind, blob) = (words.next()?, words.next()?);
    if kind != "ssh-ed25519" {
        return None;
    }
    let bytes = STANDARD.decode(blob).ok()?;
    let well_formed = bytes.len() == 51 && bytes[..19] == *b"\x00\x00\x00\x0bssh-ed25519\x00\x00\x00\x20";
    well_formed.then(|| format!("ssh-ed25519 {blob}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key() -> String {
        let mut bytes = b"\x00\x00\x00\x0bssh-ed25519\x00\x00\x00\x20".to_vec();
        bytes.extend([7; 32]);
        STANDARD.encode(bytes)
    }

    #[test]
    fn a_ready_line_and_a_host_key_are_found_however_the_bytes_are_cut() {
        let key = key();
        let text = format!(
            "boot\r\n-----BEGIN SSH HOST KEY KEYS-----\r\nssh-rsa AAAA root@x\r\nssh-ed25519 {key} root@x\r\n\
             -----END SSH HOST KEY KEYS-----\r\nroost-guest: ready in 3 s\r\n"
        );
        let expected = vec![Said::HostKey(format!("ssh-ed25519 {key}")), Said::Ready];
        for size in [1, 7, text.len()] {
            let mut scan = Scan::default();
            let said: Vec<Said> = text.as_bytes().chunks(size).flat_map(|piece| scan.feed(piece)).collect();
            assert_eq!(said, expected, "pieces of {size}");
        }
    }

    #[test]
    fn a_progress_line_before_the_key_does_not_hide_it() {
        let key = key();
        let text = format!(
            "[ *** ] (1 of 3) Job ssh.service/start running\r-----BEGIN SSH HOST KEY KEYS-----\r\n\
             [ *** ] (2 of 3) Job ssh.service/start running\rssh-ed25519 {key}\r\n-----END SSH HOST KEY KEYS-----\r\n"
        );
        assert_eq!(Scan::default().feed(text.as_bytes()), vec![Said::HostKey(format!("ssh-ed25519 {key}"))]);
    }

    #[test]
    fn user_data_that_was_not_run_is_one_of_the_forms_that_are_known() {
        let said = |text: &str| Scan::default().feed(text.as_bytes());
        let of = |form| vec![Said::UserDataNotRun(form)];
        assert_eq!(said("roost-guest: user data not run: cloud-config\r\n"), of(UserDataForm::CloudConfig));
        for hostile in ["\u{1b}]0;owned\u{7}", "cloud-config; rm", ""] {
            let text = format!("roost-guest: user data not run: x{hostile}\n");
            assert_eq!(said(&text), of(UserDataForm::Unknown), "{hostile:?}");
        }
        assert_eq!(said("echo roost-guest: user data not run: multipart\n"), vec![]);
    }

    /// The script in the images and the agent know the same forms.
    #[test]
    fn every_form_that_an_image_names_is_known() {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../guest-images/shared/user-data");
        let script = std::fs::read_to_string(script).unwrap();
        let named: std::collections::BTreeSet<&str> = script
            .split("not_run ")
            .skip(1)
            .filter_map(|rest| rest.split(|c: char| c != '-' && !c.is_ascii_lowercase()).next())
            .collect();
        let known: std::collections::BTreeSet<&str> =
            UserDataForm::ALL.iter().map(|form| form.as_str()).collect();
        assert_eq!(named, known);
    }

    #[test]
    fn nothing_else_counts() {
        let key = key();
        for text in [
            "echo roost-guest: ready\n".to_owned(),
            "roost-guest: readyish\n".to_owned(),
            "roost-guest: ready".to_owned(),
            format!("ssh-ed25519 {key}\n"),
            "-----BEGIN SSH HOST KEY KEYS-----\nssh-ed25519 AAAA\n".to_owned(),
            format!("-----BEGIN SSH HOST KEY KEYS-----\n{}ssh-ed25519 {key}\n", "x".repeat(LINE_MAX + 1)),
        ] {
            assert_eq!(Scan::default().feed(text.as_bytes()), vec![], "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_grow_the_state(bytes in proptest::collection::vec(any::<u8>(), 0..8192)) {
            let mut scan = Scan::default();
            scan.feed(&bytes);
            prop_assert!(scan.line.len() <= LINE_MAX);
        }
    }
}
