//! Status files, as the agent reads them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use roost_vmm::status::parse;

fuzz_target!(|text: &str| {
    if let Ok(events) = parse(text) {
        let lines = events.iter().map(|event| serde_json::to_string(event).unwrap() + "\n");
        assert_eq!(parse(&lines.collect::<String>()).unwrap(), events);
    }
});
