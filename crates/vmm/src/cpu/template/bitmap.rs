//! A bitmap of a template: which bits of a register are cleared, which are set, which stay.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// `0b`, and from the highest bit down a `0` (cleared), a `1` (set) or an `x` (stays) for each; `_` for the eye. Bits that are left
/// out in front stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Bitmap<const WIDTH: usize> {
    /// Bits that do not stay.
    decided: u64,
    /// Those of them that are set.
    set: u64,
}

impl<const WIDTH: usize> Bitmap<WIDTH> {
    /// All bits as in this value.
    #[must_use]
    pub const fn exact(value: u64) -> Self {
        let decided = u64::MAX >> (64 - WIDTH);
        Self { decided, set: value & decided }
    }

    /// These bits cleared, all others left.
    #[must_use]
    pub const fn clearing(bits: u64) -> Self {
        Self { decided: bits, set: 0 }
    }

    /// A register with this bitmap applied.
    #[must_use]
    pub const fn apply(self, value: u64) -> u64 {
        value & !self.decided | self.set
    }

    /// Bits that it sets.
    #[must_use]
    pub const fn sets(self) -> u64 {
        self.set
    }

    /// What a register is, if every bit of it is decided.
    #[must_use]
    pub const fn value(self) -> Option<u64> {
        if self.decided == u64::MAX >> (64 - WIDTH) { Some(self.set) } else { None }
    }
}

impl<const WIDTH: usize> FromStr for Bitmap<WIDTH> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refuse = || {
            format!(
                "bitmap {text:?} is not 0b and then 1–{WIDTH} of 0 (cleared), 1 (set) and x (left), from the highest bit down"
            )
        };
        let digits = text.strip_prefix("0b").ok_or_else(refuse)?;
        let mut bitmap = Self { decided: 0, set: 0 };
        let mut count = 0;
        for digit in digits.chars().filter(|digit| *digit != '_') {
            let (decided, set) = match digit {
                '0' => (1, 0),
                '1' => (1, 1),
                'x' => (0, 0),
                _ => return Err(refuse()),
            };
            count += 1;
            if count > WIDTH {
                return Err(refuse());
            }
            bitmap = Self { decided: bitmap.decided << 1 | decided, set: bitmap.set << 1 | set };
        }
        if count == 0 { Err(refuse()) } else { Ok(bitmap) }
    }
}

impl<const WIDTH: usize> TryFrom<String> for Bitmap<WIDTH> {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl<const WIDTH: usize> fmt::Display for Bitmap<WIDTH> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("0b")?;
        for bit in (0..WIDTH).rev() {
            formatter.write_str(match (self.decided >> bit & 1, self.set >> bit & 1) {
                (0, _) => "x",
                (_, 0) => "0",
                _ => "1",
            })?;
        }
        Ok(())
    }
}

impl<const WIDTH: usize> From<Bitmap<WIDTH>> for String {
    fn from(bitmap: Bitmap<WIDTH>) -> Self {
        bitmap.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn bits_are_cleared_set_and_left() {
        let bitmap: Bitmap<32> = "0bxxxx000000000011xx00011011110010".parse().unwrap();
        for value in [0, u64::from(u32::MAX), 0x5555_5555, 0x1234_5678] {
            // Firecracker's own example: what it says of the three kinds of bits.
            let (left, set) = (0xf000_c000, 0x0003_06f2);
            assert_eq!(bitmap.apply(value), value & left | set, "{value:#x}");
        }
        assert_eq!("0b10".parse::<Bitmap<32>>().unwrap().apply(0xffff), 0xfffe);
        assert_eq!("0b1_0".parse::<Bitmap<64>>().unwrap().apply(u64::MAX), u64::MAX - 1);
    }

    #[test]
    fn what_is_no_bitmap_is_refused_with_the_rule() {
        for text in ["", "0b", "0b_", "0x1", "1", "0b2", "0bX", "0b 1", &format!("0b{}", "x".repeat(33))] {
            let why = text.parse::<Bitmap<32>>().unwrap_err();
            assert!(why.contains(&format!("{text:?}")) && why.contains("1–32"), "{why}");
        }
    }

    proptest! {
        #[test]
        fn what_is_printed_is_read_again(decided: u64, value: u64) {
            let (narrow, wide) = (decided & 0xffff_ffff, decided);
            let one = Bitmap::<32> { decided: narrow, set: value & narrow };
            prop_assert_eq!(one.to_string().parse::<Bitmap<32>>().unwrap(), one);
            let other = Bitmap::<64> { decided: wide, set: value & wide };
            prop_assert_eq!(other.to_string().parse::<Bitmap<64>>().unwrap(), other);
        }

        #[test]
        fn what_is_read_is_printed_again(digits in "[01x]{1,64}") {
            let bitmap: Bitmap<64> = format!("0b{digits}").parse().unwrap();
            prop_assert_eq!(bitmap.to_string(), format!("0b{digits:x>64}"));
        }

        #[test]
        fn any_text_is_read_or_refused(text: String) {
            let _ = text.parse::<Bitmap<32>>();
        }

        #[test]
        fn each_bit_is_what_its_digit_says(digits in "[01x]{32}", value: u32) {
            let result = format!("0b{digits}").parse::<Bitmap<32>>().unwrap().apply(value.into());
            for (at, digit) in digits.chars().rev().enumerate() {
                let (is, was) = (result >> at & 1, u64::from(value >> at & 1));
                prop_assert_eq!(is, match digit { '0' => 0, '1' => 1, _ => was });
            }
            prop_assert_eq!(result >> 32, 0);
        }
    }
}
