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

/// Reads an OpenSSH public key line and makes it plain: no options, no odd characters in the comment.
fn parse(line: &str) -> Answer<PublicKey> {
    let refuse = |why: String| {
        ApiError::new(
            ErrorCode::InvalidKeyFormat,
            format!(
                "the public key {why}: expected one OpenSSH line such as \"ssh-ed25519 AAAA… name\" (the .pub file)"
            ),
        )
    };
    let line = line.trim();
    if line.contains("PRIVATE KEY") {
        return Err(refuse("is a private key".to_owned()));
    }
    if line.lines().count() != 1 || line.len() > 16 * 1024 {
        return Err(refuse(format!("has {} lines and {} bytes", line.lines().count(), line.len())));
    }
    let mut key =
        PublicKey::from_openssh(line).map_err(|error| refuse(format!("cannot be read ({error})")))?;
    match key.key_data() {
        KeyData::Ed25519(_) | KeyData::SkEd25519(_) => {}
        KeyData::Rsa(rsa) => {
            let bits = rsa.n.as_positive_bytes().map_or(0, |bytes| bytes.len() * 8);
            if bits < MIN_RSA_BITS {
                return Err(refuse(format!("is an RSA key of {bits} bits, fewer than {MIN_RSA_BITS}")));
            }
        }
        other => {
            let kind = other.algorithm();
            return Err(refuse(format!(
                "is of kind {kind}, which is not taken (ssh-ed25519 and ssh-rsa are)"
            )));
        }
    }
    key.set_comment(comment(key.comment()));
    Ok(key)
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

    #[test]
    fn other_things_are_refused_and_named() {
        for (line, expected) in [
            ("", "0 lines"),
            ("hello", "cannot be read"),
            ("-----BEGIN OPENSSH PRIVATE KEY-----", "is a private key"),
            (&format!("{GOOD}\n{GOOD}"), "2 lines"),
            (&format!("command=\"sh\" {GOOD}"), "cannot be read"),
            ("ssh-ed25519 AAAA", "cannot be read"),
        ] {
            let error = parse(line).unwrap_err();
            assert_eq!(error.code, ErrorCode::InvalidKeyFormat);
            assert!(error.message.contains(expected), "{line}: {error}");
        }
    }
}
