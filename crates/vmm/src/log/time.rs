//! The date of a line, in UTC. The C library's own looks into files for the time zone, which are out of reach after lock-down.

use std::time::SystemTime;

const DAY: u64 = 86_400;
/// Days of 400 years, of 100, and of 4.
const DAYS_OF_400: u64 = 146_097;
const DAYS_OF_100: u64 = 36_524;
const DAYS_OF_4: u64 = 1461;
/// Days from 0000-03-01 to 1970-01-01.
const BEFORE_1970: u64 = 719_468;

/// `2026-11-27T21:10:05.123456789`.
#[must_use]
pub fn now() -> String {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    format!("{}.{:09}", text(since.as_secs()), since.subsec_nanos())
}

fn text(seconds: u64) -> String {
    let (year, month, day) = date(seconds / DAY);
    let (hour, minute, second) = (seconds % DAY / 3600, seconds % 3600 / 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}")
}

/// Year, month and day so many days after 1970-01-01. Years begin in March here, so that the day that comes and goes is their last.
fn date(days: u64) -> (u64, u64, u64) {
    let days = days + BEFORE_1970;
    let (eras, day) = (days / DAYS_OF_400, days % DAYS_OF_400);
    let year = (day - day / (DAYS_OF_4 - 1) + day / DAYS_OF_100 - day / (DAYS_OF_400 - 1)) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    // From March on, months have 31, 30, 31, 30, 31 days, again and again.
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, later) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    (400 * eras + year + later, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_follow_each_other_as_in_a_calendar() {
        let mut days = 0;
        for year in 1970..2800_u64 {
            let leap = year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
            for (month, length) in
                (1..).zip([31, if leap { 29 } else { 28 }, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31])
            {
                for day in 1..=length {
                    assert_eq!(date(days), (year, month, day));
                    days += 1;
                }
            }
        }
    }

    #[test]
    fn the_time_of_day_is_there() {
        assert_eq!(text(0), "1970-01-01T00:00:00");
        assert_eq!(text(1_709_251_199), "2024-02-29T23:59:59");
    }
}
