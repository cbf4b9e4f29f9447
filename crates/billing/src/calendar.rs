//! The calendar that a bill needs, all of it UTC: days, months and how long they are.
//!
//! UTC has no daylight saving time, and Unix time no leap seconds: a day is 86,400 seconds, always.

use jiff::Timestamp;
use jiff::civil::{Date, date};
use jiff::tz::TimeZone;
use roost_types::Micros;

const DAY: i64 = 86_400 * 1_000_000;

/// Days since 1970-01-01.
pub(crate) fn day_of(at: Micros) -> i64 {
    at.0.div_euclid(DAY)
}

/// The first moment of a day.
pub(crate) fn day_start(day: i64) -> Micros {
    Micros(day.saturating_mul(DAY))
}

/// A day as `2026-11-20`.
pub(crate) fn day_name(day: i64) -> String {
    date_of(day_start(day)).to_string()
}

/// The first moment of the month in which `at` lies.
pub fn month_start(at: Micros) -> Micros {
    start_of(date_of(at).first_of_month())
}

/// The first moment of the month after the one in which `at` lies.
pub(crate) fn next_month_start(at: Micros) -> Micros {
    let day = i64::from(date_of(at).days_in_month());
    Micros(month_start(at).0.saturating_add(day * DAY))
}

/// The length in seconds of the month in which `at` lies.
pub(crate) fn month_seconds(at: Micros) -> u64 {
    u64::from(date_of(at).days_in_month().unsigned_abs()) * 86_400
}

/// Reads `2026-01-01` or `2026-01-01T00:00:00Z` (or with another offset); a date means its first moment, UTC.
pub fn parse_moment(text: &str) -> Option<Micros> {
    let moment = text.parse::<Timestamp>().ok();
    moment.map(|at| Micros(at.as_microsecond())).or_else(|| text.parse::<Date>().ok().map(start_of))
}

/// The date of a moment; the ends of the calendar (years -9999 and 9999) stand for all beyond them.
fn date_of(at: Micros) -> Date {
    match Timestamp::from_microsecond(at.0) {
        Ok(moment) => moment.to_zoned(TimeZone::UTC).date(),
        Err(_) if at.0 < 0 => date(-9999, 1, 1),
        Err(_) => date(9999, 12, 31),
    }
}

fn start_of(day: Date) -> Micros {
    let days = day.since(date(1970, 1, 1)).map_or(0, |span| span.get_days());
    day_start(days.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Micros {
        parse_moment(text).unwrap()
    }

    #[test]
    fn months_have_their_own_lengths_also_in_leap_years() {
        for (moment, days) in [
            ("2026-01-15", 31),
            ("2026-02-15", 28),
            ("2024-02-29T23:59:59Z", 29),
            ("2000-02-01", 29),
            ("1900-02-01", 28),
            ("2026-04-30", 30),
            ("2026-12-31T23:59:59.999999Z", 31),
        ] {
            assert_eq!(month_seconds(at(moment)), days * 86_400, "{moment}");
            let length = next_month_start(at(moment)) - month_start(at(moment));
            assert_eq!(length.0, i64::try_from(days).unwrap() * DAY, "{moment}");
        }
        assert_eq!(next_month_start(at("2026-12-31")), at("2027-01-01"));
        assert_eq!(month_start(at("2026-12-01")), at("2026-12-01"));
        assert_eq!(at("1970-01-01"), Micros(0));
    }

    #[test]
    fn days_in_which_clocks_change_elsewhere_are_as_long_as_others() {
        for day in ["2026-03-29", "2026-10-25", "2026-03-08", "2016-12-31"] {
            let number = day_of(at(day));
            assert_eq!(day_name(number), day);
            assert_eq!(day_start(number + 1) - day_start(number), Micros::from_secs(86_400));
        }
    }

    #[test]
    fn the_ends_of_time_do_not_panic() {
        for end in [Micros(i64::MIN), Micros(i64::MAX)] {
            assert!(month_seconds(end) > 0);
            assert!(next_month_start(end) > month_start(end));
            assert!(!day_name(day_of(end)).is_empty());
        }
    }
}
