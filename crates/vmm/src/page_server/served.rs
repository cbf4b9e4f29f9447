//! One clone: which pages it has, waits for, and gave back.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use super::faults::{Brought, Event, Faults};
use super::working_set::WorkingSet;
use crate::error::{Error, Result};
use crate::memory::PAGE;
use crate::ranges::RangeSet;
use crate::snapshot::lazy::Mapping;

/// Bytes that are brought at once, ahead of faults: one that comes meanwhile waits for no more than that.
const AT_ONCE: u64 = 16 * PAGE;
/// Most regions that a monitor may have.
const MOST_MAPPINGS: usize = 64;

/// What is said of a clone's memory must be whole pages, none of them outside the file.
pub fn check(mappings: &[Mapping], bytes: u64) -> std::result::Result<(), String> {
    if mappings.is_empty() || mappings.len() > MOST_MAPPINGS {
        return Err(format!(
            "the monitor has {} regions of memory, 1 to {MOST_MAPPINGS} are served",
            mappings.len()
        ));
    }
    for mapping in mappings {
        let Mapping { base_host_virt_addr: base, size, offset, page_size, .. } = *mapping;
        if page_size != PAGE {
            return Err(format!("the monitor has pages of {page_size} bytes, those of {PAGE} are served"));
        }
        let whole = [base, size, offset].iter().all(|number| number.is_multiple_of(PAGE));
        let inside = offset.checked_add(size).is_some_and(|end| end <= bytes);
        if !whole || !inside || base.checked_add(size).is_none() {
            return Err(format!("the monitor's region {mapping:?} is not in {bytes} bytes of memory"));
        }
    }
    Ok(())
}

/// A clone that is served.
pub struct Served {
    mappings: Vec<Mapping>,
    /// Where the memory file is mapped.
    source: u64,
    /// What is brought before it is asked for, in the clone's addresses.
    ahead: VecDeque<Range<u64>>,
    /// Faults that are not answered yet.
    waiting: VecDeque<u64>,
    /// What the clone has given back.
    removed: RangeSet,
    /// What it touches first, until when.
    learning: Option<(WorkingSet, Instant)>,
    pages_ahead: u64,
    pages_asked_for: u64,
}

impl fmt::Display for Served {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} pages brought ahead, {} when asked for", self.pages_ahead, self.pages_asked_for)
    }
}

impl Served {
    /// A clone with these regions. The pages of `known` come first; without it, it is learned for so long what comes first.
    pub fn new(
        mappings: Vec<Mapping>,
        source: u64,
        known: Option<&WorkingSet>,
        learns: Option<Duration>,
    ) -> Self {
        let ahead = known.into_iter().flat_map(WorkingSet::batches);
        let ahead = ahead.flat_map(|range| in_clone(&mappings, &range)).collect();
        let learning = learns.map(|time| (WorkingSet::default(), Instant::now() + time));
        Self {
            mappings,
            source,
            ahead,
            waiting: VecDeque::new(),
            removed: RangeSet::default(),
            learning,
            pages_ahead: 0,
            pages_asked_for: 0,
        }
    }

    /// What was learned, once its time is over or the clone has ended.
    pub fn learned(&mut self, ended: bool) -> Option<WorkingSet> {
        let (set, _) = self.learning.take_if(|(_, until)| ended || Instant::now() >= *until)?;
        Some(set)
    }

    /// One turn: what happened, then one thing that is to be done. `false`: the clone has ended.
    pub fn goes_on(&mut self, faults: &Faults, monitor: RawFd) -> Result<bool> {
        let failed = || Error::io("serving memory");
        let busy = !self.waiting.is_empty() || !self.ahead.is_empty();
        let patience = if busy { 0 } else { self.patience() };
        // A monitor says no more than its first words: what is there now is its end.
        let [happened, ended] = super::ready([faults.as_raw_fd(), monitor], patience).map_err(failed())?;
        if ended {
            return Ok(false);
        }
        let events = if happened { faults.events().map_err(failed())? } else { Vec::new() };
        for event in events {
            match event {
                Event::Fault(page) => self.waiting.push_back(page),
                Event::Removed(range) => self.removed.add(range),
            }
        }
        let turn = if self.waiting.is_empty() { self.bring_ahead(faults) } else { self.answer(faults) };
        turn.map_err(failed())
    }

    /// For how many milliseconds there is nothing to do, if nothing happens.
    fn patience(&self) -> libc::c_int {
        let left = self.learning.as_ref().map(|(_, until)| until.saturating_duration_since(Instant::now()));
        left.map_or(-1, |left| libc::c_int::try_from(left.as_millis() + 1).unwrap_or(libc::c_int::MAX))
    }

