//! From events to intervals, and what an interval counts up to a moment.

use crate::calendar;
use roost_types::metering::{Meter, Proofs, UsageEvent, UsageKind};
use roost_types::{AccountId, Micros};
use std::collections::BTreeMap;

/// Fewest seconds that a start of an instance is charged for, as on EC2.
pub const MINIMUM_SECONDS: u64 = 60;

/// One stretch of usage: one start of an instance, a part of such a start, or the life of a volume.
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
    /// Length of the earlier parts of the same start; `None` for the first part.
    pub before: Option<Micros>,
}

impl Interval<'_> {
    fn length(&self, until: Micros) -> Micros {
        Micros(self.end.min(until).0.saturating_sub(self.start.0).max(0))
    }

    /// Seconds used before `until`. A begun second counts once for all parts of a start.
    pub fn used_before(&self, until: Micros) -> u64 {
        let before = self.before.unwrap_or_default();
        begun(sum(before, self.length(until))) - begun(before)
    }

    /// Seconds charged that belong before `until`: those used, and from its start on a start's minimum.
    pub fn billed_before(&self, until: Micros) -> u64 {
        if self.meter != Meter::InstanceSeconds || self.start >= until {
            return self.used_before(until);
        }
        let with_minimum = |length: Micros| begun(length).max(MINIMUM_SECONDS);
        let all = with_minimum(sum(self.before.unwrap_or_default(), self.length(until)));
        all - self.before.map_or(0, with_minimum)
    }

    /// Where this interval has its last charge: after this moment, nothing is added.
    pub fn last(&self) -> Micros {
        Micros(self.end.0.max(self.start.0.saturating_add(1)))
    }
}

fn begun(length: Micros) -> u64 {
    length.ceil_secs().unsigned_abs()
}

fn sum(a: Micros, b: Micros) -> Micros {
    Micros(a.0.saturating_add(b.0))
}

/// Joins the events of a log into intervals.
///
/// Events come in any order and may come twice. An interval without its end goes on to where its
/// resource was last seen, never past `now`; an instance that nobody saw after its start has run
/// for no time at all. A volume is there because the controller keeps it, not because somebody sees
/// it: without a proof it lasts to `now`. An end before the start (a clock that stepped back) is
/// taken as the start.  A start may have several parts: a sequence of opens and closes under one
/// incarnation, and the incarnations that continue it. All parts share one minimum and one begun
/// second.
pub(crate) fn intervals<'a>(events: &'a [UsageEvent], proofs: &Proofs, now: Micros) -> Vec<Interval<'a>> {
    type Key<'k> = (&'k str, Meter, u64, u64);
    let mut opens: BTreeMap<Key<'_>, &UsageEvent> = BTreeMap::new();
    let mut closes: BTreeMap<Key<'_>, &UsageEvent> = BTreeMap::new();
    for event in events {
        let key = (event.resource.as_str(), event.meter, event.incarnation, event.sequence);
        let held = match event.kind {
            UsageKind::Open => opens.entry(key).or_insert(event),
            UsageKind::Close => closes.entry(key).or_insert(event),
        };
        // The store's key is unique. Should two events share one key, their order must not decide
        // the result.
        let rank = |e: &'a UsageEvent| (e.at, &e.account, &e.sku, e.quantity, e.continues);
        if rank(event) < rank(held) {
            *held = event;
        }
    }
    let mut whole: Vec<Interval<'_>> = Vec::with_capacity(opens.len());
    let mut rest = opens.iter().peekable();
    let mut last_incarnation = 0;
    while let Some((&key, &open)) = rest.next() {
        let (resource, meter, incarnation, _) = key;
        let end_of_start = (resource, meter, incarnation, u64::MAX);
        let next = rest.peek().map(|(key, _)| **key).filter(|next| *next <= end_of_start);
        let close = closes.range(key..=next.unwrap_or(end_of_start)).next().map(|(_, close)| close.at);
        let seen = || match (proofs.get(&open.resource), open.meter) {
            (Some(proof), _) => (*proof).min(now),
            (None, Meter::InstanceSeconds) => open.at,
            (None, Meter::VolumeGibSeconds) => now,
        };
        let same = whole.last().filter(|part| (part.resource, part.meter) == (resource, meter));
        let before = same
            .filter(|_| open.continues || last_incarnation == incarnation)
            .map(|part| sum(part.before.unwrap_or_default(), part.length(part.end)));
        last_incarnation = incarnation;
        whole.push(Interval {
            account: &open.account,
            resource: &open.resource,
            meter: open.meter,
            sku: &open.sku,
            quantity: open.quantity,
            start: open.at,
            end: close.unwrap_or_else(seen).max(open.at),
            before,
        });
    }
    whole
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
