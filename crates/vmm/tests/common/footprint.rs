//! What a process costs the host in memory, from `/proc/PID/smaps`, with the guest's own memory left out.

use std::io;
use std::path::Path;

/// Memory of a process beyond its guest's, KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Footprint {
    /// Pages that only this process has, and that it has changed.
    pub private_dirty_kib: u64,
    /// All pages, shared ones by their share.
    pub pss_kib: u64,
    /// Of the guest's memory: pages that are there.
    pub guest_rss_kib: u64,
}

#[derive(Debug, Default)]
struct Mapping {
    start: u64,
    end: u64,
    private_dirty: u64,
    pss: u64,
    rss: u64,
}

/// Puts a file on disk. What a build or a test has just written is dirty in the page cache, and would count as dirtied by
/// the first process that maps it.
pub fn settle(path: &Path) {
    std::fs::File::open(path).unwrap().sync_all().unwrap();
}

/// Reads a process whose guest has `guest_mib` of memory in one piece.
///
/// # Errors
/// The file cannot be read, or no mappings that follow each other add up to the guest's memory.
pub fn of(pid: u32, guest_mib: u64) -> io::Result<Footprint> {
    let mappings = parse(&std::fs::read_to_string(format!("/proc/{pid}/smaps"))?);
    let (from, to) = guest(&mappings, guest_mib << 20)
        .ok_or_else(|| io::Error::other(format!("no {guest_mib} MiB of guest memory are mapped")))?;
    let mut footprint = Footprint::default();
    for (index, mapping) in mappings.iter().enumerate() {
        if (from..=to).contains(&index) {
            footprint.guest_rss_kib += mapping.rss;
        } else {
            footprint.private_dirty_kib += mapping.private_dirty;
            footprint.pss_kib += mapping.pss;
        }
    }
    Ok(footprint)
}

fn parse(text: &str) -> Vec<Mapping> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let (Some(first), second) = (words.next(), words.next()) else { continue };
        if let Some((start, end)) = first.split_once('-') {
            if let (Ok(start), Ok(end)) = (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16)) {
                mappings.push(Mapping { start, end, ..Mapping::default() });
            }
            continue;
        }
        let (Some(mapping), Some(Ok(value))) = (mappings.last_mut(), second.map(str::parse)) else {
            continue;
        };
        match first {
            "Private_Dirty:" => mapping.private_dirty = value,
            "Pss:" => mapping.pss = value,
            "Rss:" => mapping.rss = value,
            _ => {}
        }
    }
    mappings
}

/// The mappings that follow each other without a gap and are as large as the guest's memory together: its kernel may be
/// mapped into the middle of it.
fn guest(mappings: &[Mapping], size: u64) -> Option<(usize, usize)> {
    (0..mappings.len()).find_map(|from| {
        let mut end = mappings[from].start;
        for (to, mapping) in mappings.iter().enumerate().skip(from) {
            if mapping.start != end || mapping.end - mappings[from].start > size {
                return None;
            }
            end = mapping.end;
            if end - mappings[from].start == size {
                return Some((from, to));
            }
        }
        None
    })
}
