//! Bills as sentences: what EC2 charges for, and what the calendar does to it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use roost_billing::{PriceBook, Seconds, bill, seconds};
use roost_types::api::{Bill, BillBy};
use roost_types::metering::{Meter, Proofs, UsageEvent, UsageKind};
use roost_types::{Micros, Money};

/// 2026-01-01T00:00:00Z.
const NEW_YEAR: i64 = 1_767_225_600;
const DAY: i64 = 86_400;
const EVER: (Micros, Micros) = (Micros(0), Micros(i64::MAX));

fn event(resource: &str, incarnation: u64, kind: UsageKind, at: Micros, sku: &str) -> UsageEvent {
    let volume = resource.starts_with("vol-");
    UsageEvent {
        account: "111111111111".parse().unwrap(),
        resource: resource.into(),
        meter: if volume { Meter::VolumeGibSeconds } else { Meter::InstanceSeconds },
        incarnation,
        sequence: u64::from(kind == UsageKind::Close),
        kind,
        at,
        sku: sku.into(),
        quantity: if volume { 10 } else { 1 },
        continues: false,
    }
}

/// A whole interval, in seconds.
fn ran(resource: &str, incarnation: u64, from: i64, to: i64, sku: &str) -> [UsageEvent; 2] {
    [
        event(resource, incarnation, UsageKind::Open, Micros::from_secs(from), sku),
        event(resource, incarnation, UsageKind::Close, Micros::from_secs(to), sku),
    ]
}

fn ever(events: &[UsageEvent], by: BillBy) -> Bill {
    bill(events, &Proofs::new(), &PriceBook::builtin(), EVER, by, Micros::from_secs(NEW_YEAR + 400 * DAY))
}

fn dollars(text: &str) -> Money {
    let (digits, scale) = roost_types::money::parse_decimal(text).unwrap();
    Money(digits * 10_i128.pow(9 - scale))
}

#[test]
fn an_hour_costs_the_hourly_price_and_thirty_minutes_half_of_it() {
    assert_eq!(
        ever(&ran("i-a", 1, NEW_YEAR, NEW_YEAR + 3600, "m5.large"), BillBy::Instance).total,
        dollars("0.096")
    );
    assert_eq!(
        ever(&ran("i-a", 1, NEW_YEAR, NEW_YEAR + 1800, "m5.large"), BillBy::Instance).total,
        dollars("0.048")
    );
    // A month of 730 hours, as price lists count it.
    let month = ever(&ran("i-a", 1, NEW_YEAR, NEW_YEAR + 730 * 3600, "t3.micro"), BillBy::Instance);
    assert_eq!(month.total, dollars("7.592"));
}

#[test]
fn under_a_minute_is_a_minute_and_over_it_each_second_counts() {
    // EC2: "billed per second, with a minimum of 60 seconds": 10 s are 60, 61 s are 61.
    for (ran_for, billed) in [(0, 60), (1, 60), (59, 60), (60, 60), (61, 61), (3599, 3599)] {
        let bill = ever(&ran("i-a", 1, NEW_YEAR, NEW_YEAR + ran_for, "t3.micro"), BillBy::Instance);
        assert_eq!(
            (bill.lines[0].used, bill.lines[0].billed),
            (ran_for.unsigned_abs().into(), billed),
            "{ran_for}"
        );
    }
}

#[test]
fn every_start_has_its_own_minimum_and_a_stop_costs_nothing() {
    let mut events = ran("i-a", 1, NEW_YEAR, NEW_YEAR + 20, "t3.micro").to_vec();
    events.extend(ran("i-a", 2, NEW_YEAR + 5000, NEW_YEAR + 5090, "t3.micro"));
    let bill = ever(&events, BillBy::Instance);
    assert_eq!((bill.lines[0].used, bill.lines[0].billed), (110, 150));
    let counted = seconds(&events, &Proofs::new(), "i-a", Micros::from_secs(NEW_YEAR + DAY));
    assert_eq!(counted, Seconds { used: 110, billed: 150 });
}

#[test]
fn begun_seconds_count() {
    let mut events = ran("i-a", 1, NEW_YEAR, NEW_YEAR + 100, "t3.micro");
    events[1].at = events[1].at + Micros(1);
    assert_eq!(ever(&events, BillBy::Instance).lines[0].billed, 101);
}

#[test]
fn an_open_interval_ends_where_the_instance_was_last_seen() {
    let open = ran("i-a", 1, NEW_YEAR, 0, "t3.micro")[..1].to_vec();
    let now = Micros::from_secs(NEW_YEAR + 5000);
    let count = |proof: Option<i64>| {
        let proofs =
            proof.map(|at| ("i-a".to_owned(), Micros::from_secs(NEW_YEAR + at))).into_iter().collect();
        let bill = bill(&open, &proofs, &PriceBook::builtin(), EVER, BillBy::Instance, now);
        assert_eq!(u128::from(seconds(&open, &proofs, "i-a", now).billed), bill.lines[0].billed);
        (bill.lines[0].used, bill.lines[0].billed)
    };
    assert_eq!(count(Some(700)), (700, 700));
    assert_eq!(count(Some(9000)), (5000, 5000), "never past now");
    assert_eq!(count(Some(-50)), (0, 60), "a proof from before the start is no negative time");
    assert_eq!(count(None), (0, 60), "nobody saw it run");
}

