//! A set of addresses, as few ranges: for what holds of many pages that mostly lie side by side.

use std::ops::Range;

/// Ranges in ascending order, none empty, none touching the next.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RangeSet(Vec<Range<u64>>);

impl RangeSet {
    /// How many ranges it takes to say what is in the set.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether nothing is in the set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The ranges, in order.
    #[must_use]
    pub fn into_ranges(self) -> Vec<Range<u64>> {
        self.0
    }

    /// Puts a range in.
    pub fn add(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let from = self.0.partition_point(|other| other.end < range.start);
        let to = self.0.partition_point(|other| other.start <= range.end);
        let touched = &self.0[from..to];
        let start = touched.first().map_or(range.start, |first| first.start.min(range.start));
        let end = touched.last().map_or(range.end, |last| last.end.max(range.end));
        self.0.splice(from..to, std::iter::once(start..end));
    }

    /// Takes a range out.
    pub fn remove(&mut self, range: Range<u64>) {
        let (from, to) = self.touched(&range);
        if from == to {
            return;
        }
        let (before, behind) = (self.0[from].start..range.start, range.end..self.0[to - 1].end);
        self.0.splice(from..to, [before, behind].into_iter().filter(|rest| !rest.is_empty()));
    }

    /// Cuts a range where the set begins or ends; says of each piece whether it is in the set.
    #[must_use]
    pub fn cut(&self, range: Range<u64>) -> Vec<(Range<u64>, bool)> {
        let (from, to) = self.touched(&range);
        let mut pieces = Vec::new();
        let mut at = range.start;
        for inside in &self.0[from..to] {
            let (start, end) = (inside.start.max(range.start), inside.end.min(range.end));
            pieces.extend([(at..start, false), (start..end, true)]);
            at = end;
        }
        pieces.push((at..range.end, false));
        pieces.retain(|(piece, _)| !piece.is_empty());
        pieces
    }

    /// Indices of the ranges that have something in common with this one.
    fn touched(&self, range: &Range<u64>) -> (usize, usize) {
        if range.is_empty() {
            return (0, 0);
        }
        let from = self.0.partition_point(|other| other.end <= range.start);
        (from, self.0.partition_point(|other| other.start < range.end))
    }
}

#[cfg(test)]
mod exhaustive;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn range() -> impl Strategy<Value = Range<u64>> {
        (0..60_u64, 0..20_u64).prop_map(|(start, length)| start..start + length)
    }

    #[test]
    fn a_hole_makes_two_ranges_and_filling_it_makes_one() {
        let mut set = RangeSet::default();
        set.add(10..20);
        set.remove(13..15);
        assert_eq!(set, RangeSet(vec![10..13, 15..20]));
        assert_eq!(set.cut(12..16), [(12..13, true), (13..15, false), (15..16, true)]);
        set.add(13..15);
        assert_eq!((set.len(), set.cut(0..30)[1].clone()), (1, (10..20, true)));
    }

    proptest! {
        #[test]
        fn it_is_the_set_of_what_was_added_and_not_removed(
            steps in proptest::collection::vec((any::<bool>(), range()), 0..40), look in range(),
        ) {
            let (mut set, mut model) = (RangeSet::default(), BTreeSet::new());
            for (add, range) in steps {
                if add {
                    model.extend(range.clone());
                    set.add(range);
                } else {
                    range.clone().for_each(|address| { model.remove(&address); });
                    set.remove(range);
                }
                prop_assert_eq!(set.0.iter().cloned().flatten().collect::<BTreeSet<_>>(), model.clone());
                prop_assert!(set.0.windows(2).all(|pair| pair[0].end < pair[1].start), "{:?}", set);
                prop_assert!(set.0.iter().all(|range| !range.is_empty()));
            }
            let mut at = look.start;
            for (piece, inside) in set.cut(look.clone()) {
                prop_assert_eq!(piece.start, at);
                prop_assert!(piece.clone().all(|address| model.contains(&address) == inside));
                at = piece.end;
            }
            prop_assert!(look.is_empty() || at == look.end);
        }
    }
}
