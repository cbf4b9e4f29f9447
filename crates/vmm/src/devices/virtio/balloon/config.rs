//! What a balloon is configured with, and what may change while its machine runs.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Pages of 4 KiB in a MiB.
pub const PAGES_PER_MIB: u64 = 256;
/// Longest interval between statistics, seconds.
const MAX_INTERVAL: u64 = u16::MAX as u64;

/// A balloon: memory that the guest's driver takes from the guest and gives back to the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonConfig {
    /// How much the driver should take, MiB; at most the machine's memory.
    pub amount_mib: u64,
    /// The driver may give memory back to a guest that would run out of it.
    #[serde(default)]
    pub deflate_on_oom: bool,
    /// How often the driver is asked for statistics, seconds; 0: never, and that cannot change later.
    #[serde(default)]
    pub stats_polling_interval_s: u64,
    /// The driver reports memory that the guest does not use, as it comes to be so; the host takes it back.
    #[serde(default)]
    pub free_page_reporting: bool,
}

/// `PATCH /balloon`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonUpdate {
    /// As in [`BalloonConfig::amount_mib`].
    pub amount_mib: u64,
}

/// `PATCH /balloon/statistics`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StatisticsUpdate {
    /// As in [`BalloonConfig::stats_polling_interval_s`].
    pub stats_polling_interval_s: u64,
}

impl BalloonConfig {
    /// Checks the numbers against the machine's memory.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn check(&self, mem_size_mib: u64) -> Result<()> {
        if self.amount_mib > mem_size_mib {
            return Err(Error::Config(format!(
                "balloon: amount_mib {} is outside 0–{mem_size_mib}, the machine's mem_size_mib",
                self.amount_mib
            )));
        }
        if self.stats_polling_interval_s > MAX_INTERVAL {
            return Err(Error::Config(format!(
                "balloon: stats_polling_interval_s {} is outside 0–{MAX_INTERVAL}",
                self.stats_polling_interval_s
            )));
        }
        Ok(())
    }

    /// With another interval. The driver is told at its start whether there are statistics, so they neither come nor go.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn with_interval(self, update: StatisticsUpdate) -> Result<Self> {
        let StatisticsUpdate { stats_polling_interval_s } = update;
        let (was, is) = (self.stats_polling_interval_s != 0, stats_polling_interval_s != 0);
        let rule = match (was, is) {
            (false, true) => "the machine was started with 0, no statistics, and that cannot change",
            (true, false) => {
                "the machine was started with statistics, and they cannot be switched off (1–65535)"
            }
            _ => return Ok(Self { stats_polling_interval_s, ..self }),
        };
        Err(Error::Config(format!("balloon: stats_polling_interval_s {stats_polling_interval_s}: {rule}")))
    }
}
