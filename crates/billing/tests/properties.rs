//! What holds for every log, every window and every price book.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use proptest::prelude::*;
use roost_billing::{PriceBook, bill, month_start};
use roost_types::api::{Bill, BillBy};
use roost_types::metering::{Meter, Proofs, UsageEvent, UsageKind};
use roost_types::{Micros, Money};
use std::collections::BTreeMap;

/// Half an hour before February 2026 ends: every log here crosses a month end, a day end and a price change.
const BASE: i64 = 1_772_323_200 - 1_800;
const SPAN: i64 = 3_600;

const PRICES: &str = r#"
currency = "USD"
[[version]]
effective_from = "2026-01-01"
[version.instance_hour]
a = "0.0104"
b = "0.0000166667"
[version.volume_gib_month]
gp3 = "0.08"
[[version]]
effective_from = "2026-02-28T23:45:00.5Z"
[version.instance_hour]
a = "0.0207"
[version.volume_gib_month]
gp3 = "0.0999999"
"#;

fn micros() -> impl Strategy<Value = Micros> {
    // Whole seconds and odd microseconds both.
    (0..SPAN, prop_oneof![Just(0_i64), Just(500_000), 0..1_000_000_i64])
        .prop_map(|(s, us)| Micros((BASE + s) * 1_000_000 + us))
}

#[derive(Debug, Clone)]
struct Log {
    events: Vec<UsageEvent>,
    proofs: Proofs,
    now: Micros,
}

/// One interval: resource, incarnation, start, end (closed, proven or unseen), sku.
fn interval() -> impl Strategy<Value = (Vec<UsageEvent>, Option<(String, Micros)>)> {
    (0..4_u8, 1..4_u64, micros(), micros(), any::<bool>(), any::<bool>(), 1..20_u64).prop_map(
        |(which, incarnation, one, other, closed, proven, gib)| {
            let volume = which == 3;
            let resource = if volume { "vol-0".to_owned() } else { format!("i-{which}") };
            let event = |kind, at| UsageEvent {
                account: if which == 0 { "111111111111" } else { "222222222222" }.parse().unwrap(),
                resource: resource.clone(),
                meter: if volume { Meter::VolumeGibSeconds } else { Meter::InstanceSeconds },
                incarnation,
                sequence: u64::from(kind == UsageKind::Close),
                kind,
                at,
                sku: if volume {
                    "gp3"
                } else if incarnation == 2 {
                    "b"
                } else {
                    "a"
                }
                .to_owned(),
                quantity: if volume { gib } else { 1 },
                continues: false,
            };
            let mut events = vec![event(UsageKind::Open, one)];
            if closed {
                events.push(event(UsageKind::Close, other));
            }
            (events, (proven && !closed).then(|| (resource.clone(), other)))
        },
    )
}

fn log() -> impl Strategy<Value = Log> {
    (prop::collection::vec(interval(), 0..8), micros()).prop_map(|(intervals, now)| {
        let mut seen = std::collections::BTreeSet::new();
        let (mut events, mut proofs) = (Vec::new(), Proofs::new());
        for (of_one, proof) in intervals {
            // The store's unique key.
            if seen.insert((of_one[0].resource.clone(), of_one[0].incarnation)) {
                events.extend(of_one);
                proofs.extend(proof);
            }
        }
        continue_some(&mut events);
        Log { events, proofs, now }
    })
}

/// Every second start that can continue the one before it does so, as that one ended before.
fn continue_some(events: &mut [UsageEvent]) {
    let ends: Vec<_> = events
        .iter()
        .filter(|event| event.kind == UsageKind::Close && event.meter == Meter::InstanceSeconds)
        .map(|event| (event.resource.clone(), event.incarnation, event.at))
        .collect();
    let begins: Vec<_> = events
        .iter()
        .filter(|event| event.kind == UsageKind::Open)
        .map(|event| (event.resource.clone(), event.incarnation, event.at))
        .collect();
    for event in events.iter_mut().filter(|event| event.kind == UsageKind::Open && event.at.0 % 2 == 0) {
        let earlier = event.incarnation - 1;
        let (is, at) = (|one: &(String, u64, Micros)| one.0 == event.resource && one.1 == earlier, event.at);
        event.continues = ends.iter().any(|end| is(end) && end.2 <= at)
            && begins.iter().any(|begin| is(begin) && begin.2 <= at);
    }
}

