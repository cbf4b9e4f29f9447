//! Kernel images: ELF and bzImage, entered either way, with an initrd or without.
#![no_main]

use libfuzzer_sys::fuzz_target;
use roost_vmm::acpi::Processors;
use roost_vmm::boot::code::Code;
use roost_vmm::boot::{Description, Payload, load};
use roost_vmm::config::{BootProtocol, SmbiosConfig};
use roost_vmm::cpu::cpuid::Identity;
use roost_vmm::cpu::registers::Entry;
use roost_vmm::memory::{self, FilePages};
use roost_vmm_fuzz::host::file;

/// Where images may be loaded: enough for the seeds'.
const MEMORY_MIB: u64 = 4;

fuzz_target!(|bytes: &[u8]| {
    let Some(([how, initrd], image)) = bytes.split_first_chunk::<2>() else { return };
    let memory = memory::create(MEMORY_MIB).unwrap();
    let mut payload = Payload {
        kernel: file(image),
        initrd: (how & 4 != 0).then(|| file(&vec![5; 512 * usize::from(*initrd)])),
        cmdline: "quiet".into(),
        protocol: [BootProtocol::Auto, BootProtocol::Linux64, BootProtocol::Pvh, BootProtocol::Auto]
            [usize::from(how & 3)],
        pages: FilePages::default(),
    };
    let description = Description {
        processors: Processors { count: 1, max: None },
        identity: Identity::default(),
        windows: Vec::new(),
        acpi: how & 8 != 0,
        smbios: SmbiosConfig::default(),
        generation_id: [1; 16],
    };
    if let Some(code) = Code::of(&payload.kernel) {
        assert!(code.pieces.windows(2).all(|pair| pair[0].end < pair[1].start));
        assert!(code.pieces.iter().all(|piece| piece.start < piece.end && piece.end <= 3 << 30));
    }
    // Twice: as after a reset.
    for _ in 0..2 {
        match load(&memory, &mut payload, &description) {
            Ok(Entry::Long { rip, .. }) => {
                assert!(rip < MEMORY_MIB << 20, "entry {rip:#x} outside of memory")
            }
            Ok(Entry::Protected { .. }) => {}
            Err(_) => return,
        }
        memory::clear(&memory, &payload.pages).unwrap();
    }
});
