//! From events to intervals, and what an interval counts up to a moment.

use crate::calendar;
use roost_types::metering::{Meter, Proofs, UsageEvent, UsageKind};
use roost_types::{AccountId, Micros};
use std::collections::BTreeMap;

/// Fewest seconds that a start of an instance is charged for, as on EC2.
pub const MINIMUM_SECONDS: u64 = 60;

/// One stretch of usage: one start of an instance, or the life of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Interval<'a> {
    pub account: &'a AccountId,
    pub resource: &'a str,
    pub meter: Meter,
    pub sku: &'a str,
    /// Units per second.
    pub quantity: u64,
    pub start: Micros,
    /// Never before `start`.
    pub end: Micros,
}

impl Interval<'_> {
    /// Seconds used that began before `until`.
    pub fn used_before(&self, until: Micros) -> u64 {
        let length = self.end.min(until).0.saturating_sub(self.start.0);
        Micros(length.max(0)).ceil_secs().unsigned_abs()
    }

    /// Seconds charged that belong before `until`: those used, and from its start on a start's minimum.
    pub fn billed_before(&self, until: Micros) -> u64 {
        let used = self.used_before(until);
        match self.meter {
            Meter::InstanceSeconds if self.start < until => used.max(MINIMUM_SECONDS),
            Meter::InstanceSeconds | Meter::VolumeGibSeconds => used,
        }
    }

    /// Where this interval has its last charge: after this moment, nothing is added.
    pub fn last(&self) -> Micros {
        Micros(self.end.0.max(self.start.0.saturating_add(1)))
    }
}

/// Joins the events of a log into intervals.
///
/// Events come in any order and may come twice. An interval without its end goes on to where its resource was
/// last seen, never past `now`; an instance that nobody saw after its start has run for no time at all. A volume
/// is there because the controller keeps it, not because somebody sees it: without a proof it lasts to `now`.
/// An end before the start (a clock that stepped back) is taken as the start.
pub(crate) fn intervals<'a>(events: &'a [UsageEvent], proofs: &Proofs, now: Micros) -> Vec<Interval<'a>> {
    type Key<'k> = (&'k str, Meter, u64);
    let mut pairs: BTreeMap<Key<'_>, (Option<&UsageEvent>, Option<&UsageEvent>)> = BTreeMap::new();
    for event in events {
        let pair = pairs.entry((event.resource.as_str(), event.meter, event.incarnation)).or_default();
        let slot = match event.kind {
            UsageKind::Open => &mut pair.0,
            UsageKind::Close => &mut pair.1,
        };
        // The store's unique key allows one of each; should two be handed in, the choice must not hang on order.
        let rank = |e: &'a UsageEvent| (e.sequence, e.at, &e.account, &e.sku, e.quantity);
        if slot.is_none_or(|held| rank(event) < rank(held)) {
            *slot = Some(event);
        }
    }
    let whole = pairs.into_values().filter_map(|(open, close)| open.map(|open| (open, close)));
    whole
        .map(|(open, close)| {
            let seen = || match (proofs.get(&open.resource), open.meter) {
                (Some(proof), _) => (*proof).min(now),
                (None, Meter::InstanceSeconds) => open.at,
                (None, Meter::VolumeGibSeconds) => now,
            };
            Interval {
                account: &open.account,
                resource: &open.resource,
                meter: open.meter,
                sku: &open.sku,
                quantity: open.quantity,
                start: open.at,
                end: close.map_or_else(seen, |close| close.at).max(open.at),
            }
        })
        .collect()
}

/// Seconds that an instance has run, and those that are charged for it, over all its starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Seconds {
    /// Begun seconds in which it ran.
    pub used: u64,
    /// The same with the minimum of every start.
    pub billed: u64,
}

/// Counts the seconds of one instance. `events` may hold other resources' too.
pub fn seconds(events: &[UsageEvent], proofs: &Proofs, resource: &str, now: Micros) -> Seconds {
    let of_instance = |one: &Interval<'_>| one.resource == resource && one.meter == Meter::InstanceSeconds;
    intervals(events, proofs, now).iter().filter(|one| of_instance(one)).fold(
        Seconds::default(),
        |sum, one| Seconds {
            used: sum.used.saturating_add(one.used_before(one.last())),
            billed: sum.billed.saturating_add(one.billed_before(one.last())),
        },
    )
}

/// The moments within `from..to` at which `one` must be cut: months for volumes, days where a bill is by day.
pub(crate) fn calendar_cuts(one: &Interval<'_>, by_day: bool, from: Micros, to: Micros) -> Vec<Micros> {
    let mut cuts = Vec::new();
    if !by_day && one.meter != Meter::VolumeGibSeconds {
        return cuts;
    }
    let mut at = from;
    loop {
        let next = if by_day {
            calendar::day_start(calendar::day_of(at).saturating_add(1))
        } else {
            calendar::next_month_start(at)
        };
        // The calendar ends before integers do.
        if next >= to || next <= at {
            break;
        }
        cuts.push(next);
        at = next;
    }
    cuts
}
