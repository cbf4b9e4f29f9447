//! A snapshot's state file, in its frame and without it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use roost_vmm::snapshot::{self, frame};
use roost_vmm_fuzz::host::file;

fuzz_target!(|input: (bool, &[u8])| {
    let (framed, bytes) = input;
    let bytes = if framed { frame(bytes) } else { bytes.to_vec() };
    let _ = snapshot::read(&mut file(&bytes));
});
