//! What memory that comes and goes is configured with, and what may change while its machine runs.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::layout::MAX_MEMORY_MIB;

/// Least size of a block, MiB.
const MIN_BLOCK_MIB: u64 = 2;
/// Least and largest size of a slot, MiB.
const SLOTS_MIB: std::ops::RangeInclusive<u64> = 128..=16 << 10;
/// Largest size of all of it, MiB (1 TiB).
const MAX_TOTAL_MIB: u64 = 1 << 20;

/// Memory beside the machine's own that its guest can be given and asked for while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryHotplugConfig {
    /// How much there can be at most, MiB; a multiple of `slot_size_mib`.
    pub total_size_mib: u64,
    /// What it comes and goes by, MiB: a power of two from 2 up.
    #[serde(default = "default_block")]
    pub block_size_mib: u64,
    /// A multiple of `block_size_mib`, 128–16384 MiB. Firecracker's unit of protection; nothing depends on it here.
    #[serde(default = "default_slot")]
    pub slot_size_mib: u64,
}

const fn default_block() -> u64 {
    MIN_BLOCK_MIB
}

const fn default_slot() -> u64 {
    *SLOTS_MIB.start()
}

/// `PATCH /hotplug/memory`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryHotplugUpdate {
    /// How much of it the guest should have, MiB; a multiple of `block_size_mib`.
    pub requested_size_mib: u64,
}

/// `GET /hotplug/memory`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct MemoryHotplugStatus {
    /// As configured.
    #[serde(flatten)]
    pub config: MemoryHotplugConfig,
    /// How much of it the guest has, MiB.
    pub plugged_size_mib: u64,
    /// How much of it the guest should have, MiB.
    pub requested_size_mib: u64,
}

fn refuse(field: &str, value: u64, rule: &str) -> Error {
    Error::Config(format!("memory-hotplug: {field} {value} is {rule}"))
}

impl MemoryHotplugConfig {
    /// Checks the numbers against each other and the machine's own memory.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn check(&self, mem_size_mib: u64) -> Result<()> {
        let Self { total_size_mib, block_size_mib, slot_size_mib } = *self;
        if block_size_mib < MIN_BLOCK_MIB || !block_size_mib.is_power_of_two() {
            return Err(refuse("block_size_mib", block_size_mib, "no power of two from 2 up"));
        }
        if !SLOTS_MIB.contains(&slot_size_mib) || !slot_size_mib.is_multiple_of(block_size_mib) {
            let rule = format!(
                "no multiple of block_size_mib {block_size_mib} within {}–{}",
                SLOTS_MIB.start(),
                SLOTS_MIB.end()
            );
            return Err(refuse("slot_size_mib", slot_size_mib, &rule));
        }
        if !(1..=MAX_TOTAL_MIB).contains(&total_size_mib) || !total_size_mib.is_multiple_of(slot_size_mib) {
            let rule = format!("no multiple of slot_size_mib {slot_size_mib} up to {MAX_TOTAL_MIB}");
            return Err(refuse("total_size_mib", total_size_mib, &rule));
        }
        if total_size_mib > MAX_MEMORY_MIB.saturating_sub(mem_size_mib) {
            let rule =
                format!("too much: with mem_size_mib {mem_size_mib} there can be {MAX_MEMORY_MIB} at most");
            return Err(refuse("total_size_mib", total_size_mib, &rule));
        }
        Ok(())
    }

    /// Checks how much the guest should have.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn check_requested(&self, requested_size_mib: u64) -> Result<()> {
        if requested_size_mib > self.total_size_mib || !requested_size_mib.is_multiple_of(self.block_size_mib)
        {
            let rule = format!(
                "no multiple of block_size_mib {} within 0–{}, the machine's total_size_mib",
                self.block_size_mib, self.total_size_mib
            );
            return Err(refuse("requested_size_mib", requested_size_mib, &rule));
        }
        Ok(())
    }

    /// Checks how much memory the guest should have together with the machine's own, and says how much of it comes from here.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn beyond(&self, mem_size_mib: u64, wanted_mib: u64) -> Result<u64> {
        let beyond = wanted_mib
            .checked_sub(mem_size_mib)
            .filter(|beyond| *beyond <= self.total_size_mib && beyond.is_multiple_of(self.block_size_mib));
        beyond.ok_or_else(|| {
            Error::Config(format!(
                "machine-config: mem_size_mib {wanted_mib} is not the {mem_size_mib} that the machine was started with and a multiple of {} up to {} beyond (memory-hotplug: block_size_mib, total_size_mib)",
                self.block_size_mib, self.total_size_mib
            ))
        })
    }
}