#[test]
fn an_end_before_the_start_is_no_negative_time() {
    let events = ran("i-a", 1, NEW_YEAR, NEW_YEAR - 500, "t3.micro");
    let bill = ever(&events, BillBy::Instance);
    assert_eq!((bill.lines[0].used, bill.lines[0].billed), (0, 60));
}

#[test]
fn a_replayed_event_changes_nothing() {
    let once = ran("i-a", 1, NEW_YEAR, NEW_YEAR + 100, "t3.micro").to_vec();
    let twice = [once.clone(), once.clone()].concat();
    assert_eq!(ever(&once, BillBy::Instance), ever(&twice, BillBy::Instance));
}

#[test]
fn events_that_contradict_each_other_give_one_answer_in_any_order() {
    let mut events = ran("i-a", 1, NEW_YEAR, NEW_YEAR + 100, "t3.micro").to_vec();
    events.extend(ran("i-a", 1, NEW_YEAR + 30, NEW_YEAR + 200, "m5.large"));
    let forwards = ever(&events, BillBy::Instance);
    events.reverse();
    assert_eq!(forwards, ever(&events, BillBy::Instance));
}

#[test]
fn a_gib_month_costs_the_same_in_every_month_however_long() {
    for (first, days) in
        [(NEW_YEAR, 31), (NEW_YEAR + 31 * DAY, 28), (NEW_YEAR + 59 * DAY, 31), (1_706_745_600, 29)]
    {
        let bill = ever(&ran("vol-a", 1, first, first + days * DAY, "gp3"), BillBy::Instance);
        assert_eq!(bill.total, dollars("0.8"), "10 GiB at 0.08, a month of {days} days");
        let half = ever(&ran("vol-a", 1, first, first + days * DAY / 2, "gp3"), BillBy::Instance);
        assert_eq!(half.total, dollars("0.4"));
    }
}

#[test]
fn a_volume_across_a_month_end_is_charged_by_each_months_length() {
    // The last day of January and the first of February.
    let bill = ever(&ran("vol-a", 1, NEW_YEAR + 30 * DAY, NEW_YEAR + 32 * DAY, "gp3"), BillBy::Instance);
    // 0.8/31 + 0.8/28, each rounded to a nano.
    assert_eq!(bill.total, Money(25_806_452 + 28_571_429));
}

#[test]
fn a_volume_has_no_minimum_and_lasts_to_now_while_it_is_there() {
    let now = Micros::from_secs(NEW_YEAR + 7);
    let open = [event("vol-a", 1, UsageKind::Open, Micros::from_secs(NEW_YEAR), "gp3")];
    let bill = bill(&open, &Proofs::new(), &PriceBook::builtin(), EVER, BillBy::Instance, now);
    assert_eq!(bill.lines[0].billed, 70);
}

#[test]
fn a_price_change_splits_the_interval() {
    let book = PriceBook::parse(
        "currency = \"USD\"\n[[version]]\neffective_from = \"2025-01-01\"\n[version.instance_hour]\na = \"0.36\"\n\
         [[version]]\neffective_from = \"2026-01-01\"\n[version.instance_hour]\na = \"0.72\"\n",
    )
    .unwrap();
    let now = Micros::from_secs(NEW_YEAR + DAY);
    let total =
        |from, to| bill(&ran("i-a", 1, from, to, "a"), &Proofs::new(), &book, EVER, BillBy::Type, now).total;
    assert_eq!(total(NEW_YEAR - 1000, NEW_YEAR + 500), dollars("0.2"), "1000 s at 0.0001, 500 s at 0.0002");
    assert_eq!(total(NEW_YEAR, NEW_YEAR + 100), dollars("0.02"), "from its moment on");
    assert_eq!(total(NEW_YEAR - 100, NEW_YEAR), dollars("0.01"));
    assert_eq!(total(NEW_YEAR - 10, NEW_YEAR + 80), dollars("0.012"), "the minimum belongs to the start");
}

#[test]
fn a_type_without_a_price_costs_nothing_and_is_shown() {
    let bill = ever(&ran("i-a", 1, NEW_YEAR, NEW_YEAR + 100, "home.unheard"), BillBy::Type);
    assert_eq!(
        (bill.lines[0].group.as_str(), bill.lines[0].billed, bill.total),
        ("home.unheard", 100, Money::ZERO)
    );
}

