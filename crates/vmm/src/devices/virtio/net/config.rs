//! What may change of an interface while its machine runs.

use serde::{Deserialize, Serialize};

use crate::config::{NetworkInterface, RateLimiter};

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
