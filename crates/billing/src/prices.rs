//! The price book: what one unit costs, from when on. A version of a price is never edited; a new one is added.

use crate::calendar;
use roost_types::metering::Meter;
use roost_types::{Currency, Micros, Money, Rate};
use serde::Deserialize;
use std::collections::BTreeMap;
use toml::Spanned;

const SECONDS_PER_HOUR: u64 = 3600;
const LONGEST_MONTH: u64 = 31 * 86_400;

/// A price file that is not valid.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PriceError {
    /// It is not TOML of the expected shape; the text names the line, the field and what is expected.
    #[error("the prices cannot be read: {0}")]
    Syntax(String),
    /// A value is not allowed.
    #[error("prices, line {line}: {problem}")]
    Value {
        /// Line in the file, from 1.
        line: usize,
        /// The field, its value and what is allowed.
        problem: String,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    currency: Spanned<String>,
    version: Vec<Version>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Version {
    effective_from: Spanned<String>,
    #[serde(default)]
    instance_hour: BTreeMap<String, Spanned<String>>,
    #[serde(default)]
    volume_gib_month: BTreeMap<String, Spanned<String>>,
}

/// What one unit costs from a moment on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Price {
    pub from: Micros,
    /// For instances: per second of running. For volumes: per GiB and month, to be spread over that month.
    pub rate: Rate,
}

/// Prices of everything that is metered, in one currency, each with its versions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PriceBook {
    currency: Currency,
    instances: BTreeMap<String, Vec<Price>>,
    volumes: BTreeMap<String, Vec<Price>>,
}

impl PriceBook {
    /// Reads a price file (`data/prices.toml` explains its form).
    ///
    /// # Errors
    /// [`PriceError`], with the line and the value.
    pub fn parse(text: &str) -> Result<Self, PriceError> {
        let file: File = toml::from_str(text).map_err(|error| PriceError::Syntax(error.to_string()))?;
        let refuse = |at: usize, problem: String| PriceError::Value {
            line: text.bytes().take(at).filter(|b| *b == b'\n').count() + 1,
            problem,
        };
        let currency = file.currency.get_ref().parse();
        let currency = currency.map_err(|e| refuse(file.currency.span().start, format!("{e}")))?;
        let mut book = Self { currency, instances: BTreeMap::new(), volumes: BTreeMap::new() };
        if file.version.is_empty() {
            return Err(refuse(0, "there is no [[version]]; expected at least one".to_owned()));
        }
        let mut last = None;
        for version in file.version {
            let (text, at) = (version.effective_from.get_ref(), version.effective_from.span().start);
            let from = calendar::parse_moment(text).ok_or_else(|| {
                let allowed = "expected a date or a moment such as 2026-01-01 or 2026-01-01T00:00:00Z";
                refuse(at, format!("effective_from is {text:?}; {allowed}"))
            })?;
            if last.is_some_and(|last| from <= last) {
                return Err(refuse(
                    at,
                    format!("effective_from is {text:?}, not after the version before it"),
                ));
            }
            last = Some(from);
            let tables =
                [(version.instance_hour, &mut book.instances), (version.volume_gib_month, &mut book.volumes)];
            for (table, prices) in tables {
                for (sku, amount) in table {
                    let price = price(&sku, amount.get_ref(), from);
                    let price = price.map_err(|problem| refuse(amount.span().start, problem))?;
                    prices.entry(sku).or_default().push(price);
                }
            }
        }
        // The table of instances is priced per hour, and metered in seconds.
        for price in book.instances.values_mut().flatten() {
            price.rate.per *= SECONDS_PER_HOUR;
        }
        Ok(book)
    }

    /// The prices that Roost comes with.
    ///
    /// # Panics
    /// Never: a test parses them.
    pub fn builtin() -> Self {
        match Self::parse(include_str!("../data/prices.toml")) {
            Ok(book) => book,
            Err(error) => panic!("{error}"),
        }
    }

    /// The currency of every price.
    pub fn currency(&self) -> Currency {
        self.currency
    }

    /// What an hour of an instance type costs at a moment; `None` where the book does not name the type.
    pub fn instance_hour(&self, instance_type: &str, at: Micros) -> Option<Money> {
        in_force(self.prices(Meter::InstanceSeconds, instance_type), at)
            .map(|price| price.rate.charge(SECONDS_PER_HOUR.into()))
    }

    /// What a GiB of a volume type costs for a whole month; `None` where the book does not name the type.
    pub fn volume_gib_month(&self, volume_type: &str, at: Micros) -> Option<Money> {
        in_force(self.prices(Meter::VolumeGibSeconds, volume_type), at).map(|price| price.rate.charge(1))
    }

