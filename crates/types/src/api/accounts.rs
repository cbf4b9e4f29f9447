//! Accounts, and who the caller is.

use crate::ids::AccountId;
use crate::time::Micros;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Who am I?
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GetCallerIdentity {}

/// Who the caller is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallerIdentity {
    /// The account.
    pub account_id: AccountId,
    /// Its name.
    pub account_name: String,
    /// Whether it may make accounts, register images and see every account's bill.
    pub admin: bool,
    /// Region of the controller.
    pub region: String,
}

/// Makes an account with an access key. Administrators only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateAccount {
    /// 1 to 64 characters of `a-z A-Z 0-9 . _ -`; unique.
    pub name: String,
    /// Whether it may administrate.
    #[serde(default)]
    pub admin: bool,
}

/// A new account; the secret is shown this once.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewAccount {
    /// The account.
    pub account: Account,
    /// `AKIA…`.
    pub access_key_id: String,
    /// 40 characters.
    pub secret_access_key: String,
}

impl fmt::Debug for NewAccount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NewAccount")
            .field("account", &self.account)
            .field("access_key_id", &self.access_key_id)
            .finish_non_exhaustive()
    }
}

/// An account.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Account {
    /// Twelve digits.
    pub account_id: AccountId,
    /// Its name.
    pub name: String,
    /// Whether it may administrate.
    pub admin: bool,
    /// When it was made.
    pub created_at: Micros,
}

/// Lists accounts. Administrators see all, others their own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DescribeAccounts {}

/// Accounts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accounts {
    /// By name.
    pub accounts: Vec<Account>,
}
