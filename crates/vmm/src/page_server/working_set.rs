//! Which pages a clone touches first, as a file: JSON, with the snapshot that they are of.

use std::fs;
use std::io::{self, ErrorKind, Read};
use std::ops::Range;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::memory::PAGE;
use crate::ranges::RangeSet;

/// The version that is written and read.
const VERSION: u32 = 1;
/// Longer files are none.
const MOST_BYTES: u64 = 16 << 20;

/// Ranges of the memory file, whole pages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkingSet(RangeSet);

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    version: u32,
    /// The snapshot's id, in hexadecimal digits.
    snapshot: String,
    /// First page and how many, of the memory file.
    pages: Vec<(u64, u64)>,
}

impl WorkingSet {
    /// Puts bytes of the memory file in.
    pub fn add(&mut self, bytes: Range<u64>) {
        self.0.add(bytes);
    }

    /// How many pages it has.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.ranges().map(|range| (range.end - range.start) / PAGE).sum()
    }

    /// Its ranges, in order.
    pub fn ranges(&self) -> impl Iterator<Item = Range<u64>> {
        self.0.cut(0..u64::MAX).into_iter().filter(|(_, inside)| *inside).map(|(range, _)| range)
    }

    /// Reads the one of a snapshot with so many bytes of memory. `None`: there is none yet.
    ///
    /// # Errors
    /// [`Error::Open`]; [`Error::Snapshot`] for what is no working set, or another snapshot's.
    pub fn read(path: &Path, snapshot: [u8; 16], bytes: u64) -> Result<Option<Self>> {
        let open = |source| Error::Open { what: "working set", path: path.to_owned(), source };
        let mut text = Vec::new();
        match fs::File::open(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            file => file.and_then(|file| file.take(MOST_BYTES).read_to_end(&mut text)).map_err(open)?,
        };
        let refuse = |why: &str| {
            let path = path.display();
            Error::Snapshot(format!(
                "working set {path}: {why} (without the file, the next clone makes another)"
            ))
        };
        let written: Written = serde_json::from_slice(&text).map_err(|error| refuse(&error.to_string()))?;
        if written.version != VERSION {
            return Err(refuse(&format!("its version is {}, version {VERSION} is read", written.version)));
        }
        if written.snapshot != digits(snapshot) {
            return Err(refuse("it is another snapshot's"));
        }
        let mut set = Self::default();
        for (first, count) in written.pages {
            let end = first.checked_add(count).and_then(|end| end.checked_mul(PAGE));
            let end = end.filter(|end| count > 0 && *end <= bytes);
            let end = end.ok_or_else(|| refuse("it has pages that the memory has not"))?;
            set.add(first * PAGE..end);
        }
        Ok(Some(set))
    }

    /// Writes it; what was there is replaced at once or not at all.
    ///
    /// # Errors
    /// The host's.
    pub fn write(&self, path: &Path, snapshot: [u8; 16]) -> io::Result<()> {
        let pages = self.ranges().map(|range| (range.start / PAGE, (range.end - range.start) / PAGE));
        let written = Written { version: VERSION, snapshot: digits(snapshot), pages: pages.collect() };
        let mut next = path.as_os_str().to_owned();
        next.push(".new");
        fs::write(&next, serde_json::to_vec(&written)?)?;
        fs::rename(&next, path)
    }
}

fn digits(id: [u8; 16]) -> String {
    format!("{:032x}", u128::from_be_bytes(id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let (path, id) = (folder.path().join("set"), [7; 16]);
        assert_eq!(WorkingSet::read(&path, id, 100 * PAGE).unwrap(), None);
        let mut set = WorkingSet::default();
        for page in [9, 3, 4, 99, 5] {
            set.add(page * PAGE..(page + 1) * PAGE);
        }
        set.write(&path, id).unwrap();
        assert_eq!((set.pages(), set.ranges().count()), (5, 3));
        assert_eq!(WorkingSet::read(&path, id, 100 * PAGE).unwrap(), Some(set));
        let refused = |id, bytes| WorkingSet::read(&path, id, bytes).unwrap_err().to_string();
        assert!(refused([8; 16], 100 * PAGE).contains("another snapshot's"));
        assert!(refused(id, 99 * PAGE).contains("pages that the memory has not"));
        let ours = fs::read_to_string(&path).unwrap();
        for (from, to, why) in [
            ("\"version\":1", "\"version\":2", "version 1 is read"),
            ("[9,1]", "[9,0]", "pages that the memory has not"),
            ("[9,1]", "[18446744073709551615,1]", "pages that the memory has not"),
            ("[9,1]", "[4503599627370496,1]", "pages that the memory has not"),
            ("pages", "sides", "unknown field"),
            ("{", "", "line 1"),
        ] {
            assert!(ours.contains(from), "{ours}");
            fs::write(&path, ours.replacen(from, to, 1)).unwrap();
            assert!(refused(id, 100 * PAGE).contains(why), "{}", refused(id, 100 * PAGE));
        }
    }
}