    /// Every version of a price, oldest first.
    pub(crate) fn prices(&self, meter: Meter, sku: &str) -> &[Price] {
        let table = match meter {
            Meter::InstanceSeconds => &self.instances,
            Meter::VolumeGibSeconds => &self.volumes,
        };
        table.get(sku).map_or(&[], Vec::as_slice)
    }
}

/// The price in force at a moment: the newest that is not later; before the first, the first.
pub(crate) fn in_force(prices: &[Price], at: Micros) -> Option<&Price> {
    prices.iter().rev().find(|price| price.from <= at).or(prices.first())
}

fn price(sku: &str, amount: &str, from: Micros) -> Result<Price, String> {
    let rate = Rate::from_decimal(amount, 1).map_err(|error| format!("{sku}: {error}"))?;
    // Room for the seconds of a month in `per`, and for 10¹² units of usage in the product.
    let fits = rate.per.checked_mul(LONGEST_MONTH).is_some() && rate.nanos < 1_i128 << 80;
    if fits {
        Ok(Price { from, rate })
    } else {
        Err(format!("{sku}: the amount {amount:?} has too many digits"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Micros = Micros::from_secs(1_795_000_000);

    #[test]
    fn the_builtin_prices_are_the_public_ones() {
        let book = PriceBook::builtin();
        assert_eq!(book.currency(), Currency::USD);
        assert_eq!(book.instance_hour("t3.micro", NOW), Some(Money(10_400_000)));
        assert_eq!(book.instance_hour("m5.large", NOW), Some(Money(96_000_000)));
        assert_eq!(book.volume_gib_month("gp3", NOW), Some(Money(80_000_000)));
        assert_eq!(book.instance_hour("t3.giant", NOW), None);
    }

    #[test]
    fn every_builtin_type_has_a_price_and_every_price_a_type() {
        let (book, catalogue) = (PriceBook::builtin(), roost_types::instance_type::Catalogue::builtin());
        for one in catalogue.iter() {
            assert!(book.instance_hour(&one.name, NOW).is_some(), "{}", one.name);
        }
        assert_eq!(book.instances.len(), catalogue.iter().len());
    }

    #[test]
    fn a_version_names_only_what_changes_and_holds_from_its_moment_on() {
        let book = PriceBook::parse(
            "currency = \"EUR\"\n\
             [[version]]\neffective_from = \"2026-01-01\"\n[version.instance_hour]\na = \"1\"\nb = \"2\"\n\
             [[version]]\neffective_from = \"2026-02-01T12:00:00Z\"\n[version.instance_hour]\na = \"3\"\n",
        )
        .unwrap();
        let change = calendar::parse_moment("2026-02-01T12:00:00Z").unwrap();
        let euro = |n: i128| Some(Money(n * Money::NANOS));
        assert_eq!(book.instance_hour("a", change - Micros(1)), euro(1));
        assert_eq!(book.instance_hour("a", change), euro(3));
        assert_eq!(book.instance_hour("b", change), euro(2));
        assert_eq!(book.instance_hour("a", Micros(0)), euro(1), "before its first price, the first");
        assert_eq!(book.currency().to_string(), "EUR");
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        let file =
            |body: &str| PriceBook::parse(&format!("currency = \"USD\"\n{body}")).unwrap_err().to_string();
        let version = "[[version]]\neffective_from = \"2026-01-01\"\n";
        for (body, expected) in [
            ("version = []\n".to_owned(), "at least one"),
            ("[[version]]\neffective_from = \"soon\"\n".to_owned(), "line 3: effective_from is \"soon\""),
            (format!("{version}{version}"), "line 5: effective_from is \"2026-01-01\", not after"),
            (format!("{version}[version.instance_hour]\na = \"-1\"\n"), "line 5: a: malformed amount \"-1\""),
            (format!("{version}[version.instance_hour]\na = 1.5\n"), "line 5"),
            (format!("{version}[version.instance_hours]\na = \"1\"\n"), "instance_hours"),
            (format!("{version}[version.instance_hour]\na = \"0.000000000000000000000001\"\n"), "line 5"),
        ] {
            let error = file(&body);
            assert!(error.contains(expected), "{body}: {error}");
        }
        let error = PriceBook::parse("currency = \"usd\"\nversion = []").unwrap_err().to_string();
        assert!(error.contains("line 1") && error.contains("\"usd\""), "{error}");
    }
}
