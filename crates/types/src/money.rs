//! Money as integers. A price is an exact fraction (an amount of nano-units per N units of usage); an amount is a
//! whole number of nano-units (10⁻⁹ of the currency's main unit). There is one rounding, half to even, when a
//! price times a quantity becomes a line of a bill.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::iter::Sum;
use std::ops::Add;
use std::str::FromStr;

/// A three-letter currency code (ISO 4217), such as `USD` or `EUR`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Currency([u8; 3]);

impl Currency {
    /// United States dollar.
    pub const USD: Currency = Currency(*b"USD");
}

/// A currency text that is not three capital letters.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("malformed currency {0:?}: expected three capital letters such as \"USD\" (ISO 4217)")]
pub struct MalformedCurrency(pub String);

impl FromStr for Currency {
    type Err = MalformedCurrency;
    fn from_str(text: &str) -> Result<Self, MalformedCurrency> {
        match text.as_bytes() {
            [a, b, c] if [a, b, c].iter().all(|l| l.is_ascii_uppercase()) => Ok(Self([*a, *b, *c])),
            _ => Err(MalformedCurrency(text.to_owned())),
        }
    }
}

impl TryFrom<String> for Currency {
    type Error = MalformedCurrency;
    fn try_from(text: String) -> Result<Self, MalformedCurrency> {
        text.parse()
    }
}

impl From<Currency> for String {
    fn from(currency: Currency) -> String {
        currency.to_string()
    }
}

impl fmt::Display for Currency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|letter| write!(f, "{}", char::from(*letter)))
    }
}

/// An amount in nano-units of a currency that is stated beside it.
///
/// On the wire it is a decimal string of nano-units: JSON numbers lose digits past 2⁵³.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Money(pub i128);

impl Money {
    /// Nothing.
    pub const ZERO: Money = Money(0);
    /// Nano-units in one main unit.
    pub const NANOS: i128 = 1_000_000_000;

    /// The amount in main units with all nine decimals, such as `0.010400000`.
    pub fn to_decimal(self) -> String {
        let sign = if self.0 < 0 { "-" } else { "" };
        let magnitude = self.0.unsigned_abs();
        let nanos = Self::NANOS.unsigned_abs();
        format!("{sign}{}.{:09}", magnitude / nanos, magnitude % nanos)
    }
}

impl TryFrom<String> for Money {
    type Error = std::num::ParseIntError;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse().map(Money)
    }
}

impl From<Money> for String {
    fn from(money: Money) -> String {
        money.0.to_string()
    }
}

impl Add for Money {
    type Output = Money;
    fn add(self, other: Money) -> Money {
        Money(self.0 + other.0)
    }
}

impl Sum for Money {
    fn sum<I: Iterator<Item = Money>>(amounts: I) -> Money {
        amounts.fold(Money::ZERO, Add::add)
    }
}

/// A price: `nanos` nano-units of a currency for every `per` units of usage, an exact fraction.
///
/// `$0.0104 per hour` metered in seconds is `Rate { nanos: 10_400_000, per: 3600 }`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Rate {
    /// Nano-units of the currency.
    #[serde(with = "decimal_string")]
    pub nanos: i128,
    /// For this many units of usage; never 0.
    pub per: u64,
}

impl Rate {
    /// The price of `quantity` units: one multiplication, one division, rounded half to even.
    pub fn charge(self, quantity: u128) -> Money {
        let per = i128::from(self.per.max(1));
        // A quantity above i128 is 10³⁰ years of seconds.
        let quantity = i128::try_from(quantity).unwrap_or(i128::MAX);
        let product = self.nanos.saturating_mul(quantity);
        let (whole, rest) = (product.div_euclid(per), product.rem_euclid(per));
        let up = match (rest * 2).cmp(&per) {
            std::cmp::Ordering::Less => 0,
            std::cmp::Ordering::Greater => 1,
            std::cmp::Ordering::Equal => whole.rem_euclid(2),
        };
        Money(whole + up)
    }
}

/// Reads a decimal amount of main units (`0.0000166667`) as nano-units times 10ˢ, exactly.
///
/// Returns the digits as an integer and how many of them stood after the point, so that a caller can make an
/// exact [`Rate`] of an amount finer than a nano-unit: the scale goes into `per`.
///
/// # Errors
/// Anything but digits with at most one point, or more than 24 digits.
pub fn parse_decimal(text: &str) -> Result<(i128, u32), MalformedAmount> {
    let bad = || MalformedAmount(text.to_owned());
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let digits = [whole, fraction].concat();
    if whole.is_empty() || digits.len() > 24 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(bad());
    }
    let scale = u32::try_from(fraction.len()).map_err(|_| bad())?;
    Ok((digits.parse().map_err(|_| bad())?, scale))
}

/// An amount that is not a plain decimal number.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("malformed amount {0:?}: expected a decimal number such as \"0.0104\", at most 24 digits")]
pub struct MalformedAmount(pub String);

impl Rate {
    /// An exact rate from a decimal amount of main units per `per` units of usage.
    ///
    /// # Errors
    /// A malformed amount, or one so fine that its scale does not fit.
    pub fn from_decimal(amount: &str, per: u64) -> Result<Rate, MalformedAmount> {
        let bad = || MalformedAmount(amount.to_owned());
        let (digits, scale) = parse_decimal(amount)?;
        if scale <= 9 {
            return Ok(Rate { nanos: digits * 10_i128.pow(9 - scale), per });
        }
        let finer = 10_u64.checked_pow(scale - 9).ok_or_else(bad)?;
        Ok(Rate { nanos: digits, per: per.checked_mul(finer).ok_or_else(bad)? })
    }
}

mod decimal_string {
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(value: &i128, out: S) -> Result<S::Ok, S::Error> {
        out.serialize_str(&value.to_string())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(input: D) -> Result<i128, D::Error> {
        String::deserialize(input)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_charges_exactly_and_rounds_half_to_even() {
        let rate = Rate::from_decimal("0.0104", 3600).unwrap();
        assert_eq!(rate, Rate { nanos: 10_400_000, per: 3600 });
        assert_eq!(rate.charge(3600), Money(10_400_000));
        assert_eq!(rate.charge(60), Money(173_333));
        assert_eq!(Rate { nanos: 1, per: 2 }.charge(1), Money(0));
        assert_eq!(Rate { nanos: 1, per: 2 }.charge(3), Money(2));
        assert_eq!(Rate { nanos: 1, per: 2 }.charge(5), Money(2));
    }

    #[test]
    fn amounts_finer_than_a_nano_unit_stay_exact() {
        let rate = Rate::from_decimal("0.00001666670001", 1).unwrap();
        assert_eq!(rate.charge(100_000), Money(1_666_670_001));
    }

    #[test]
    fn malformed_amounts_and_currencies_are_refused() {
        for bad in ["", ".", "-1", "1e3", "1.2.3", "1,5", "9999999999999999999999999"] {
            assert!(Rate::from_decimal(bad, 1).is_err(), "{bad}");
        }
        for bad in ["", "usd", "USDX", "U$D"] {
            assert!(bad.parse::<Currency>().is_err(), "{bad}");
        }
    }

    #[test]
    fn money_shows_all_nine_decimals_and_travels_as_text() {
        assert_eq!(Money(-1_500_000_001).to_decimal(), "-1.500000001");
        assert_eq!(serde_json::to_string(&Money(5)).unwrap(), "\"5\"");
        assert_eq!(serde_json::from_str::<Money>("\"-7\"").unwrap(), Money(-7));
    }
}
