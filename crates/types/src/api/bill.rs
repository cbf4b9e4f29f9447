//! Bills.

use crate::money::{Currency, Money};
use crate::state::{UnknownName, named_enum};
use crate::time::Micros;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

named_enum! {
    /// What a bill is grouped by.
    BillBy, "bill grouping" {
        /// One line per resource.
        Instance = "instance",
        /// One line per account.
        Account = "account",
        /// One line per instance type or volume type.
        Type = "type",
        /// One line per day, UTC.
        Day = "day",
    }
}

/// Computes a bill from the usage log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GetBill {
    /// From here; the beginning of this month, UTC, if absent.
    #[serde(default)]
    pub since: Option<Micros>,
    /// Up to here; now if absent.
    #[serde(default)]
    pub until: Option<Micros>,
    /// Grouping.
    pub by: BillBy,
    /// Every account's. Administrators only.
    #[serde(default)]
    pub all_accounts: bool,
}

/// A bill. The sum of the lines is the total, exactly.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bill {
    /// From here.
    pub since: Micros,
    /// Up to here.
    pub until: Micros,
    /// Currency of every amount.
    pub currency: Currency,
    /// The lines.
    pub lines: Vec<BillLine>,
    /// Their sum.
    pub total: Money,
}

/// One line of a bill.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BillLine {
    /// What the line is about: a resource, an account, a type or a day.
    pub group: String,
    /// `instance-seconds` or `volume-gib-seconds`.
    pub meter: String,
    /// Instance type or volume type; empty where the group holds several.
    pub sku: String,
    /// Units that were used.
    #[serde(with = "text_u128")]
    pub used: u128,
    /// Units that are charged: used, and the 60 s minimum of every start.
    #[serde(with = "text_u128")]
    pub billed: u128,
    /// The charge.
    pub amount: Money,
}

mod text_u128 {
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(value: &u128, out: S) -> Result<S::Ok, S::Error> {
        out.serialize_str(&value.to_string())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(input: D) -> Result<u128, D::Error> {
        String::deserialize(input)?.parse().map_err(serde::de::Error::custom)
    }
}
