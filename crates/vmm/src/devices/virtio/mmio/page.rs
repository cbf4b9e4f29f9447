//! What a guest reads of its devices' windows, as memory that it reads without leaving: a page for each window, mapped read-only into the
//! guest (`KVM_MEM_READONLY`), so that only what it writes comes to the transport. A guest looks at the interrupt status at each interrupt,
//! which this makes as cheap as any other read.
//!
//! Where KVM cannot do that, the transport reads the same page for the guest.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use vm_memory::{MmapRegion, VolatileMemory};

use super::CONFIG;
use crate::error::{Error, Result};
use crate::layout;

/// The pages of all windows, one behind the other.
#[derive(Clone, Debug)]
pub struct Pages(Option<Arc<MmapRegion>>);

impl Pages {
    /// Pages for so many windows, all zero.
    ///
    /// # Errors
    /// The host has no memory.
    pub fn new(windows: usize) -> Result<Self> {
        let bytes = windows * BYTES;
        let region = (bytes > 0).then(|| MmapRegion::new(bytes)).transpose();
        let region = region.map_err(|error| Error::Memory(format!("mapping the devices' pages: {error}")))?;
        Ok(Self(region.map(Arc::new)))
    }

    /// Where they are and how many bytes; nothing if there is no window.
    #[must_use]
    pub fn region(&self) -> Option<&MmapRegion> {
        self.0.as_deref()
    }

    /// A window's page.
    #[must_use]
    pub fn page(&self, window: usize) -> Page {
        Page { pages: self.clone(), start: window * BYTES }
    }
}

const BYTES: usize = 0x1000;
const _: () = assert!(BYTES as u64 == layout::VIRTIO_MMIO_SIZE, "a window is a page");

/// One window's page. Its words are written by the thread that changes what they say, and are never behind it.
#[derive(Clone, Debug)]
pub struct Page {
    pages: Pages,
    start: usize,
}

impl Page {
    /// The word of a register, of which the offset is a multiple of four inside of the page.
    fn word(&self, offset: u64) -> Option<&AtomicU32> {
        let at = usize::try_from(offset).ok().filter(|at| at + 4 <= BYTES)?;
        self.pages.region()?.get_atomic_ref(self.start + at).ok()
    }

    /// Shows a register.
    pub fn set(&self, offset: u64, value: u32) {
        if let Some(word) = self.word(offset) {
            word.store(value.to_le(), Ordering::SeqCst);
        }
    }

    /// What a register shows; 0 outside of the page.
    pub fn get(&self, offset: u64) -> u32 {
        self.word(offset).map_or(0, |word| u32::from_le(word.load(Ordering::SeqCst)))
    }

    /// Sets some bits and clears others, at once.
    pub fn change(&self, offset: u64, set: u32, clear: u32) {
        if let Some(word) = self.word(offset) {
            let _ = word.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |before| {
                Some(((u32::from_le(before) & !clear) | set).to_le())
            });
        }
    }

    /// The configuration space.
    pub fn set_config(&self, config: &[u8]) {
        for (offset, bytes) in (CONFIG..).step_by(4).zip(config.chunks(4)) {
            let mut word = [0; 4];
            word[..bytes.len()].copy_from_slice(bytes);
            self.set(offset, u32::from_le_bytes(word));
        }
    }

    /// Reads as the guest does, at any offset and of any length; nothing lies behind the page.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = self.get(at & !3).to_le_bytes()[(at & 3) as usize];
        }
    }
}
