//! Where a kernel's code is. Linux patches itself when it starts, on nearly every page of its code, so that little of it stays shared.
//! Mapped from the file, each page has three faults until it is the guest's own; in a huge page, 512 of them have one. So the code
//! moves into huge pages, but not before the guest runs, as that takes time: at the first exit that brings a vCPU to the monitor, when
//! Linux has not begun. Only while KVM is waited for, it moves ahead ([`super::ahead`]).

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::layout;
use crate::memory::place::HUGE;

/// Bytes of a huge page.
const PIECE: u64 = HUGE as u64;

/// Sizes of an ELF header, a program header, a section header of 64 bits.
const HEADER: usize = 64;
const PROGRAM: u16 = 56;
const SECTION: u16 = 64;
/// More headers than any kernel has; Linux has forty.
const MOST_HEADERS: u16 = 512;
/// A segment that is loaded (`p_type`).
const PT_LOAD: u32 = 1;
/// A section that has no bytes in the file (`sh_type`).
const SHT_NOBITS: u32 = 8;
/// A section that has code (`sh_flags`).
const SHF_EXECINSTR: u64 = 4;

/// Code that is still where the kernel was mapped to.
#[derive(Debug)]
pub struct Code {
    /// Guest physical addresses, in order; whole huge pages.
    pub pieces: Vec<Range<u64>>,
    /// The guest runs, and has come to the monitor.
    pub runs: Arc<AtomicBool>,
}

impl Code {
    /// That of a kernel; `None` where nothing is to be moved.
    #[must_use]
    pub fn of(kernel: &File) -> Option<Self> {
        let pieces = pieces(kernel);
        (!pieces.is_empty()).then(|| Self { pieces, runs: Arc::default() })
    }

    /// The next huge page that is to be moved.
    pub fn take_piece(&mut self) -> Option<Range<u64>> {
        let first = self.pieces.first_mut()?;
        let piece = first.start..first.start + PIECE;
        first.start = piece.end;
        if first.is_empty() {
            self.pieces.remove(0);
        }
        Some(piece)
    }

    /// Whether it is time to move it.
    #[must_use]
    pub fn is_due(&self) -> bool {
        self.runs.load(Ordering::Acquire)
    }
}

/// The huge pages that are an ELF kernel's code, by guest physical address, in order. None where the file does not say: whether it is
/// a kernel, its loader says.
fn pieces(kernel: &File) -> Vec<Range<u64>> {
    let Some(headers) = Headers::read(kernel) else { return Vec::new() };
    let mut pieces: Vec<Range<u64>> = headers
        .code()
        .flat_map(|code| code.pieces().filter(move |piece| code.fills(piece, kernel)))
        .collect();
    pieces.sort_by_key(|piece| piece.start);
    pieces.dedup_by(|next, last| {
        let follows = next.start <= last.end;
        last.end = if follows { last.end.max(next.end) } else { last.end };
        follows
    });
    pieces
}

struct Headers {
    programs: Vec<u8>,
    sections: Vec<u8>,
}

/// A section of code.
#[derive(Clone, Copy)]
struct Section {
    /// Guest physical address.
    start: u64,
    end: u64,
    /// Where it begins in the file.
    offset: u64,
}

impl Headers {
    fn read(file: &File) -> Option<Self> {
        let mut header = [0; HEADER];
        file.read_exact_at(&mut header, 0).ok()?;
        let table = |offset: usize, sizes: usize, expected: u16| {
            let (start, size, count) =
                (u64_at(&header, offset), u16_at(&header, sizes), u16_at(&header, sizes + 2));
            let mut table = vec![0; usize::from(size) * usize::from(count.min(MOST_HEADERS))];
            file.read_exact_at(&mut table, start).ok()?;
            (size == expected).then_some(table)
        };
        // e_phoff, e_phentsize, e_phnum; e_shoff, e_shentsize, e_shnum.
        Some(Self { programs: table(32, 54, PROGRAM)?, sections: table(40, 58, SECTION)? })
    }

