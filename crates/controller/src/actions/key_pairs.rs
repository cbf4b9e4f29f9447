//! Key pairs. A private key that is made here is shown once and not kept.

use super::{Answer, printable};
use crate::auth::internal;
use crate::engine::Caller;
use crate::server::Front;
use roost_store::{KeyPairRow, StoreError};
use roost_types::api::{
    CreateKeyPair, DeleteKeyPair, DescribeKeyPairs, Done, ImportKeyPair, KeyPair, KeyPairs, NewKeyPair,
};
use roost_types::{ApiError, ErrorCode, ID_BYTES, KeyPairId};
use ssh_key::private::{Ed25519Keypair, KeypairData};
use ssh_key::public::KeyData;
use ssh_key::{HashAlg, LineEnding, PrivateKey, PublicKey};
use zeroize::Zeroizing;

const MIN_RSA_BITS: usize = 2048;
const MAX_KEY_BYTES: usize = 16 * 1024;
const EXPECTED: &str = "expected is one OpenSSH key such as \"ssh-ed25519 AAAA… name\" (the .pub file)";
/// Markers of other formats, each with the command that makes an OpenSSH line of it.
const OTHER_FORMATS: &[(&str, &str)] = &[
    ("PRIVATE KEY", "is a private key: keep it, and give its public half with `ssh-keygen -y -f FILE`"),
    (
        "PuTTY-User-Key-File",
        "is PuTTY's private key: keep it, and give its public half with `puttygen FILE -L`",
    ),
    ("BEGIN SSH2 PUBLIC KEY", "is in the format of RFC 4716: `ssh-keygen -i -f FILE` converts it"),
    ("BEGIN PUBLIC KEY", "is in PEM (PKCS #8): `ssh-keygen -i -m PKCS8 -f FILE` converts it"),
    ("BEGIN RSA PUBLIC KEY", "is in PEM (PKCS #1): `ssh-keygen -i -m PEM -f FILE` converts it"),
    (
        "BEGIN CERTIFICATE",
        "is an X.509 certificate, which ssh does not use: give the .pub file of an ssh key",
    ),
];

pub(super) fn create(front: &Front, caller: &Caller, request: CreateKeyPair) -> Answer<NewKeyPair> {
    printable("key_name", &request.key_name, 1, 255)?;
    let mut seed = Zeroizing::new([0; 32]);
    front.random.fill(seed.as_mut_slice());
    let failed = |error: ssh_key::Error| {
        ApiError::new(ErrorCode::InternalError, format!("the key pair cannot be made: {error}"))
    };
    let pair = KeypairData::Ed25519(Ed25519Keypair::from_seed(&seed));
    let private = PrivateKey::new(pair, comment(&request.key_name)).map_err(failed)?;
    let text = private.to_openssh(LineEnding::LF).map_err(failed)?;
    let key_pair = keep(front, caller, request.key_name, private.public_key())?;
    Ok(NewKeyPair { key_pair, private_key: text.as_str().to_owned() })
}

pub(super) fn import(front: &Front, caller: &Caller, request: ImportKeyPair) -> Answer<KeyPair> {
    printable("key_name", &request.key_name, 1, 255)?;
    let key = parse(&request.public_key)?;
    keep(front, caller, request.key_name, &key)
}

pub(super) fn describe(front: &Front, caller: &Caller, _: &DescribeKeyPairs) -> Answer<KeyPairs> {
    let rows = front.store.key_pairs(&caller.account_id).map_err(internal)?;
    Ok(KeyPairs { key_pairs: rows.into_iter().map(|row| row.key_pair).collect() })
}

pub(super) fn delete(front: &Front, caller: &Caller, request: &DeleteKeyPair) -> Answer<Done> {
    front.store.delete_key_pair(&caller.account_id, &request.key_name).map_err(internal)?;
    Ok(Done {})
}