fn compute(log: &Log, window: (Micros, Micros), by: BillBy) -> Bill {
    bill(&log.events, &log.proofs, &PriceBook::parse(PRICES).unwrap(), window, by, log.now)
}

fn units(bill: &Bill) -> BTreeMap<(String, String), (u128, u128)> {
    let mut sums = BTreeMap::new();
    for line in &bill.lines {
        let sum: &mut (u128, u128) = sums.entry((line.group.clone(), line.meter.clone())).or_default();
        *sum = (sum.0 + line.used, sum.1 + line.billed);
    }
    sums
}

/// A bill counted second by second, with prices looked up for each, as fractions over one denominator.
fn by_counting(log: &Log, window: (Micros, Micros)) -> (BTreeMap<String, (u128, u128)>, f64) {
    let change = Micros((1_772_323_200 - 900) * 1_000_000 + 500_000);
    let hour = |sku: &str, at: Micros| match sku {
        "a" if at < change => 0.0104,
        "a" => 0.0207,
        _ => 0.000_016_666_7,
    };
    let mut sums: BTreeMap<String, (u128, u128)> = BTreeMap::new();
    let mut amount = 0.0;
    let mut opens: Vec<_> = log.events.iter().filter(|event| event.kind == UsageKind::Open).collect();
    opens.sort_by_key(|open| (&open.resource, open.incarnation));
    // Length of the start before this part.
    let mut lasted = 0;
    for open in opens {
        let close = log.events.iter().find(|event| {
            event.kind == UsageKind::Close
                && (&event.resource, event.incarnation) == (&open.resource, open.incarnation)
        });
        let volume = open.meter == Meter::VolumeGibSeconds;
        let end = match (close, log.proofs.get(&open.resource)) {
            (Some(close), _) => close.at,
            (None, Some(proof)) => (*proof).min(log.now),
            (None, None) if volume => log.now,
            (None, None) => open.at,
        };
        let before = if open.continues { lasted } else { 0 };
        lasted = before + (end.0 - open.at.0).max(0);
        let mut second = Micros(before).ceil_secs();
        loop {
            let begins = open.at + Micros(second * 1_000_000 - before);
            let (used, in_minimum) = (begins < end, second < 60 && !volume);
            if !used && (!in_minimum || open.continues) {
                break;
            }
            let within = |at: Micros| window.0 <= at && at < window.1;
            let charged_at = if in_minimum { open.at } else { begins };
            let quantity = u128::from(open.quantity);
            let sum = sums.entry(open.resource.clone()).or_default();
            if used && within(begins) {
                sum.0 += quantity;
            }
            // The minimum is charged at the start, and not again for a later part.
            if within(charged_at) && !(in_minimum && open.continues) {
                sum.1 += quantity;
                amount += if volume {
                    let month = if charged_at.0 < 1_772_323_200_000_000 { 28.0 } else { 31.0 };
                    let gib = if charged_at < change { 0.08 } else { 0.099_999_9 };
                    gib / (month * 86_400.0) * f64::from(u32::try_from(open.quantity).unwrap())
                } else {
                    hour(&open.sku, charged_at) / 3600.0
                };
            }
            second += 1;
        }
    }
    sums.retain(|_, sum| *sum != (0, 0));
    (sums, amount)
}

