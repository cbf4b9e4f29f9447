//! Configuration files. One that is taken can be written and read again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use roost_vmm::config::VmConfig;

fuzz_target!(|text: &str| {
    if let Ok(config) = VmConfig::from_json(text) {
        let written = serde_json::to_string(&config).unwrap();
        assert_eq!(VmConfig::from_json(&written).unwrap(), config);
    }
});