fn keep(front: &Front, caller: &Caller, name: String, key: &PublicKey) -> Answer<KeyPair> {
    let mut id = [0; ID_BYTES];
    front.random.fill(&mut id);
    let line = key.to_openssh().map_err(|error| {
        ApiError::new(ErrorCode::InternalError, format!("the public key cannot be written: {error}"))
    })?;
    let row = KeyPairRow {
        account_id: caller.account_id.clone(),
        key_pair: KeyPair {
            key_pair_id: KeyPairId::from_random(id),
            key_name: name,
            fingerprint: key.fingerprint(HashAlg::Sha256).to_string(),
            public_key: line,
            created_at: front.clock.now(),
        },
    };
    front.store.create_key_pair(&row).map_err(|error| match error {
        StoreError::Duplicate { .. } => ApiError::new(
            ErrorCode::InvalidKeyPairDuplicate,
            format!(
                "a key pair {:?} exists already: delete it or choose another name",
                row.key_pair.key_name
            ),
        ),
        other => internal(other),
    })?;
    Ok(row.key_pair)
}

/// Parses an OpenSSH public key, with comments and blank lines around the key and any white space
/// between its words. Every other format that `ssh-keygen -l` reads is refused with the command
/// that makes such a line.
fn parse(text: &str) -> Answer<PublicKey> {
    read(text).map_err(|why| ApiError::new(ErrorCode::InvalidKeyFormat, format!("the public key {why}")))
}

fn read(text: &str) -> Result<PublicKey, String> {
    let text = text.trim_start_matches('\u{feff}').trim();
    if text.len() > MAX_KEY_BYTES {
        return Err(format!("has {} bytes, allowed are at most {MAX_KEY_BYTES}: {EXPECTED}", text.len()));
    }
    if let Some((_, why)) = OTHER_FORMATS.iter().find(|(mark, _)| text.contains(mark)) {
        return Err((*why).to_owned());
    }
    let lines: Vec<(usize, &str)> = (1..)
        .zip(text.lines().map(str::trim))
        .filter(|(_, line)| !line.is_empty() && !line.starts_with('#'))
        .collect();
    let line = match lines.as_slice() {
        [] => return Err(format!("is empty: {EXPECTED}")),
        [(_, line)] => *line,
        several => {
            let of_keys = several.iter().filter(|(_, line)| line.split_whitespace().any(is_data));
            let numbers: Vec<String> = of_keys.map(|(number, _)| number.to_string()).collect();
            return Err(match numbers.as_slice() {
                [_] | [] => {
                    let lines = several.len();
                    format!("is broken into {lines} lines: join them with `tr -d '\\r\\n' < FILE`")
                }
                _ => format!(
                    "is one of several, on the lines {}: choose one, such as the first with \
                     `grep -m 1 AAAA FILE`",
                    numbers.join(", ")
                ),
            });
        }
    };
    let line = without_options(line)?;
    let mut key = PublicKey::from_openssh(&line).map_err(|error| {
        let kind = line.split(' ').next().unwrap_or_default();
        if kind.contains("-cert-v0") {
            return format!(
                "is a certificate ({kind}): give the key that it certifies, the .pub file without \"-cert\""
            );
        }
        if kind == "ssh-dss" {
            return "is a DSA key, which no current ssh takes: make another with `ssh-keygen -t ed25519`"
                .to_owned();
        }
        format!("cannot be read ({error}): {EXPECTED}")
    })?;
    match key.key_data() {
        KeyData::Ed25519(_) | KeyData::SkEd25519(_) | KeyData::Ecdsa(_) | KeyData::SkEcdsaSha2NistP256(_) => {
        }
        KeyData::Rsa(rsa) => {
            let bits = rsa.n.as_positive_bytes().map_or(0, |bytes| bytes.len() * 8);
            if bits < MIN_RSA_BITS {
                return Err(format!(
                    "is an RSA key of {bits} bits, allowed are {MIN_RSA_BITS} and more: make another with \
                     `ssh-keygen -t ed25519`"
                ));
            }
        }
        other => {
            return Err(format!(
                "is of kind {}, allowed are ed25519, RSA, ECDSA and those of security keys: make another with \
                 `ssh-keygen -t ed25519`",
                shown(other.algorithm().as_str())
            ));
        }
    }
    key.set_comment(comment(key.comment()));
    Ok(key)
}

