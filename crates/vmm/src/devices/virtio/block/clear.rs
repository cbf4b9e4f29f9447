//! Discards and zeroes as a ring does them: one call of the host's after the other, none of which the device thread waits for.
//!
//! ```text
//!   discard          punch a hole ──cannot──▶ done: the host may keep what the guest does not need
//!   zeroes, unmap    punch a hole ──cannot──▶ zero the range ──cannot──▶ write zeroes
//!   zeroes                                    zero the range ──cannot──▶ write zeroes
//! ```
//! Holes and zeroed ranges work on files and on block devices (fallocate(2), blkdev_fallocate in the kernel's block/fops.c).

use std::io;

use super::ranges::{Kind, Range};

/// Make a hole, which reads as zeroes.
pub const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
/// Make the range read as zeroes, and keep its space.
pub const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
/// Bytes of zeroes that are written at a time.
const CHUNK: usize = 64 << 10;

/// What the host is asked for next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call<'a> {
    /// `fallocate`.
    Allocate {
        /// [`PUNCH`] or [`ZERO`].
        mode: i32,
        /// Bytes from the disk's begin.
        offset: u64,
        /// Bytes.
        length: u64,
    },
    /// Write these zeroes, which stay where they are as long as the work does.
    Write {
        /// Bytes from the disk's begin.
        offset: u64,
        /// Zeroes.
        zeroes: &'a [u8],
    },
    /// Put it on stable storage.
    Flush,
}

/// How a range is cleared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Punch,
    Zero,
    Write,
}

/// The work of one request.
#[derive(Debug)]
pub struct Clear {
    kind: Kind,
    /// What is left, the next one last.
    ranges: Vec<Range>,
    way: Way,
    zeroes: Box<[u8]>,
    stable: bool,
}

impl Clear {
    /// Work on ranges inside the disk.
    #[must_use]
    pub fn new(kind: Kind, mut ranges: Vec<Range>, stable: bool) -> Self {
        ranges.retain(|range| range.length > 0);
        ranges.reverse();
        let way = match kind {
            Kind::Zero if ranges.last().is_some_and(|range| !range.unmap) => Way::Zero,
            Kind::Discard | Kind::Zero => Way::Punch,
        };
        Self { kind, ranges, way, zeroes: Box::default(), stable }
    }

    /// What is to be done now; nothing: it is finished.
    #[must_use]
    pub fn call(&self) -> Option<Call<'_>> {
        let Some(Range { offset, length, .. }) = self.ranges.last().copied() else {
            return self.stable.then_some(Call::Flush);
        };
        Some(match self.way {
            Way::Punch => Call::Allocate { mode: PUNCH, offset, length },
            Way::Zero => Call::Allocate { mode: ZERO, offset, length },
            Way::Write => {
                let count = usize::try_from(length).unwrap_or(CHUNK).min(self.zeroes.len());
                Call::Write { offset, zeroes: &self.zeroes[..count] }
            }
        })
    }

    /// Takes the result of what was to be done: a count of bytes, or an error's number below zero.
    ///
    /// # Errors
    /// The host's, if there is no other way.
    pub fn done(&mut self, result: i32) -> io::Result<()> {
        let Some(range) = self.ranges.last_mut() else {
            self.stable = false;
            return if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(()) };
        };
        if result >= 0 {
            let done = if self.way == Way::Write { u64::from(result.cast_unsigned()) } else { range.length };
            if done == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            range.offset += done;
            range.length = range.length.saturating_sub(done);
            if range.length == 0 {
                self.ranges.pop();
            }
            return Ok(());
        }
        match self.way {
            Way::Punch | Way::Zero if !cannot(-result) => Err(io::Error::from_raw_os_error(-result)),
            Way::Punch if self.kind == Kind::Discard => {
                self.ranges.clear();
                Ok(())
            }
            Way::Punch => {
                self.way = Way::Zero;
                Ok(())
            }
            Way::Zero => {
                self.way = Way::Write;
                self.zeroes = vec![0; CHUNK].into_boxed_slice();
                Ok(())
            }
            Way::Write => Err(io::Error::from_raw_os_error(-result)),
        }
    }
}

