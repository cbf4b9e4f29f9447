//! Time as integers: microseconds since the Unix epoch, UTC.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::ops::{Add, Sub};

/// Microseconds. As a point in time: since 1970-01-01T00:00:00Z. As a span: a length, possibly negative.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Micros(pub i64);

impl Micros {
    /// One second.
    pub const SECOND: Micros = Micros(1_000_000);

    /// From whole seconds.
    pub const fn from_secs(seconds: i64) -> Self {
        Self(seconds * 1_000_000)
    }

    /// Whole seconds, rounded towards minus infinity.
    pub const fn floor_secs(self) -> i64 {
        self.0.div_euclid(1_000_000)
    }

    /// Whole seconds, rounded up: any begun second counts.
    pub const fn ceil_secs(self) -> i64 {
        -((-self.0).div_euclid(1_000_000))
    }
}

impl Add for Micros {
    type Output = Micros;
    fn add(self, other: Micros) -> Micros {
        Micros(self.0 + other.0)
    }
}

impl Sub for Micros {
    type Output = Micros;
    fn sub(self, other: Micros) -> Micros {
        Micros(self.0 - other.0)
    }
}

impl fmt::Display for Micros {
    /// Seconds with six decimals; formatting as a date is for the rooms that know a calendar.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (sign, magnitude) =
            if self.0 < 0 { ("-", self.0.unsigned_abs()) } else { ("", self.0.unsigned_abs()) };
        write!(f, "{sign}{}.{:06}", magnitude / 1_000_000, magnitude % 1_000_000)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_of_seconds_is_exact_on_both_sides_of_zero() {
        assert_eq!(Micros(1).ceil_secs(), 1);
        assert_eq!(Micros(1_000_000).ceil_secs(), 1);
        assert_eq!(Micros(1_000_001).ceil_secs(), 2);
        assert_eq!(Micros(-1).floor_secs(), -1);
        assert_eq!(Micros(-1_500_000).ceil_secs(), -1);
        assert_eq!(Micros(0).ceil_secs(), 0);
    }
}
