//! The control queue (virtio 1.2, 5.1.6.5): memory and a queue in, what the driver wants out.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};
use virtio_queue::Queue;

use crate::devices::virtio::queue::{Broken, Buffers, Turn, copy_in, copy_out, drain};
use crate::memory::Memory;

/// Bytes of the only command: class, command, pairs of queues.
const COMMAND: usize = 4;

/// Does every command that is in the queue. `use_pairs` makes so many pairs of queues work, of the `most` that there are, and says
/// whether it could.
///
/// # Errors
/// [`Broken`]: the guest broke the queue.
pub fn process(
    queue: &mut Queue,
    memory: &Memory,
    most: usize,
    mut use_pairs: impl FnMut(usize) -> bool,
) -> Result<Turn, Broken> {
    drain(queue, memory, |chain| {
        let Ok(buffers) = Buffers::new(memory, chain, 4096) else { return 0 };
        let mut command = [0; COMMAND];
        let whole = copy_out(&buffers.readable, &mut command) == COMMAND;
        let [class, kind, low, high] = command;
        let known =
            (u32::from(class), u32::from(kind)) == (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET);
        let pairs = usize::from(u16::from_le_bytes([low, high]));
        let done = whole && known && (1..=most).contains(&pairs) && use_pairs(pairs);
        let answer = if done { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
        // One byte, or none if the guest has no room for it.
        let written = copy_in(&buffers.writable, &[u8::try_from(answer).unwrap_or(1)]);
        u32::try_from(written).unwrap_or(0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::testing::{Driver, hostile};
    use proptest::prelude::*;

    /// Gives one command; returns the answer, and the pairs that were set.
    fn ask(command: &[u8], able: bool) -> (u8, Vec<usize>) {
        let mut driver = Driver::new(16);
        let chain = [driver.give(command), driver.want(1)];
        driver.add(&chain);
        let mut set = Vec::new();
        let mut use_pairs = |pairs| {
            set.push(pairs);
            able
        };
        process(&mut driver.queue(), &driver.memory, 4, &mut use_pairs).unwrap();
        assert_eq!(driver.used(), [(0, 1)]);
        (driver.read(chain[1])[0], set)
    }

    #[test]
    fn as_many_pairs_as_there_are_and_nothing_else() {
        for pairs in 1..=4 {
            assert_eq!(ask(&[4, 0, pairs, 0], true), (0, vec![usize::from(pairs)]));
        }
        for bad in
            [&[4, 0, 0, 0][..], &[4, 0, 5, 0], &[4, 0, 1, 1], &[4, 1, 1, 0], &[3, 0, 1, 0], &[4, 0, 1], &[4]]
        {
            assert_eq!(ask(bad, true), (1, Vec::new()), "{bad:?}");
        }
        assert_eq!(ask(&[4, 0, 2, 0], false), (1, vec![2]));
    }

    proptest! {
        /// Whatever a guest writes into its queue: no panic, no endless loop, and no pairs that are not there.
        #[test]
        fn a_hostile_queue_is_survived(queue in hostile()) {
            let driver = Driver::new(16);
            queue.write(&driver);
            let mut good = true;
            let _ = process(&mut driver.queue(), &driver.memory, 4, |pairs| {
                good &= (1..=4).contains(&pairs);
                true
            });
            prop_assert!(good);
        }
    }
}
