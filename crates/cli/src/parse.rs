//! Small texts of the command line: counts, tags, spans and points in time.

use crate::error::{Error, Result};
use crate::harmless;
use jiff::{Timestamp, civil, tz::TimeZone};
use roost_types::api::{MAX_LAUNCH_COUNT, Tags};
use roost_types::{InstanceId, Micros};
use std::time::Duration;

/// Longest value of a tag, in characters, as on EC2.
const MAX_NAME: usize = 255;

/// `N` or `MIN:MAX`.
pub fn count(text: &str) -> Result<(u32, u32)> {
    let bad = || {
        Error::parameter(format!(
            "--count {text:?} is not allowed: give a number from 1 to {MAX_LAUNCH_COUNT}, or MIN:MAX such as 2:5"
        ))
    };
    let one = |part: &str| part.parse::<u32>().map_err(|_| bad());
    let (min, max) = match text.split_once(':') {
        Some((min, max)) => (one(min)?, one(max)?),
        None => (one(text)?, one(text)?),
    };
    if min == 0 || min > max || max > MAX_LAUNCH_COUNT {
        return Err(bad());
    }
    Ok((min, max))
}

/// `KEY=VALUE` texts, and the name as the tag `Name`.
pub fn tags(pairs: &[String], name: Option<&str>) -> Result<Tags> {
    let mut tags = Tags::new();
    let named = name.map(|name| ("Name".to_owned(), name.to_owned()));
    let given = pairs.iter().map(|pair| match pair.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(Error::parameter(format!("--tag {pair:?} is not allowed: give KEY=VALUE"))),
    });
    for pair in named.map(Ok).into_iter().chain(given) {
        let (key, value) = pair?;
        if key == "Name" {
            check_name(&value)?;
        }
        if tags.contains_key(&key) {
            return Err(Error::parameter(format!("the tag {key:?} is given twice: give it once")));
        }
        tags.insert(key, value);
    }
    Ok(tags)
}

/// A name is typed instead of an id, and shown in a table.
fn check_name(name: &str) -> Result<()> {
    let count = name.chars().count();
    let rule = if name.starts_with(InstanceId::PREFIX) {
        "it must not begin with \"i-\", as ids do"
    } else if name.starts_with('-') {
        "it must not begin with \"-\", as options do"
    } else if name.trim() != name || count == 0 || count > MAX_NAME {
        "it must have 1 to 255 characters, of which neither the first nor the last is a blank"
    } else if harmless::text(name) != name {
        "it must have no characters that a terminal cannot show"
    } else {
        return Ok(());
    };
    let shown: String = name.chars().take(80).collect();
    Err(Error::parameter(format!("the name {shown:?} is not allowed: {rule}")))
}

/// `90`, `90s`, `5m`, `2h` or `1d`.
pub fn duration(text: &str) -> std::result::Result<Duration, String> {
    let (digits, unit) = match text.find(|letter: char| !letter.is_ascii_digit()) {
        Some(at) => text.split_at(at),
        None => (text, "s"),
    };
    let seconds = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86400,
        _ => 0,
    };
    match digits.parse::<u64>().ok().and_then(|number| number.checked_mul(seconds)) {
        Some(total) if total > 0 => Ok(Duration::from_secs(total)),
        _ => Err("give a span such as 90s, 5m, 2h or 1d".to_owned()),
    }
}

/// `2026-11-20`, `2026-11-20T12:00:00Z`, `now`, or a span such as `24h`, meaning so long ago.
pub fn moment(what: &str, text: &str, now: Micros) -> Result<Micros> {
    if text == "now" {
        return Ok(now);
    }
    if let Ok(span) = duration(text) {
        return Ok(now - Micros(i64::try_from(span.as_micros()).unwrap_or(i64::MAX)));
    }
    let stamp = text.parse::<Timestamp>().ok().or_else(|| {
        let day = text.parse::<civil::Date>().ok()?;
        Some(day.to_zoned(TimeZone::UTC).ok()?.timestamp())
    });
    stamp.map(|stamp| Micros(stamp.as_microsecond())).ok_or_else(|| {
        Error::parameter(format!(
            "{what} {text:?} is not a time: give a day (2026-11-20, from 00:00 UTC), a moment \
             (2026-11-20T12:00:00Z), or how long ago (90s, 5m, 24h, 7d)"
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_a_number_or_a_range_within_the_limit() {
        assert_eq!(count("1").unwrap(), (1, 1));
        assert_eq!(count("2:5").unwrap(), (2, 5));
        for bad in ["0", "10000", "5:2", "0:3", "", ":", "1:", "-1", "x", "1:2:3"] {
            let error = count(bad).unwrap_err();
            assert!(error.to_string().contains("from 1 to 1000"), "{error}");
            assert_eq!((error.code(), error.exit_code()), ("InvalidParameterValue", 3), "{bad}");
        }
    }

    #[test]
    fn the_name_is_a_tag_and_no_tag_is_given_twice() {
        let tags_of = |pairs: &[&str], name| {
            tags(&pairs.iter().map(|pair| (*pair).to_owned()).collect::<Vec<_>>(), name)
        };
        let got = tags_of(&["a=b=c", "e="], Some("web")).unwrap();
        assert_eq!(got.len(), 3);
        assert_eq!((got["Name"].as_str(), got["a"].as_str(), got["e"].as_str()), ("web", "b=c", ""));
        for (pairs, name) in
            [(&["x"][..], None), (&["=v"], None), (&["Name=a"], Some("b")), (&["a=1", "a=2"], None)]
        {
            assert_eq!(tags_of(pairs, name).unwrap_err().exit_code(), 3, "{pairs:?}");
        }
    }

    #[test]
    fn a_name_can_be_typed_shown_and_told_from_an_id() {
        for good in ["web", "Zürich 東京", "i", "web-i-1", &"a".repeat(255)] {
            assert!(tags(&[], Some(good)).is_ok(), "{good}");
        }
        for bad in
            ["i-web", "", " web", "web\t", "--all", "a\u{1b}[2J", "a\u{202e}b", "a\nb", &"a".repeat(256)]
        {
            for given in [tags(&[], Some(bad)), tags(&[format!("Name={bad}")], None)] {
                let error = given.unwrap_err();
                assert!(error.to_string().contains("it must"), "{error}");
                assert_eq!(error.exit_code(), 3);
            }
        }
    }

    #[test]
    fn moments_are_days_instants_or_spans_ago() {
        let now = Micros::from_secs(1_000_000);
        assert_eq!(moment("--since", "1h", now).unwrap(), Micros::from_secs(1_000_000 - 3600));
        assert_eq!(moment("--since", "1970-01-02", now).unwrap(), Micros::from_secs(86_400));
        assert_eq!(moment("--since", "1970-01-01T00:00:05Z", now).unwrap(), Micros::from_secs(5));
        assert_eq!(moment("--since", "now", now).unwrap(), now);
        for bad in ["yesterday", "", "2026-13-01", "0s", "99999999999999999999d"] {
            assert!(moment("--since", bad, now).unwrap_err().to_string().contains("--since"), "{bad}");
        }
    }
}
