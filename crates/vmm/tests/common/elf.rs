//! ELF kernels put together byte by byte.

/// What is loaded to one place.
#[derive(Clone, Debug)]
pub struct Segment {
    /// Physical address.
    pub address: u64,
    /// What is there.
    pub bytes: Vec<u8>,
    /// Zeroes behind it.
    pub extra: u64,
    /// Where the bytes begin in the file, modulo the page size: a kernel's segments are whole pages.
    pub file_offset: u64,
}

impl Segment {
    /// Bytes at an address, at a page's begin in the file.
    pub fn at(address: u64, bytes: Vec<u8>) -> Self {
        Self { address, bytes, extra: 0, file_offset: 0 }
    }
}

/// A kernel.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// First instruction.
    pub entry: u64,
    pub segments: Vec<Segment>,
    /// Physical address of the entry that a PVH note names.
    pub pvh_entry: Option<u32>,
}

const PAGE: usize = 4096;
const LOAD: u32 = 1;
const NOTE: u32 = 4;

impl Kernel {
    /// The file.
    pub fn image(&self) -> Vec<u8> {
        let note = self.pvh_entry.map(pvh_note);
        let count = self.segments.len() + usize::from(note.is_some());
        let mut image = header(self.entry, count as u16);
        let mut at = 64 + 56 * count;
        if let Some(note) = &note {
            program_header(&mut image, NOTE, at as u64, 0, note.len() as u64, note.len() as u64);
            at += note.len();
        }
        for segment in &self.segments {
            at = at.next_multiple_of(PAGE) + segment.file_offset as usize;
            let size = segment.bytes.len() as u64;
            program_header(&mut image, LOAD, at as u64, segment.address, size, size + segment.extra);
            at += segment.bytes.len();
        }
        image.extend(note.unwrap_or_default());
        for segment in &self.segments {
            image.resize(image.len().next_multiple_of(PAGE) + segment.file_offset as usize, 0);
            image.extend(&segment.bytes);
        }
        image
    }
}

fn header(entry: u64, program_headers: u16) -> Vec<u8> {
    let mut image = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    image.extend(2_u16.to_le_bytes()); // executable
    image.extend(62_u16.to_le_bytes()); // x86_64
    image.extend(1_u32.to_le_bytes());
    for word in [entry, 64, 0] {
        image.extend(word.to_le_bytes());
    }
    image.extend(0_u32.to_le_bytes());
    for half in [64_u16, 56, program_headers, 0, 0, 0] {
        image.extend(half.to_le_bytes());
    }
    image
}

fn program_header(image: &mut Vec<u8>, kind: u32, offset: u64, address: u64, in_file: u64, in_memory: u64) {
    image.extend(kind.to_le_bytes());
    image.extend(7_u32.to_le_bytes());
    for word in [offset, address, address, in_file, in_memory, 1] {
        image.extend(word.to_le_bytes());
    }
}

/// Xen's note 18: the 32-bit physical entry.
fn pvh_note(entry: u32) -> Vec<u8> {
    let mut note = Vec::new();
    for word in [4, 4, 18_u32] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend(entry.to_le_bytes());
    note
}

/// Adds a section table to a kernel without one: its first segment, all of it, is code.
pub fn with_code_section(mut image: Vec<u8>) -> Vec<u8> {
    let segment = image[64..64 + 56].to_vec();
    let table = image.len() as u64;
    image[40..48].copy_from_slice(&table.to_le_bytes());
    image[58..60].copy_from_slice(&64_u16.to_le_bytes());
    image[60..62].copy_from_slice(&1_u16.to_le_bytes());
    image.extend(0_u32.to_le_bytes());
    image.extend(1_u32.to_le_bytes()); // bytes of the program's own
    image.extend(6_u64.to_le_bytes()); // in memory, executable
    image.extend(&segment[24..32]); // address
    image.extend(&segment[8..16]); // offset
    image.extend(&segment[32..40]); // size
    image.extend([0; 24]);
    image
}
