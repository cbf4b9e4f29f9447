//! Numbers and times for people.

use jiff::Timestamp;
use roost_types::{Micros, Money};

/// How long ago: `12s`, `3m`, `5h`, `2d`.
pub fn age(then: Micros, now: Micros) -> String {
    let seconds = (now - then).floor_secs().max(0);
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7200 => format!("{}m", seconds / 60),
        7200..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86400),
    }
}

/// A moment, UTC, to the second.
pub fn moment(at: Micros) -> String {
    Timestamp::from_microsecond(at.0)
        .map_or_else(|_| format!("{at} s"), |stamp| stamp.strftime("%Y-%m-%dT%H:%M:%SZ").to_string())
}

/// An amount without the zeros that say nothing, at least four decimals.
pub fn price(amount: Money) -> String {
    let text = amount.to_decimal();
    let Some((whole, decimals)) = text.split_once('.') else { return text };
    let kept = decimals.trim_end_matches('0').len().max(4);
    format!("{whole}.{}", &decimals[..kept])
}

/// Memory or disk in MiB: whole GiB where it is.
pub fn mib(mib: u64) -> String {
    if mib >= 1024 && mib.is_multiple_of(1024) { format!("{} GiB", mib / 1024) } else { format!("{mib} MiB") }
}

/// Thousandths: `500` is `0.5`.
pub fn milli(milli: u64) -> String {
    let text = format!("{}.{:03}", milli / 1000, milli % 1000);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// Microseconds as milliseconds.
pub fn millis(us: u64) -> String {
    format!("{}.{:01}", us / 1000, us % 1000 / 100)
}

/// Bytes, in binary units.
pub fn bytes(bytes: u64) -> String {
    const UNITS: &[&str] = &["B", "KiB", "MiB", "GiB", "TiB"];
    let mut unit = 0;
    let mut scaled = bytes;
    while scaled >= 10 * 1024 && unit + 1 < UNITS.len() {
        scaled /= 1024;
        unit += 1;
    }
    format!("{scaled} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_prices_and_sizes_read_well() {
        let now = Micros::from_secs(1_000_000);
        for (seconds, shown) in [(-5, "0s"), (119, "119s"), (120, "2m"), (7200, "2h"), (172_800, "2d")] {
            assert_eq!(age(now - Micros::from_secs(seconds), now), shown);
        }
        assert_eq!(price(Money(10_400_000)), "0.0104");
        assert_eq!(price(Money(5_000_000_000)), "5.0000");
        assert_eq!(price(Money(173_333)), "0.000173333");
        assert_eq!(
            (mib(512).as_str(), mib(4096).as_str(), mib(1536).as_str()),
            ("512 MiB", "4 GiB", "1536 MiB")
        );
        assert_eq!((milli(500).as_str(), milli(2000).as_str(), milli(50).as_str()), ("0.5", "2", "0.05"));
        assert_eq!(bytes(20 * 1024 * 1024), "20 MiB");
        assert_eq!(moment(Micros::from_secs(0)), "1970-01-01T00:00:00Z");
    }
}