/// Whether an error says that a file system or device has no such operation, or not for this range: a block device's begin and end at
/// its own blocks (`EINVAL`).
const fn cannot(error: i32) -> bool {
    matches!(
        error,
        libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV | libc::ENXIO | libc::ENOTTY | libc::EINVAL
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Plays a host that answers each call; returns the calls by what they were and their bytes.
    fn play(
        mut clear: Clear,
        mut host: impl FnMut(Call<'_>) -> i32,
    ) -> (Vec<(&'static str, u64)>, io::Result<()>) {
        let mut calls = Vec::new();
        while let Some(call) = clear.call() {
            calls.push(match call {
                Call::Allocate { mode: PUNCH, length, .. } => ("punch", length),
                Call::Allocate { length, .. } => ("zero", length),
                Call::Write { zeroes, .. } => ("write", zeroes.len() as u64),
                Call::Flush => ("flush", 0),
            });
            let result = host(call);
            if let Err(error) = clear.done(result) {
                return (calls, Err(error));
            }
        }
        (calls, Ok(()))
    }

    fn range(length: u64, unmap: bool) -> Range {
        Range { offset: 512, length, unmap }
    }

    #[test]
    fn a_host_that_can_is_asked_once_for_each_range() {
        for (kind, unmap, what) in
            [(Kind::Discard, false, "punch"), (Kind::Zero, true, "punch"), (Kind::Zero, false, "zero")]
        {
            let ranges = vec![range(1024, unmap), range(0, unmap), range(2048, unmap)];
            let (calls, result) = play(Clear::new(kind, ranges, true), |_| 0);
            assert_eq!(calls, [(what, 1024), (what, 2048), ("flush", 0)]);
            result.unwrap();
        }
        assert!(Clear::new(Kind::Zero, vec![range(0, false)], false).call().is_none());
    }

    #[test]
    fn a_host_that_cannot_is_asked_for_less_down_to_zeroes_written() {
        let cannot = |call: Call<'_>| match call {
            // Short, as writes may be.
            Call::Write { zeroes, .. } => i32::try_from(zeroes.len().min(40_000)).unwrap(),
            Call::Allocate { .. } => -libc::EOPNOTSUPP,
            Call::Flush => 0,
        };
        let (calls, result) = play(Clear::new(Kind::Zero, vec![range(100_000, true)], true), cannot);
        let writes = [("write", 65_536), ("write", 60_000), ("write", 20_000), ("flush", 0)];
        assert_eq!(calls, [&[("punch", 100_000), ("zero", 100_000)][..], &writes].concat());
        result.unwrap();
        let (calls, result) = play(Clear::new(Kind::Discard, vec![range(512, false); 3], false), cannot);
        assert_eq!(calls, [("punch", 512)]);
        result.unwrap();
    }

    #[test]
    fn other_errors_are_the_requests() {
        for kind in [Kind::Discard, Kind::Zero] {
            let (calls, result) = play(Clear::new(kind, vec![range(512, false)], true), |_| -libc::EIO);
            assert_eq!((calls.len(), result.unwrap_err().raw_os_error()), (1, Some(libc::EIO)));
        }
        let full = |call: Call<'_>| if matches!(call, Call::Write { .. }) { 0 } else { -libc::ENODEV };
        let (_, result) = play(Clear::new(Kind::Zero, vec![range(512, false)], false), full);
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::WriteZero);
        let unstable = |call: Call<'_>| if call == Call::Flush { -libc::EIO } else { 0 };
        assert!(play(Clear::new(Kind::Zero, vec![range(512, false)], true), unstable).1.is_err());
    }
}