    /// Answers the fault that waits longest.
    fn answer(&mut self, faults: &Faults) -> io::Result<bool> {
        let Some(page) = self.waiting.front().copied() else { return Ok(true) };
        let range = page..page + PAGE;
        let brought = if self.is_removed(&range) {
            faults.zero(page)?
        } else if let Some(offset) = self.offset(page) {
            if let Some((set, _)) = &mut self.learning {
                set.add(offset..offset + PAGE);
            }
            faults.copy(range, self.source + offset)?
        } else {
            return Err(io::Error::other(format!("a fault at {page:#x}, where the monitor has no memory")));
        };
        match brought {
            Brought::Gone => return Ok(false),
            Brought::Busy => return Ok(true),
            Brought::There => faults.wake(page),
            Brought::Bytes(_) => self.pages_asked_for += 1,
        }
        self.waiting.pop_front();
        Ok(true)
    }

    /// Brings some of what will be asked for.
    fn bring_ahead(&mut self, faults: &Faults) -> io::Result<bool> {
        let mut left = AT_ONCE;
        while left > 0 {
            let Some(range) = self.ahead.pop_front() else { break };
            let end = range.end.min(range.start + left);
            // What was given back meanwhile is zero, and not what the file says.
            let Some((piece, removed)) = self.removed.cut(range.start..end).into_iter().next() else {
                continue;
            };
            let mut next = piece.end;
            if let (false, Some(offset)) = (removed, self.offset(piece.start)) {
                next = match faults.copy(piece.clone(), self.source + offset)? {
                    Brought::Gone => return Ok(false),
                    Brought::Busy => {
                        self.ahead.push_front(range);
                        break;
                    }
                    Brought::There => piece.start + PAGE,
                    Brought::Bytes(bytes) => {
                        self.pages_ahead += bytes / PAGE;
                        piece.start + bytes
                    }
                };
            }
            left -= next - piece.start;
            if next < range.end {
                self.ahead.push_front(next..range.end);
            }
        }
        Ok(true)
    }

    fn is_removed(&self, page: &Range<u64>) -> bool {
        self.removed.cut(page.clone()).iter().any(|(_, removed)| *removed)
    }

    /// Where an address of the clone's is in the memory file.
    fn offset(&self, address: u64) -> Option<u64> {
        self.mappings.iter().find_map(|mapping| {
            let inside = address.checked_sub(mapping.base_host_virt_addr)?;
            (inside < mapping.size).then_some(mapping.offset + inside)
        })
    }
}

/// Where a range of the memory file is in the clone.
fn in_clone(mappings: &[Mapping], range: &Range<u64>) -> Vec<Range<u64>> {
    let part = |mapping: &Mapping| {
        let (start, end) = (range.start.max(mapping.offset), range.end.min(mapping.offset + mapping.size));
        let at = |offset: u64| mapping.base_host_virt_addr + (offset - mapping.offset);
        (start < end).then(|| at(start)..at(end))
    };
    mappings.iter().filter_map(part).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(base: u64, size: u64, offset: u64) -> Mapping {
        Mapping { base_host_virt_addr: base, size, offset, page_size: PAGE, page_size_kib: PAGE }
    }

    #[test]
    fn ranges_of_the_file_are_found_in_every_region() {
        let mappings = [mapping(0x10_0000, 0x4000, 0), mapping(0x80_0000, 0x2000, 0x4000)];
        assert_eq!(in_clone(&mappings, &(0x3000..0x5000)), [0x10_3000..0x10_4000, 0x80_0000..0x80_1000]);
        assert_eq!(in_clone(&mappings, &(0x6000..0x7000)), []);
        let served = Served::new(mappings.to_vec(), 0, None, None);
        let offsets = [0xf_f000, 0x10_0000, 0x10_3fff, 0x10_4000, 0x80_1000].map(|at| served.offset(at));
        assert_eq!(offsets, [None, Some(0), Some(0x3fff), None, Some(0x5000)]);
    }

    #[test]
    fn regions_outside_the_file_are_refused() {
        let fine = mapping(0x10_0000, 0x4000, 0);
        assert_eq!(check(std::slice::from_ref(&fine), 0x4000), Ok(()));
        for (wrong, why) in [
            (mapping(0x10_0000, 0x4000, 0x1000), "is not in"),
            (mapping(0x10_0001, 0x1000, 0), "is not in"),
            (mapping(0x10_0000, 0x1001, 0), "is not in"),
            (mapping(u64::MAX - 0xfff, 0x1000, 0), "is not in"),
            (mapping(0x10_0000, u64::MAX - 0xfff, 0x1000), "is not in"),
            (Mapping { page_size: 2 << 20, ..fine.clone() }, "2097152 bytes"),
        ] {
            assert!(check(std::slice::from_ref(&wrong), 0x4000).unwrap_err().contains(why), "{wrong:?}");
        }
        assert!(check(&[], 0x4000).is_err() && check(&vec![fine; 65], 0x4000).is_err());
    }
}
