//! Secrets at rest: sealed with AES-256-GCM-SIV under a key that lies beside the database, not in it.
//!
//! A sealed secret is bound to the access key id that it belongs to: moved to another row, it does not open.

use aes_gcm_siv::aead::{Aead, KeyInit, Payload};
use aes_gcm_siv::{Aes256GcmSiv, Nonce};
use zeroize::Zeroizing;

/// Bytes of a sealing key.
pub const KEY_BYTES: usize = 32;
const NONCE_BYTES: usize = 12;

/// A sealed secret that does not open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a sealed secret does not open: it was sealed under another key, or damaged")]
pub struct SealBroken;

/// Seals and opens secrets.
pub struct Sealer {
    cipher: Aes256GcmSiv,
}

impl Sealer {
    /// A sealer with this key.
    pub fn new(key: &[u8; KEY_BYTES]) -> Self {
        Self { cipher: Aes256GcmSiv::new(key.into()) }
    }

    /// Seals a secret. `nonce` should be random; one that repeats shows no more than that two secrets are equal.
    ///
    /// # Errors
    /// [`SealBroken`] if the cipher refuses, which it does for secrets of many gigabytes.
    pub fn seal(
        &self,
        access_key_id: &str,
        secret: &[u8],
        nonce: [u8; NONCE_BYTES],
    ) -> Result<Vec<u8>, SealBroken> {
        let payload = Payload { msg: secret, aad: access_key_id.as_bytes() };
        let sealed = self.cipher.encrypt(&Nonce::from(nonce), payload).map_err(|_| SealBroken)?;
        Ok([&nonce[..], &sealed].concat())
    }

    /// Opens a sealed secret.
    ///
    /// # Errors
    /// [`SealBroken`].
    pub fn open(&self, access_key_id: &str, sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, SealBroken> {
        let (nonce, sealed) = sealed.split_first_chunk::<NONCE_BYTES>().ok_or(SealBroken)?;
        let payload = Payload { msg: sealed, aad: access_key_id.as_bytes() };
        self.cipher.decrypt(&Nonce::from(*nonce), payload).map(Zeroizing::new).map_err(|_| SealBroken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_opens_under_its_key_and_name_only() {
        let sealer = Sealer::new(&[7; KEY_BYTES]);
        let sealed = sealer.seal("AKIA1", b"hush", [1; 12]).unwrap();
        assert!(!sealed.windows(4).any(|part| part == b"hush"));
        assert_eq!(sealer.open("AKIA1", &sealed).unwrap().as_slice(), b"hush");
        assert_eq!(sealer.open("AKIA2", &sealed), Err(SealBroken));
        assert_eq!(Sealer::new(&[8; KEY_BYTES]).open("AKIA1", &sealed), Err(SealBroken));
        for at in 0..sealed.len() {
            let mut damaged = sealed.clone();
            damaged[at] ^= 1;
            assert_eq!(sealer.open("AKIA1", &damaged), Err(SealBroken));
        }
        assert_eq!(sealer.open("AKIA1", &sealed[..5]), Err(SealBroken));
    }
}