/// The line with one blank between kind, data and comment. A key with options is refused: a key
/// pair keeps none, and a key without its options grants more than its owner meant.
fn without_options(line: &str) -> Result<String, String> {
    let plain = |line: &str| {
        let mut words = line.split_whitespace();
        let (kind, data) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        format!("{kind} {data} {}", comment(&words.collect::<Vec<_>>().join(" "))).trim_end().to_owned()
    };
    if kind_of(line).is_some() {
        return Ok(plain(line));
    }
    let mut quoted = false;
    let mut before = '\0';
    let end = line.find(|letter: char| {
        quoted ^= letter == '"' && before != '\\';
        before = letter;
        letter.is_whitespace() && !quoted
    });
    let (options, rest) = line.split_at(end.unwrap_or(line.len()));
    let rest = rest.trim_start();
    match kind_of(rest) {
        Some(kind) => Err(format!(
            "stands behind {:?}, which a key pair cannot keep (options of an authorized_keys file, or a host's \
             name): give it without with `grep -o '{kind}[[:space:]].*' FILE`",
            shown(options)
        )),
        None => Err(format!("cannot be read (it begins with {:?}): {EXPECTED}", shown(line))),
    }
}

/// Returns the kind of the key that this line begins with, if it begins with one.
fn kind_of(line: &str) -> Option<&str> {
    let mut words = line.split_whitespace();
    let kind = words.next()?;
    let known = ["ssh-", "ecdsa-sha2-", "sk-ssh-", "sk-ecdsa-"].iter().any(|start| kind.starts_with(start));
    (known && is_data(words.next()?)).then_some(kind)
}

/// Every key's data begins with the length of the kind's name: three zero bytes and a small one.
fn is_data(word: &str) -> bool {
    word.starts_with("AAAA")
}

/// The beginning of the input, for a message.
fn shown(text: &str) -> String {
    text.chars().take(60).collect()
}

