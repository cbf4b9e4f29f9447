//! Lists of pages, statistics and free ranges, with pages that really go back to the host.
#![no_main]

use libfuzzer_sys::fuzz_target;
use roost_vmm::devices::virtio::balloon::metrics::Metrics;
use roost_vmm::devices::virtio::balloon::queue::{ask, deflate, inflate, report, take_statistics};
use roost_vmm::devices::virtio::balloon::statistics::Statistics;
use roost_vmm::memory::{FilePages, Range, give_back};
use roost_vmm_fuzz::guest::{self, Batch, Ring, Setup};

fuzz_target!(|input: ([Setup; 4], Vec<(u8, Batch)>)| {
    let (setups, steps) = input;
    let memory = guest::memory();
    // Pages that hold rings go, too, so nothing can be said of what is in them afterwards: no `Ring::turn` here.
    let mut rings = [0, 1, 2, 3].map(|number| Ring::new(&memory, setups[number], number as u64));
    let (pages, mut metrics) = (FilePages::default(), Metrics::default());
    let (mut scratch, mut held, mut latest) = (Vec::new(), None, Statistics::default());
    let give = |range: Range| {
        let given = give_back(&memory, &pages, range);
        assert!(given.is_ok(), "{range:?} is not of whole pages inside memory");
        given
    };
    for (which, batch) in steps.iter().take(12) {
        let ring = &mut rings[usize::from(which % 4)];
        ring.write(&memory, batch);
        let queue = &mut ring.queue;
        let result = match which % 4 {
            0 => inflate(queue, &memory, &mut scratch, give, &mut metrics),
            1 => deflate(queue, &memory, &mut scratch, &mut metrics),
            2 => report(queue, &memory, give, &mut metrics),
            _ => take_statistics(queue, &memory, &mut held, &mut latest, &mut metrics),
        };
        if result.is_err() || which & 4 != 0 && ask(&mut rings[3].queue, &memory, &mut held).is_err() {
            return;
        }
    }
    assert_eq!(metrics.failed, 0);
    let _ = latest.named();
});