fn nanos(money: Money) -> f64 {
    money.to_decimal().parse::<f64>().unwrap() * 1e9
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn the_order_of_events_and_replays_change_no_byte(log in log(), by in 0..4_usize, cut in any::<prop::sample::Index>()) {
        let whole = (Micros(0), Micros(i64::MAX));
        let mut other = log.clone();
        other.events.reverse();
        if !other.events.is_empty() {
            let at = cut.index(other.events.len());
            other.events.rotate_left(at);
            other.events.push(other.events[at].clone());
        }
        let bytes = |log| serde_json::to_vec(&compute(log, whole, BillBy::ALL[by])).unwrap();
        prop_assert_eq!(bytes(&log), bytes(&other));
    }

    #[test]
    fn lines_add_up_to_the_total_and_every_grouping_has_the_same(log in log(), a in micros(), b in micros()) {
        let window = (a.min(b), a.max(b));
        let bills: Vec<_> = BillBy::ALL.iter().map(|by| compute(&log, window, *by)).collect();
        for bill in &bills {
            prop_assert_eq!(bill.lines.iter().map(|line| line.amount).sum::<Money>(), bill.total);
            prop_assert_eq!(bill.total, bills[0].total);
            prop_assert!(bill.lines.iter().all(|line| line.amount >= Money::ZERO));
        }
    }

    #[test]
    fn splitting_a_window_moves_no_second_and_at_most_a_nano_per_line(log in log(), mut cuts in prop::array::uniform3(micros())) {
        cuts.sort_unstable();
        let whole = compute(&log, (cuts[0], cuts[2]), BillBy::Instance);
        let parts = [compute(&log, (cuts[0], cuts[1]), BillBy::Instance), compute(&log, (cuts[1], cuts[2]), BillBy::Instance)];
        let mut sum = units(&parts[0]);
        for (key, (used, billed)) in units(&parts[1]) {
            let held = sum.entry(key).or_default();
            *held = (held.0 + used, held.1 + billed);
        }
        prop_assert_eq!(units(&whole), sum);
        // Rounded lines: resource x sku x price version x month, at most 2 x 2 x 2 for each line shown.
        let lines = i128::try_from(whole.lines.len()).unwrap() * 8;
        let moved = whole.total.0 - parts[0].total.0 - parts[1].total.0;
        prop_assert!(moved.abs() <= lines, "{moved} nanos over {lines} lines");
    }

    #[test]
    fn a_longer_window_never_costs_less(log in log(), mut ends in prop::array::uniform4(micros())) {
        ends.sort_unstable();
        for by in BillBy::ALL {
            let (inner, outer) = (compute(&log, (ends[1], ends[2]), *by), compute(&log, (ends[0], ends[3]), *by));
            prop_assert!(inner.total <= outer.total);
        }
    }

    #[test]
    fn counting_second_by_second_agrees(log in log(), a in micros(), b in micros()) {
        let window = (a.min(b), a.max(b));
        let bill = compute(&log, window, BillBy::Instance);
        let (sums, amount) = by_counting(&log, window);
        let ours = units(&bill).into_iter().map(|((group, _), sum)| (group, sum)).collect();
        prop_assert_eq!(&sums, &ours);
        prop_assert!((nanos(bill.total) - amount * 1e9).abs() <= 1.0 + 4.0 * bill.lines.len() as f64);
    }

    #[test]
    fn nothing_is_charged_before_its_time(log in log(), at in micros()) {
        // What was charged up to a moment does not depend on what the log says of later moments, save where a
        // start lies in the window and its end does not.
        let window = (Micros(0), at);
        let mut known = log.clone();
        known.events.retain(|event| event.at < at || event.kind == UsageKind::Close);
        prop_assert_eq!(compute(&log, window, BillBy::Type), compute(&known, window, BillBy::Type));
    }

    #[test]
    fn a_month_starts_once_and_before_all_its_moments(at in any::<i32>()) {
        let at = Micros::from_secs(at.into());
        let start = month_start(at);
        prop_assert!(start <= at && at.0 - start.0 < 31 * 86_400 * 1_000_000);
        prop_assert_eq!(month_start(start), start);
    }
}
