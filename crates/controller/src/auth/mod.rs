//! Who calls: access keys, their sealed secrets, and the check of a request's signature.

pub mod seal;
pub mod sigv4;

pub use seal::Sealer;

use crate::engine::{Caller, Clock, Random};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::HeaderMap;
use roost_store::{AccessKeyRow, Store, StoreError};
use roost_types::api::SIGNING_SERVICE;
use roost_types::{AccountId, ApiError, ErrorCode, Micros};
use sigv4::{Claim, ClaimError, SignedRequest};
use std::sync::Arc;
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

/// How far a request's time stamp may be off, as on EC2.
pub const MAX_SKEW: Micros = Micros::from_secs(300);

/// The same words for an unknown key and for a wrong signature: which of the two it was is nobody's business.
const REJECTED: &str = "the access key is unknown or the signature is wrong: check the access key id, its secret \
                        and the region in your configuration";

/// A new access key, before it is sealed.
pub struct AccessKey {
    /// `AKIA` and 16 characters.
    pub id: String,
    /// 40 characters.
    pub secret: Zeroizing<String>,
}

impl AccessKey {
    /// Makes a key of random bytes.
    pub fn generate(random: &dyn Random) -> Self {
        const LETTERS: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
        let mut name = [0; 16];
        random.fill(&mut name);
        let id = name.iter().map(|byte| char::from(LETTERS[usize::from(byte % 32)])).collect::<String>();
        let mut secret = Zeroizing::new([0; 30]);
        random.fill(secret.as_mut_slice());
        Self { id: format!("AKIA{id}"), secret: Zeroizing::new(STANDARD.encode(secret.as_slice())) }
    }

    /// The row that keeps it.
    ///
    /// # Errors
    /// If the cipher refuses.
    pub fn seal(
        &self,
        sealer: &Sealer,
        random: &dyn Random,
        account_id: AccountId,
        now: Micros,
    ) -> Result<AccessKeyRow, seal::SealBroken> {
        let mut nonce = [0; 12];
        random.fill(&mut nonce);
        Ok(AccessKeyRow {
            access_key_id: self.id.clone(),
            account_id,
            sealed_secret: sealer.seal(&self.id, self.secret.as_bytes(), nonce)?,
            created_at: now,
            active: true,
        })
    }
}

/// Checks signatures against the access keys in the store.
pub struct Authenticator {
    store: Arc<dyn Store>,
    sealer: Arc<Sealer>,
    clock: Arc<dyn Clock>,
    region: String,
    /// Opened in place of a key that does not exist, so that its absence takes as long as its presence.
    decoy: AccessKeyRow,
}

impl Authenticator {
    /// An authenticator for requests to this region.
    ///
    /// # Errors
    /// If the cipher refuses.
    pub fn new(
        store: Arc<dyn Store>,
        sealer: Arc<Sealer>,
        clock: Arc<dyn Clock>,
        random: &dyn Random,
        region: String,
    ) -> Result<Self, seal::SealBroken> {
        let nobody = AccountId::from_random([0; 8]);
        let decoy = AccessKey::generate(random).seal(&sealer, random, nobody, Micros(0))?;
        Ok(Self { store, sealer, clock, region, decoy })
    }

    /// Parses the signature's claim of a request, if its date is recent and its scope names this
    /// region.
    fn claim<'a>(&self, headers: &'a HeaderMap) -> Result<Claim<'a>, ApiError> {
        let claim = Claim::parse(headers).map_err(|error| {
            let code = match error {
                ClaimError::Missing => ErrorCode::MissingAuthenticationToken,
                ClaimError::Malformed(_) => ErrorCode::AuthFailure,
            };
            ApiError::new(code, error.to_string())
        })?;
        let now = self.clock.wall();
        if (now.0 - claim.signed_at.0).abs() > MAX_SKEW.0 {
            return Err(ApiError::new(
                ErrorCode::RequestExpired,
                format!(
                    "the request was signed at {}, which is more than {} s from the controller's time: set the clock",
                    claim.timestamp,
                    MAX_SKEW.floor_secs()
                ),
            ));
        }
        if (claim.region, claim.service) != (self.region.as_str(), SIGNING_SERVICE) {
            return Err(ApiError::new(
                ErrorCode::AuthFailure,
                format!(
                    "the request was signed for region {:?} and service {:?}; this controller is region {:?}, service {SIGNING_SERVICE:?}",
                    claim.region, claim.service, self.region
                ),
            ));
        }
        Ok(claim)
    }

    /// Refuses a request that cannot be genuine before any byte of its body is read. A key id has
    /// 80 random bits, so the earlier refusal of an unknown id helps nobody to find one. Blocks on
    /// the store.
    ///
    /// # Errors
    /// Errors of [`Self::authenticate`].
    pub fn check_claim(&self, headers: &HeaderMap) -> Result<(), ApiError> {
        let claim = self.claim(headers)?;
        match self.store.access_key(claim.access_key_id).map_err(internal)? {
            Some((row, _)) if row.active => Ok(()),
            _ => Err(ApiError::new(ErrorCode::AuthFailure, REJECTED)),
        }
    }

    /// Returns the signer of a request. Blocks on the store.
    ///
    /// # Errors
    /// `MissingAuthenticationToken`, `RequestExpired` or `AuthFailure`.
    pub fn authenticate(&self, request: &SignedRequest<'_>) -> Result<Caller, ApiError> {
        let claim = self.claim(request.headers)?;
        let found = self.store.access_key(claim.access_key_id).map_err(internal)?;
        let (row, account) = match &found {
            Some((row, account)) if row.active => (row, Some(account)),
            _ => (&self.decoy, None),
        };
        let secret = self.sealer.open(&row.access_key_id, &row.sealed_secret);
        let secret = secret.map_err(|error| {
            tracing::error!(access_key_id = %row.access_key_id, "{error}");
            ApiError::new(ErrorCode::InternalError, "the controller cannot open its secrets: see its log")
        })?;
        let genuine: bool = sigv4::signature(&claim, request, &secret).ct_eq(&claim.signature).into();
        match account {
            Some(account) if genuine => Ok(Caller {
                account_id: account.account_id.clone(),
                account_name: account.name.clone(),
                admin: account.admin,
            }),
            _ => Err(ApiError::new(ErrorCode::AuthFailure, REJECTED)),
        }
    }
}

/// A failure of the store that is no fault of the caller: logged whole, told short.
#[expect(clippy::needless_pass_by_value, reason = "it is what map_err hands over")]
pub(crate) fn internal(error: StoreError) -> ApiError {
    tracing::error!("store: {error}");
    match error {
        StoreError::Locked { .. } => ApiError::new(ErrorCode::Unavailable, "the database is busy: try again"),
        _ => ApiError::new(ErrorCode::InternalError, "the database failed: see the controller's log"),
    }
}