fn comment(text: &str) -> String {
    text.chars().filter(|c| c.is_ascii_graphic() || *c == ' ').take(128).collect::<String>().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJdD7y3aLq454yWBdwLWbieU1ebz9/cu7/QEXn9OIeZJ";

    #[test]
    fn a_public_key_is_taken_with_a_plain_comment() {
        let key = parse(&format!("  {GOOD} me@home\n")).unwrap();
        assert_eq!(key.to_openssh().unwrap(), format!("{GOOD} me@home"));
        assert!(key.fingerprint(HashAlg::Sha256).to_string().starts_with("SHA256:"));
        assert_eq!(
            parse(&format!("{GOOD} a\u{7}b")).map(|key| key.comment().to_owned()).unwrap_or("ab".into()),
            "ab"
        );
    }

    /// Runs `ssh-keygen`; `None` if it is not installed.
    fn keygen(args: &[&str]) -> Option<String> {
        let output = match std::process::Command::new("ssh-keygen").args(args).output() {
            Ok(output) => output,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
            Err(error) => panic!("{error}"),
        };
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        Some(String::from_utf8(output.stdout).unwrap())
    }

    /// The fingerprint in a line of `ssh-keygen -l`.
    fn fingerprint(listed: &str) -> &str {
        listed.split(' ').find(|word| word.starts_with("SHA256:")).unwrap()
    }

    #[test]
    fn whatever_ssh_keygen_lists_is_taken_or_refused_with_the_command_that_mends_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        for (kind, bits) in
            [("ed25519", "256"), ("rsa", "2048"), ("ecdsa", "256"), ("ecdsa", "384"), ("ecdsa", "521")]
        {
            let (private, public) = (path(&format!("{kind}{bits}")), path(&format!("{kind}{bits}.pub")));
            let made =
                ["-q", "-t", kind, "-b", bits, "-N", "", "-C", "someone's laptop — büro", "-f", &private];
            if keygen(&made).is_none() {
                return;
            }
            let line = std::fs::read_to_string(&public).unwrap().trim().to_owned();
            let words: Vec<&str> = line.splitn(3, ' ').collect();
            let [algorithm, data, comment] = words[..] else { panic!("{line}") };
            let listed = keygen(&["-l", "-f", &public]).unwrap();
            let plain = parse(&line).unwrap().to_openssh().unwrap();
            for form in [
                line.clone(),
                format!("{algorithm}  {data}   {comment}"),
                format!("{algorithm}\t{data}\t{comment}"),
                format!("\u{feff}# of my laptop\r\n\r\n  {line}  \t\r\n\r\n"),
            ] {
                let key = parse(&form).unwrap_or_else(|error| panic!("{form:?}: {error}"));
                assert_eq!(key.fingerprint(HashAlg::Sha256).to_string(), fingerprint(&listed), "{form:?}");
                assert_eq!(key.to_openssh().unwrap(), plain, "{form:?}");
            }
            assert_eq!(parse(&format!("{algorithm} {data}")).unwrap().comment(), "");

            // Each of these is refused with a command whose output is the key.
            let public_half = std::fs::read_to_string(&private).unwrap();
            let pem = |format| keygen(&["-e", "-m", format, "-f", &public]).unwrap();
            let mut others = vec![
                format!("no-pty,command=\"/bin/echo \\\"a b\\\" c\" {line}"),
                format!("host.example  {algorithm}\t{data}"),
                format!("{line}\n# and\n{line}\n"),
                format!("{algorithm} {}\n{}", &data[..40], &data[40..]),
                public_half,
                pem("RFC4716"),
            ];
            if kind != "ed25519" {
                others.push(pem("PKCS8"));
            }
            if kind == "rsa" {
                others.push(pem("PEM"));
            }
            for other in others {
                let file = path("other");
                // OpenSSH refuses a private key that others may read.
                let _ = std::fs::remove_file(&file);
                use std::os::unix::fs::OpenOptionsExt;
                let mut open = std::fs::OpenOptions::new();
                let mut written = open.write(true).create_new(true).mode(0o600).open(&file).unwrap();
                std::io::Write::write_all(&mut written, other.as_bytes()).unwrap();
                let error = parse(&other).unwrap_err();
                assert_eq!(error.code, ErrorCode::InvalidKeyFormat);
                let command = error.message.split('`').nth(1).unwrap_or_else(|| panic!("{error}"));
                let command = command.replace("FILE", &file);
                let ran = std::process::Command::new("sh").args(["-c", &command]).output().unwrap();
                let mended = String::from_utf8(ran.stdout).unwrap();
                let key = parse(&mended).unwrap_or_else(|error| panic!("{command}: {mended:?}: {error}"));
                assert_eq!(key.fingerprint(HashAlg::Sha256).to_string(), fingerprint(&listed), "{command}");
            }
        }
    }

    #[test]
    fn keys_on_security_keys_are_taken() {
        use base64::Engine;
        let field = |bytes: &[u8]| [&u32::try_from(bytes.len()).unwrap().to_be_bytes()[..], bytes].concat();
        let kind = "sk-ssh-ed25519@openssh.com";
        let blob = [field(kind.as_bytes()), field(&[7; 32]), field(b"ssh:")].concat();
        let line = format!("{kind} {} token", base64::engine::general_purpose::STANDARD.encode(blob));
        assert_eq!(parse(&line).unwrap().to_openssh().unwrap(), line);
    }

    #[test]
    fn other_things_are_refused_and_named() {
        for (line, expected) in [
            ("", "is empty"),
            ("# nothing\n\n", "is empty"),
            ("hello", "it begins with \"hello\""),
            ("-----BEGIN OPENSSH PRIVATE KEY-----", "is a private key"),
            ("PuTTY-User-Key-File-3: ssh-ed25519", "puttygen FILE -L"),
            (&format!("{GOOD}\n{GOOD}"), "lines 1, 2"),
            (&format!("command=\"sh\" {GOOD}"), "command=\\\"sh\\\""),
            ("ssh-ed25519 AAAA", "cannot be read"),
            ("ssh-dss AAAAB3NzaC1kc3MAAACBAP", "DSA"),
            ("ssh-ed25519-cert-v01@openssh.com AAAAIHNzaC1lZDI1NTE5", "certificate"),
            (&"x".repeat(20_000), "at most 16384"),
        ] {
            let error = parse(line).unwrap_err();
            assert_eq!(error.code, ErrorCode::InvalidKeyFormat);
            assert!(error.message.contains(expected), "{line}: {error}");
        }
    }
}
