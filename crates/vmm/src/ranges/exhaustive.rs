//! Every set of ten addresses, and every range put in, taken out and cut: what [`RangeSet`] says is what a set of bits says.
//! As each operation is tried on each set that there can be, no sequence of operations leads anywhere else.

use super::*;

const ADDRESSES: u64 = 10;

fn set_of(bits: u32) -> RangeSet {
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for address in (0..ADDRESSES).filter(|address| bits >> address & 1 == 1) {
        match ranges.last_mut() {
            Some(last) if last.end == address => last.end += 1,
            _ => ranges.push(address..address + 1),
        }
    }
    RangeSet(ranges)
}

fn bits_of(range: &Range<u64>) -> u32 {
    range.clone().fold(0, |bits, address| bits | 1 << address)
}

#[test]
fn every_operation_on_every_set_of_ten_addresses() {
    let mut tried = 0;
    for bits in 0..1_u32 << ADDRESSES {
        for start in 0..=ADDRESSES {
            for end in start..=ADDRESSES {
                let (set, range) = (set_of(bits), start..end);
                let mut more = set.clone();
                more.add(range.clone());
                assert_eq!(more, set_of(bits | bits_of(&range)), "{set:?} and {range:?}");
                let mut less = set.clone();
                less.remove(range.clone());
                assert_eq!(less, set_of(bits & !bits_of(&range)), "{set:?} without {range:?}");
                let mut at = start;
                let mut was = None;
                for (piece, inside) in set.cut(range.clone()) {
                    assert!(piece.start == at && !piece.is_empty(), "{set:?} cuts {range:?} at {piece:?}");
                    assert_eq!(bits & bits_of(&piece), if inside { bits_of(&piece) } else { 0 });
                    assert_ne!(was.replace(inside), Some(inside), "pieces of one kind are one");
                    at = piece.end;
                }
                assert_eq!(at, end);
                tried += 1;
            }
        }
    }
    assert_eq!(tried, 1024 * 66);
}
