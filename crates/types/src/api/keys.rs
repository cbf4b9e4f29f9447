//! Key pairs for ssh.

use crate::ids::KeyPairId;
use crate::time::Micros;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Makes an ed25519 key pair.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateKeyPair {
    /// 1 to 255 printable characters; unique in the account.
    pub key_name: String,
}

/// A new key pair; the private key is shown this once and not kept.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewKeyPair {
    /// The key pair.
    pub key_pair: KeyPair,
    /// OpenSSH private key (PEM).
    pub private_key: String,
}

impl fmt::Debug for NewKeyPair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NewKeyPair").field("key_pair", &self.key_pair).finish_non_exhaustive()
    }
}

/// Imports a public key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImportKeyPair {
    /// 1 to 255 printable characters; unique in the account.
    pub key_name: String,
    /// One OpenSSH line (`ssh-ed25519 …`).
    pub public_key: String,
}

/// A key pair as the controller knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyPair {
    /// Its id.
    pub key_pair_id: KeyPairId,
    /// Its name.
    pub key_name: String,
    /// `SHA256:…`.
    pub fingerprint: String,
    /// OpenSSH public key line.
    pub public_key: String,
    /// When it was made or imported.
    pub created_at: Micros,
}

/// Lists key pairs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DescribeKeyPairs {}

/// Key pairs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyPairs {
    /// By name.
    pub key_pairs: Vec<KeyPair>,
}

/// Forgets a key pair; instances that have it keep it. Idempotent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeleteKeyPair {
    /// Its name.
    pub key_name: String,
}
