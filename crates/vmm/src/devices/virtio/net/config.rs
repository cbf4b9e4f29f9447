//! What may change of an interface while its machine runs, and how its taps are opened.

use serde::{Deserialize, Serialize};

use super::tap::TapDevice;
use crate::config::{NetworkInterface, RateLimiter};
use crate::descriptors::Descriptors;
use crate::error::{Error, Result};

/// `PATCH /network-interfaces/{id}`. Buckets replace those that are there; one of size 0 or time 0 removes a limit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkInterfaceUpdate {
    /// The interface.
    pub iface_id: String,
    /// How much may go to the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// How much may come from the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tx_rate_limiter: Option<RateLimiter>,
}

impl NetworkInterfaceUpdate {
    /// The interface's configuration after the change.
    #[must_use]
    pub fn apply(&self, interface: &NetworkInterface) -> NetworkInterface {
        NetworkInterface {
            rx_rate_limiter: RateLimiter::changed(interface.rx_rate_limiter, self.rx_rate_limiter),
            tx_rate_limiter: RateLimiter::changed(interface.tx_rate_limiter, self.tx_rate_limiter),
            ..interface.clone()
        }
    }
}

impl NetworkInterface {
    /// Opens its taps: descriptors that were handed over, or the tap of that name.
    ///
    /// # Errors
    /// [`Error::NotHanded`], [`Error::Io`].
    pub fn open(&self, descriptors: &Descriptors) -> Result<Vec<TapDevice>> {
        let (first, several) = (&self.host_dev_name, self.num_queue_pairs > 1);
        let open = |index| {
            let name = if index == 0 { first.clone() } else { format!("{first}.{index}") };
            let tap = if descriptors.has(first) {
                TapDevice::from_fd(descriptors.handed(&name, "tap")?, several)
            } else {
                TapDevice::open(first, several)
            };
            tap.map_err(Error::io(format!("tap {name:?}")))
        };
        (0..self.num_queue_pairs).map(open).collect()
    }
}
