//! A kernel is loaded while KVM makes the machine ([`crate::threads::meanwhile`]). Some hosts need many milliseconds for that, which
//! they spend waiting; for so long the kernel's code moves into huge pages, one after the other.

use std::time::Duration;

use super::code::Code;
use super::{Files, Payload, load_files};
use crate::error::Result;
use crate::memory::{self, Memory};

/// What takes KVM longer, once the kernel is loaded, is waiting: where it does not wait, it is done in a fraction of this.
const WORKS: Duration = Duration::from_millis(2);
/// Between two pieces, so that who makes the machine goes on where there is one CPU for both.
const BREATH: Duration = Duration::from_micros(100);

/// What is in guest memory when its files are loaded.
pub struct Image {
    /// Where it is from.
    pub payload: Payload,
    /// Where it is.
    pub files: Files,
    /// What is to move once the guest runs.
    pub code: Option<Code>,
}

impl Image {
    /// Loads it. Code moves only if it may.
    ///
    /// # Errors
    /// Those of [`load_files`].
    pub fn load(memory: &Memory, mut payload: Payload, moves: bool) -> Result<Self> {
        let files = load_files(memory, &mut payload)?;
        let code = if moves { Code::of(&payload.kernel) } else { None };
        Ok(Self { payload, files, code })
    }

    /// Moves code into huge pages, piece by piece, for as long as KVM `waits`, which is asked before each with the time to give it.
    ///
    /// # Errors
    /// [`Error::Memory`](crate::error::Error::Memory).
    pub fn move_while(&mut self, memory: &Memory, mut waits: impl FnMut(Duration) -> bool) -> Result<()> {
        let Some(code) = &mut self.code else { return Ok(()) };
        let mut time = WORKS;
        while waits(time) {
            let Some(piece) = code.take_piece() else { break };
            memory::huge::move_to(memory, &self.payload.pages, &piece)?;
            time = BREATH;
        }
        self.code.take_if(|code| code.pieces.is_empty());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::boot::tests_support::kernel;
    use crate::config::BootProtocol;
    use crate::memory::FilePages;

    const START: u64 = 1 << 20;

    fn payload(image: &[u8]) -> Payload {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(image).unwrap();
        let (cmdline, protocol, pages) = (String::new(), BootProtocol::Auto, FilePages::default());
        Payload { kernel: file, initrd: None, cmdline, protocol, pages }
    }

    #[test]
    fn code_moves_for_as_long_as_kvm_takes() {
        let code: Vec<u8> = (0..7_u32 << 20).map(|n| (n % 251) as u8).collect();
        let (image, memory) = (kernel(START, &code), memory::create(16).unwrap());
        let mut loaded = Image::load(&memory, payload(&image), true).unwrap();
        let mut times = Vec::new();
        let mut waits = |time| {
            times.push(time);
            times.len() < 3
        };
        loaded.move_while(&memory, &mut waits).unwrap();
        assert_eq!(times, [WORKS, BREATH, BREATH]);
        let left = loaded.code.as_ref().unwrap().pieces.clone();
        assert_eq!(left, vec![(6 << 20)..(8 << 20); 1]);
        let all = || {
            let mut found = vec![0; code.len()];
            memory.read_slice(&mut found, GuestAddress(START)).unwrap();
            found
        };
        assert!(all() == code);
        loaded.move_while(&memory, |_| true).unwrap();
        assert!(loaded.code.is_none() && all() == code);
    }

    #[test]
    fn nothing_moves_that_may_not() {
        let (image, memory) = (kernel(START, &[0xf4, 0x90].repeat(4 << 20)), memory::create(16).unwrap());
        let loaded = Image::load(&memory, payload(&image), true).unwrap();
        assert_eq!(loaded.code.unwrap().take_piece(), Some(2 << 20..4 << 20));
        let loaded = Image::load(&memory, payload(&image), false).unwrap();
        assert!(loaded.code.is_none());
    }
}
