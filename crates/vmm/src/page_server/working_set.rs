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
/// What is brought in the order of its addresses: each range costs a system call.
const BATCH: u64 = 512 * PAGE;
/// Longer files are none.
const MOST_BYTES: u64 = 16 << 20;

/// Ranges of the memory file, whole pages, in the order in which they are wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkingSet {
    order: Vec<Range<u64>>,
    all: RangeSet,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    version: u32,
    /// The snapshot's id, in hexadecimal digits.
    snapshot: String,
    /// First page and how many, of the memory file, in the order in which they are wanted.
    pages: Vec<(u64, u64)>,
}

impl WorkingSet {
    /// Puts bytes of the memory file behind what is there; what is in it stays where it is.
    pub fn add(&mut self, bytes: Range<u64>) {
        for (piece, _) in self.all.cut(bytes.clone()).into_iter().filter(|(_, known)| !known) {
            match self.order.last_mut().filter(|last| last.end == piece.start) {
                Some(last) => last.end = piece.end,
                None => self.order.push(piece),
            }
        }
        self.all.add(bytes);
    }

    /// How many pages it has.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.order.iter().map(|range| (range.end - range.start) / PAGE).sum()
    }

    /// The same as fewer ranges: what is wanted at about the same time is in the order of its addresses.
    #[must_use]
    pub fn batches(&self) -> Vec<Range<u64>> {
        let (mut batches, mut batch, mut bytes) = (Vec::new(), RangeSet::default(), 0);
        for range in &self.order {
            batch.add(range.clone());
            bytes += range.end - range.start;
            if bytes >= BATCH {
                batches.extend(std::mem::take(&mut batch).into_ranges());
                bytes = 0;
            }
        }
        batches.extend(batch.into_ranges());
        batches
    }

    /// Reads the one of a snapshot with so many bytes of memory. `None`: there is none yet.
    ///
    /// # Errors
    /// [`Error::Path`]; [`Error::Snapshot`] for what is no working set, or another snapshot's.
    pub fn read(path: &Path, snapshot: [u8; 16], bytes: u64) -> Result<Option<Self>> {
        let open = |source| Error::Path { what: "working set", path: path.to_owned(), source };
        let mut text = Vec::new();
        match fs::File::open(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            file => file.and_then(|file| file.take(MOST_BYTES).read_to_end(&mut text)).map_err(open)?,
        };
        let set = Self::parse(&text, snapshot, bytes).map_err(|why| {
            let path = path.display();
            Error::Snapshot(format!(
                "working set {path}: {why} (without the file, the next clone makes another)"
            ))
        })?;
        Ok(Some(set))
    }

    /// Reads the text of a file; as [`WorkingSet::read`].
    ///
    /// # Errors
    /// Why it is none.
    pub fn parse(text: &[u8], snapshot: [u8; 16], bytes: u64) -> std::result::Result<Self, String> {
        let written: Written = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        if written.version != VERSION {
            return Err(format!("its version is {}, version {VERSION} is read", written.version));
        }
        if written.snapshot != digits(snapshot) {
            return Err("it is another snapshot's".into());
        }
        let mut set = Self::default();
        for (first, count) in written.pages {
            let end = first.checked_add(count).and_then(|end| end.checked_mul(PAGE));
            let end = end.filter(|end| count > 0 && *end <= bytes);
            let end = end.ok_or("it has pages that the memory has not")?;
            set.add(first * PAGE..end);
        }
        Ok(set)
    }

    /// The text of its file.
    ///
    /// # Errors
    /// None that is known.
    pub fn to_text(&self, snapshot: [u8; 16]) -> serde_json::Result<Vec<u8>> {
        let pages = self.order.iter().map(|range| (range.start / PAGE, (range.end - range.start) / PAGE));
        serde_json::to_vec(&Written { version: VERSION, snapshot: digits(snapshot), pages: pages.collect() })
    }

    /// Writes it; what was there is replaced at once or not at all.
    ///
    /// # Errors
    /// The host's.
    pub fn write(&self, path: &Path, snapshot: [u8; 16]) -> io::Result<()> {
        let mut next = path.as_os_str().to_owned();
        next.push(".new");
        fs::write(&next, self.to_text(snapshot)?)?;
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
    fn what_is_wanted_first_is_in_the_first_batch() {
        let mut set = WorkingSet::default();
        for page in (0..512).map(|n| 5000 - 2 * n).chain([1, 0]) {
            set.add(page * PAGE..(page + 1) * PAGE);
        }
        let batches = set.batches();
        assert_eq!((batches.len(), batches[0].start, batches[511].start), (513, 3978 * PAGE, 5000 * PAGE));
        assert_eq!(batches[512], 0..2 * PAGE);
    }

    #[test]
    fn what_was_written_is_read_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let (path, id) = (folder.path().join("set"), [7; 16]);
        assert_eq!(WorkingSet::read(&path, id, 100 * PAGE).unwrap(), None);
        let mut set = WorkingSet::default();
        for page in [9, 3, 4, 99, 4, 5] {
            set.add(page * PAGE..(page + 1) * PAGE);
        }
        set.add(3 * PAGE..7 * PAGE);
        assert_eq!(set.batches(), [3..7, 9..10, 99..100].map(|at| at.start * PAGE..at.end * PAGE));
        set.write(&path, id).unwrap();
        let order: Vec<Range<u64>> =
            [9..10, 3..5, 99..100, 5..7].map(|at| at.start * PAGE..at.end * PAGE).into();
        assert_eq!((set.pages(), set.order.as_slice()), (6, &order[..]));
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