#[test]
fn groups_are_named_for_what_they_sum() {
    let mut events = ran("i-a", 1, NEW_YEAR - 100, NEW_YEAR + 100, "t3.micro").to_vec();
    events.extend(ran("i-a", 2, NEW_YEAR + 200, NEW_YEAR + 300, "m5.large"));
    events.extend(ran("i-b", 1, NEW_YEAR, NEW_YEAR + 100, "m5.large"));
    events.extend(ran("vol-a", 1, NEW_YEAR, NEW_YEAR + 100, "gp3"));
    let lines = |by| -> Vec<(String, String, u128)> {
        ever(&events, by).lines.into_iter().map(|line| (line.group, line.sku, line.billed)).collect()
    };
    let line = |group: &str, sku: &str, billed| (group.to_owned(), sku.to_owned(), billed);
    assert_eq!(
        lines(BillBy::Instance),
        [line("i-a", "", 300), line("i-b", "m5.large", 100), line("vol-a", "gp3", 1000)]
    );
    assert_eq!(
        lines(BillBy::Type),
        [line("gp3", "gp3", 1000), line("m5.large", "m5.large", 200), line("t3.micro", "t3.micro", 200)]
    );
    assert_eq!(lines(BillBy::Account), [line("111111111111", "", 400), line("111111111111", "gp3", 1000)]);
    assert_eq!(
        lines(BillBy::Day),
        [line("2025-12-31", "t3.micro", 100), line("2026-01-01", "", 300), line("2026-01-01", "gp3", 1000)]
    );
}

#[test]
fn a_closed_months_bill_stays_as_it_is() {
    // Started ten seconds before the year's end; billed then, and again when it has run for an hour.
    let window = (Micros(0), Micros::from_secs(NEW_YEAR));
    let book = PriceBook::builtin();
    let proofs: Proofs = [("i-a".to_owned(), window.1)].into();
    let open = &ran("i-a", 1, NEW_YEAR - 10, NEW_YEAR + 3600, "t3.micro")[..];
    let at_once = bill(&open[..1], &proofs, &book, window, BillBy::Instance, window.1);
    let later =
        bill(open, &Proofs::new(), &book, window, BillBy::Instance, Micros::from_secs(NEW_YEAR + DAY));
    assert_eq!(at_once, later);
    assert_eq!(later.lines[0].billed, 60);
}

#[test]
fn extreme_times_neither_panic_nor_go_negative() {
    let mut events = ran("i-a", 1, 0, 1, "t3.micro").to_vec();
    events.extend(ran("vol-a", 1, 0, 1, "gp3"));
    for (start, end) in [(i64::MIN, i64::MIN), (i64::MAX - 1, i64::MAX), (i64::MAX, i64::MIN)] {
        for event in &mut events {
            event.at = Micros(if event.kind == UsageKind::Open { start } else { end });
        }
        for by in BillBy::ALL {
            let window = (Micros(i64::MIN), Micros(i64::MAX));
            let bill = bill(&events, &Proofs::new(), &PriceBook::builtin(), window, *by, Micros(i64::MAX));
            assert!(bill.total >= Money::ZERO);
        }
    }
}

/// An event of a start's part.
fn part(sequence: u64, kind: UsageKind, at: Micros, sku: &str) -> UsageEvent {
    UsageEvent { sequence, ..event("i-a", 1, kind, at, sku) }
}

#[test]
fn parts_of_one_start_have_each_their_own_price_and_together_one_minimum_and_one_begun_second() {
    use UsageKind::{Close, Open};
    let lines = |events: &[UsageEvent]| {
        ever(events, BillBy::Type).lines.iter().map(|l| (l.sku.clone(), l.used, l.billed)).collect::<Vec<_>>()
    };
    let at = Micros::from_secs;
    let long = [
        part(0, Open, at(0), "t3.micro"),
        part(1, Close, at(1000), "t3.micro"),
        part(2, Open, at(1000), "m5.large"),
        part(3, Close, at(5000), "m5.large"),
    ];
    assert_eq!(lines(&long), [("m5.large".to_owned(), 4000, 4000), ("t3.micro".to_owned(), 1000, 1000)]);
    let short = [
        part(0, Open, at(0), "t3.micro"),
        part(1, Close, Micros(10_500_000), "t3.micro"),
        part(2, Open, Micros(10_500_000), "m5.large"),
        part(3, Close, Micros(20_900_000), "m5.large"),
    ];
    assert_eq!(lines(&short), [("m5.large".to_owned(), 10, 0), ("t3.micro".to_owned(), 11, 60)]);
    let mut backwards = short.to_vec();
    backwards.reverse();
    assert_eq!(lines(&backwards), lines(&short));
}

#[test]
fn a_start_that_nobody_asked_for_opens_no_minimum() {
    let mut log = [
        ran("i-a", 1, 0, 20, "t3.micro"),
        ran("i-a", 2, 100, 120, "t3.micro"),
        ran("i-a", 3, 200, 230, "t3.micro"),
    ]
    .concat();
    let count = |log: &[UsageEvent]| seconds(log, &Proofs::new(), "i-a", Micros::from_secs(1000));
    assert_eq!(count(&log), Seconds { used: 70, billed: 180 }, "three starts that were asked for");
    log[2].continues = true;
    log[4].continues = true;
    assert_eq!(count(&log), Seconds { used: 70, billed: 70 });
    log[4].continues = false;
    assert_eq!(count(&log), Seconds { used: 70, billed: 120 });
}
