//! The state file's frame: what is not a state file, is cut off or was changed is refused before anything of it is believed.

use crate::error::{Error, Result};

/// First bytes of a state file.
const MAGIC: [u8; 8] = *b"ROOSTSNP";
/// The version that is written, and the only one that is read.
pub const VERSION: u32 = 2;
/// Magic, version, kind of machine, length, checksum.
const HEADER: usize = 8 + 4 + 4 + 8 + 4;
/// `EM_X86_64` of ELF.
const MACHINE: u32 = 62;
/// Longest state that is read. A machine of two vCPUs has 37 KB of it.
pub const MAX_STATE: u64 = 16 << 20;

/// Puts a state into its frame.
#[must_use]
pub fn frame(state: &[u8]) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(MACHINE.to_le_bytes());
    bytes.extend((state.len() as u64).to_le_bytes());
    bytes.extend(checksum(&bytes, state).to_le_bytes());
    bytes.extend(state);
    bytes
}

/// Takes a state out of its frame.
///
/// # Errors
/// [`Error::Snapshot`]: what the file is instead.
pub fn unframe(bytes: &[u8]) -> Result<&[u8]> {
    let refuse = |why: String| Err(Error::Snapshot(why));
    let Some((header, state)) = bytes.split_first_chunk::<HEADER>() else {
        return refuse(format!("the state file has {} bytes, a header has {HEADER}", bytes.len()));
    };
    let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    if header[..8] != MAGIC {
        return refuse("this is no state file: it does not begin with ROOSTSNP".into());
    }
    let (version, machine) = (word(8), word(12));
    if version != VERSION {
        return refuse(format!("the state file has version {version}; this monitor reads version {VERSION}"));
    }
    if machine != MACHINE {
        return refuse(format!(
            "the state file is of a machine of kind {machine}, not of x86_64 ({MACHINE})"
        ));
    }
    let length = u64::from(word(16)) | u64::from(word(20)) << 32;
    if length != state.len() as u64 {
        return refuse(format!("the state file holds {} of {length} bytes of state", state.len()));
    }
    if word(24) != checksum(&header[..24], state) {
        return refuse("the state file was changed or damaged: its checksum (CRC-32) is another".into());
    }
    Ok(state)
}

fn checksum(header: &[u8], state: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(header);
    hasher.update(state);
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_framed_comes_out_again() {
        for state in [&b""[..], b"{}", &[7; 5000]] {
            assert_eq!(unframe(&frame(state)).unwrap(), state);
        }
    }

    #[test]
    fn other_versions_are_named() {
        let mut bytes = frame(b"{}");
        bytes[8] = 9;
        let error = unframe(&bytes).unwrap_err().to_string();
        assert!(error.contains("version 9") && error.contains("reads version 2"), "{error}");
        bytes[0] = 0;
        assert!(unframe(&bytes).unwrap_err().to_string().contains("no state file"));
    }

    proptest! {
        #[test]
        fn a_changed_bit_or_a_cut_is_noticed(state: Vec<u8>, at: prop::sample::Index, bit in 0..8_u8, cut: prop::sample::Index) {
            let good = frame(&state);
            let mut bytes = good.clone();
            bytes[at.index(good.len())] ^= 1 << bit;
            prop_assert!(unframe(&bytes).is_err());
            prop_assert!(unframe(&good[..cut.index(good.len())]).is_err());
        }
    }
}
