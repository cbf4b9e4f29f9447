//! Console rings: a file that anybody wrote, read by the agent and continued by a monitor.
#![no_main]

use std::os::unix::fs::FileExt;

use libfuzzer_sys::fuzz_target;
use roost_vmm::console::{CAPACITY, ConsoleReader, ConsoleWriter};
use roost_vmm_fuzz::host::file;

fuzz_target!(|input: (u64, bool, Vec<u8>, Vec<u8>)| {
    let (offset, whole, header, output) = input;
    let file = file(&header);
    if whole {
        file.set_len(roost_vmm::console::FILE_SIZE).unwrap();
    }
    let read = |offset| {
        let reader = ConsoleReader::new(file.try_clone().unwrap()).ok()?;
        let chunk = reader.read_from(offset).ok()?;
        assert!(chunk.bytes.len() <= 1 << 30, "more than any ring holds");
        Some((chunk, reader))
    };
    read(offset);
    if let Ok(mut writer) = ConsoleWriter::new(&file) {
        writer.write(&output);
        let (chunk, reader) = read(writer.written() - output.len() as u64).unwrap();
        assert!(chunk.bytes == output[output.len().saturating_sub(CAPACITY as usize)..]);
        assert_eq!(reader.written().unwrap(), writer.written());
        let mut magic = [0; 8];
        file.read_exact_at(&mut magic, 0).unwrap();
        assert_eq!(magic, roost_vmm::console::MAGIC);
    }
});