    fn code(&self) -> impl Iterator<Item = Section> {
        let sections = self.sections.chunks_exact(SECTION.into());
        let code = sections
            .filter(|section| u64_at(section, 8) & SHF_EXECINSTR != 0 && u32_at(section, 4) != SHT_NOBITS);
        code.filter_map(|section| self.place(u64_at(section, 24), u64_at(section, 32)))
    }

    /// Where so many bytes of the file are loaded to.
    fn place(&self, offset: u64, size: u64) -> Option<Section> {
        let mut segments = self.programs.chunks_exact(PROGRAM.into());
        segments.find_map(|segment| {
            let (at, address, bytes) = (u64_at(segment, 8), u64_at(segment, 24), u64_at(segment, 32));
            let inside = offset.checked_sub(at)?;
            let start = address.checked_add(inside)?;
            let end = start.checked_add(size).filter(|end| *end <= layout::MMIO_HOLE_START)?;
            let whole = u32_at(segment, 0) == PT_LOAD && inside.checked_add(size)? <= bytes;
            whole.then_some(Section { start, end, offset })
        })
    }
}

impl Section {
    fn pieces(self) -> impl Iterator<Item = Range<u64>> {
        (self.start.div_ceil(PIECE)..self.end / PIECE).map(|piece| piece * PIECE..(piece + 1) * PIECE)
    }

    /// Linux keeps some functions in a huge page of their own, which is padding but for them: looks at the quarters' beginnings.
    fn fills(self, piece: &Range<u64>, file: &File) -> bool {
        let quarters = (0..4).map(|quarter| piece.start + quarter * PIECE / 4);
        let code = quarters.filter(|address| {
            let mut bytes = [0; 64];
            let read = file.read_exact_at(&mut bytes, self.offset + (address - self.start));
            read.is_ok() && bytes.iter().any(|byte| *byte != bytes[0])
        });
        code.count() > 2
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::boot::tests_support::kernel;

    /// From and to, in MiB.
    fn found(image: &[u8]) -> Vec<(u64, u64)> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(image).unwrap();
        pieces(&file).iter().map(|range| (range.start >> 20, range.end >> 20)).collect()
    }

    #[test]
    fn whole_huge_pages_of_code_are_found_and_padding_is_not() {
        let mut code: Vec<u8> = (0..7_u32 << 20).map(|n| (n % 251) as u8).collect();
        // From 1 MiB to 8 MiB: 2, 4 and 6 are whole.
        assert_eq!(found(&kernel(1 << 20, &code)), [(2, 8)]);
        // The one from 4 MiB on has code at its beginning alone.
        code[(3 << 20) + 4096..5 << 20].fill(0xcc);
        assert_eq!(found(&kernel(1 << 20, &code)), [(2, 4), (6, 8)]);
        assert_eq!(found(&kernel((1 << 20) + 4096, &code[..3 << 20])), [(2, 4)]);
        assert_eq!(found(&kernel(2 << 20, &code[..(2 << 20) - 1])), []);
    }

    #[test]
    fn headers_that_lie_name_no_code() {
        let code: Vec<u8> = (0..4_u32 << 20).map(|n| (n % 251) as u8).collect();
        let image = kernel(2 << 20, &code);
        assert_eq!(found(&image), [(2, 6)]);
        let section = image.len() - 64;
        let lies: [(usize, &[u8]); 7] = [
            (40, &[0xff; 8]),           // the table is nowhere
            (58, &[63]),                // sections of another size
            (60, &[0xff, 0xff]),        // more of them than there are
            (section + 8, &[2]),        // no code
            (section + 24, &[0xff; 8]), // its place in the file, its size
            (section + 32, &[0xff; 8]),
            (64 + 24, &[0, 0, 0xe0, 0xbf, 0, 0, 0, 0]), // loaded across the end of memory below the hole
        ];
        for (at, bytes) in lies {
            let mut image = image.clone();
            image[at..at + bytes.len()].copy_from_slice(bytes);
            assert_eq!(found(&image), [], "{at}");
        }
        assert_eq!(found(&image[..300]), []);
        assert_eq!(found(b"\x7fELF"), []);
    }
}
