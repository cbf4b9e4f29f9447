//! The usage log: what was used, from when to when, by whom. Append-only; a bill is a pure function of it.

use crate::ids::AccountId;
use crate::state::{UnknownName, named_enum};
use crate::time::Micros;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

named_enum! {
    /// What is being counted.
    Meter, "meter" {
        /// Seconds that an instance of a type runs; 60 s minimum at every start.
        InstanceSeconds = "instance-seconds",
        /// Seconds that a volume of a size exists, times its GiB.
        VolumeGibSeconds = "volume-gib-seconds",
    }
}

named_enum! {
    /// What an event of the usage log says.
    UsageKind, "usage event kind" {
        /// Usage begins.
        Open = "open",
        /// Usage ends.
        Close = "close",
    }
}

/// One row of the usage log. `(resource, meter, incarnation, sequence)` is unique, so a replay is a no-op.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UsageEvent {
    /// Who pays.
    pub account: AccountId,
    /// The id of what was used, such as an instance id.
    pub resource: String,
    /// What is counted.
    pub meter: Meter,
    /// Which start of the resource this belongs to; 1 for the first.
    pub incarnation: u64,
    /// 0 opens, 1 closes; 2 opens the next part of the same start, and so on.
    pub sequence: u64,
    /// Open or close.
    pub kind: UsageKind,
    /// When, by the controller's clock.
    pub at: Micros,
    /// What a price depends on: the instance type's name, or the volume type's.
    pub sku: String,
    /// How many units run per second: 1 for an instance, the GiB of a volume.
    pub quantity: u64,
    /// Set on an `open` that continues the start before: the host had rebooted, and nobody asked
    /// for a start.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub continues: bool,
}

/// For intervals that are still open: until when a resource was last seen in use.
/// Nothing is billed past it.
pub type Proofs = BTreeMap<String, Micros>;
