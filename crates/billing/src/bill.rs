//! From intervals to a bill.

use crate::calendar;
use crate::interval::{Interval, calendar_cuts, intervals};
use crate::prices::{Price, PriceBook, in_force};
use roost_types::api::{Bill, BillBy, BillLine};
use roost_types::metering::{Meter, Proofs, UsageEvent};
use roost_types::{AccountId, Micros, Money, Rate};
use std::collections::BTreeMap;

/// What is summed exactly and rounded once.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct LineKey<'a> {
    account: &'a AccountId,
    resource: &'a str,
    meter: Meter,
    sku: &'a str,
    /// From when on its price holds.
    price: Option<Micros>,
    /// First moment of the month, for volumes.
    month: Option<Micros>,
}

/// A line before it is rounded.
struct Line {
    rate: Rate,
    /// Units per day (the day 0 only, where a bill is not by day).
    days: BTreeMap<i64, Units>,
}

#[derive(Clone, Copy, Default)]
struct Units {
    used: u128,
    billed: u128,
}

/// Computes a bill for the usage within `window` (from its first moment up to, not with, its last).
///
/// Nothing is charged past `now` or past a proof for what is still open. A sku without a price costs nothing but
/// has its lines.
pub fn bill(
    events: &[UsageEvent],
    proofs: &Proofs,
    book: &PriceBook,
    window: (Micros, Micros),
    by: BillBy,
    now: Micros,
) -> Bill {
    let mut lines = BTreeMap::new();
    for one in intervals(events, proofs, now) {
        add_interval(&mut lines, &one, book, window, by == BillBy::Day);
    }
    let mut groups: BTreeMap<(String, Meter), (Option<String>, Units, Money)> = BTreeMap::new();
    for (key, line) in &lines {
        for (day, units, amount) in charges(line) {
            let name = match by {
                BillBy::Instance => key.resource.to_owned(),
                BillBy::Account => key.account.to_string(),
                BillBy::Type => key.sku.to_owned(),
                BillBy::Day => calendar::day_name(day),
            };
            let group = groups
                .entry((name, key.meter))
                .or_insert_with(|| (Some(key.sku.to_owned()), Units::default(), Money::ZERO));
            group.0.take_if(|sku| sku != key.sku);
            group.1.used += units.used;
            group.1.billed += units.billed;
            group.2 = group.2 + amount;
        }
    }
    let lines: Vec<_> = groups
        .into_iter()
        .map(|((group, meter), (sku, units, amount))| BillLine {
            group,
            meter: meter.to_string(),
            sku: sku.unwrap_or_default(),
            used: units.used,
            billed: units.billed,
            amount,
        })
        .collect();
    let total = lines.iter().map(|line| line.amount).sum();
    Bill { since: window.0, until: window.1, currency: book.currency(), lines, total }
}

/// Cuts an interval at everything that separates lines, and adds the pieces to them.
fn add_interval<'a>(
    lines: &mut BTreeMap<LineKey<'a>, Line>,
    one: &Interval<'a>,
    book: &PriceBook,
    window: (Micros, Micros),
    by_day: bool,
) {
    let (from, to) = (window.0.max(one.start), window.1.min(one.last()));
    if from >= to {
        return;
    }
    let prices = book.prices(one.meter, one.sku);
    let mut cuts = calendar_cuts(one, by_day, from, to);
    cuts.extend(prices.iter().map(|price| price.from).filter(|at| from < *at && *at < to));
    cuts.extend([from, to]);
    cuts.sort_unstable();
    for piece in cuts.windows(2) {
        let (begin, end) = (piece[0], piece[1]);
        let quantity = u128::from(one.quantity);
        let units = Units {
            used: u128::from(one.used_before(end) - one.used_before(begin)) * quantity,
            billed: u128::from(one.billed_before(end) - one.billed_before(begin)) * quantity,
        };
        if units.used == 0 && units.billed == 0 {
            continue;
        }
        let price = in_force(prices, begin);
        let key = LineKey {
            account: one.account,
            resource: one.resource,
            meter: one.meter,
            sku: one.sku,
            price: price.map(|price| price.from),
            month: (one.meter == Meter::VolumeGibSeconds).then(|| calendar::month_start(begin)),
        };
        let line = lines
            .entry(key)
            .or_insert_with(|| Line { rate: rate_at(price, one.meter, begin), days: BTreeMap::new() });
        let sum = line.days.entry(if by_day { calendar::day_of(begin) } else { 0 }).or_default();
        sum.used += units.used;
        sum.billed += units.billed;
    }
}

/// The exact rate per unit; a month's price is spread over that month's seconds.
fn rate_at(price: Option<&Price>, meter: Meter, at: Micros) -> Rate {
    let Some(Price { rate, .. }) = price else {
        return Rate { nanos: 0, per: 1 };
    };
    match meter {
        Meter::InstanceSeconds => *rate,
        Meter::VolumeGibSeconds => Rate { per: rate.per * calendar::month_seconds(at), ..*rate },
    }
}

/// A line's charges by day. Each is the difference of the rounded charge up to its end and that up to its begin,
/// so that the days add up to the line as it is rounded once.
fn charges(line: &Line) -> impl Iterator<Item = (i64, Units, Money)> {
    let mut so_far = 0;
    line.days.iter().map(move |(day, units)| {
        let before = line.rate.charge(so_far);
        so_far += units.billed;
        (*day, *units, Money(line.rate.charge(so_far).0 - before.0))
    })
}
