//! Bytes of an API connection, before the machine is built: the HTTP parser, and every route.
#![no_main]

use libfuzzer_sys::fuzz_target;
use roost_vmm::api::Server;
use roost_vmm::api::http::{Parsed, parse};

fuzz_target!(|bytes: &[u8]| {
    let mut server = Server::unstarted("fuzz");
    let mut rest = bytes;
    while !rest.is_empty() {
        match parse(rest) {
            Parsed::Incomplete | Parsed::Bad(_) => return,
            Parsed::Request(request, used) => {
                assert!(used > 0 && used <= rest.len());
                // A start opens the files that the configuration names, and these open theirs at once: not here.
                let opens = ["/actions", "/snapshot/load", "/logger", "/metrics"];
                if !opens.contains(&&*request.path) {
                    assert!(server.ask(&request).to_bytes().starts_with(b"HTTP/1.1 "));
                }
                rest = &rest[used..];
            }
        }
    }
});
