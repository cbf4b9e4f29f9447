//! An interface: what it is, what may change of it while its machine runs, and how its taps are opened.

use serde::{Deserialize, Serialize};

use std::fs::File;
use std::os::fd::OwnedFd;

use super::MAX_PAIRS;
use super::kernel::Kernel;
use super::tap::TapDevice;
use super::vhost::Vhost;
use crate::config::{RateLimiter, is_false, one, parse_mac};
use crate::descriptors::{Access, Descriptors};
use crate::error::{Error, Result};

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkInterface {
    /// Its name.
    pub iface_id: String,
    /// The guest's MAC address, `06:00:ac:1f:00:05`; one is made from the interface's number when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_mac: Option<String>,
    /// A handed tap descriptor (`IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`, attached), or a tap's name.
    pub host_dev_name: String,
    /// Pairs of queues, 1–8, each with a tap of its own: a tap opened so often with `IFF_MULTI_QUEUE`. Beside `host_dev_name` the
    /// descriptors are called `host_dev_name.1`, `.2` and so on.
    #[serde(default = "one")]
    pub num_queue_pairs: u8,
    /// The host's kernel moves the packets (vhost-net): no limits, no counters.
    #[serde(default, skip_serializing_if = "is_false")]
    pub vhost: bool,
    /// The largest packet that the guest should send, bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// How much may go to the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// How much may come from the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tx_rate_limiter: Option<RateLimiter>,
}

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

/// What opens a data path in the host's kernel.
const VHOST_NET: &str = "/dev/vhost-net";

impl NetworkInterface {
    /// Checks what types cannot say.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn check(&self) -> Result<()> {
        if let Some(mac) = &self.guest_mac {
            parse_mac(mac)?;
        }
        if self.num_queue_pairs == 0 || usize::from(self.num_queue_pairs) > MAX_PAIRS {
            return Err(Error::Config(format!(
                "network-interfaces: {:?}: num_queue_pairs {} is outside 1–{MAX_PAIRS}",
                self.iface_id, self.num_queue_pairs
            )));
        }
        if self.mtu.is_some_and(|mtu| mtu < 68) {
            return Err(Error::Config(format!("network-interfaces: {:?}: mtu is below 68", self.iface_id)));
        }
        Ok(())
    }

    /// The name of the descriptor of one of its taps.
    pub(crate) fn tap_name(&self, index: u8) -> String {
        let first = &self.host_dev_name;
        if index == 0 { first.clone() } else { format!("{first}.{index}") }
    }

    /// Opens its taps: descriptors that were handed over, or the tap of that name.
    ///
    /// # Errors
    /// [`Error::NotHanded`], [`Error::Io`].
    pub fn open(&self, descriptors: &Descriptors) -> Result<Vec<TapDevice>> {
        let (first, several) = (&self.host_dev_name, self.num_queue_pairs > 1);
        let open = |index| {
            let name = self.tap_name(index);
            let tap = if descriptors.has(first) {
                TapDevice::from_fd(descriptors.handed(&name, "tap")?, several)
            } else {
                TapDevice::open(first, several)
            };
            tap.map_err(Error::io(format!("tap {name:?}")))
        };
        (0..self.num_queue_pairs).map(open).collect()
    }

    /// Opens its data path in the host's kernel, if it has one: for each tap a descriptor that was handed over under the tap's name
    /// with `.vhost` behind it, or `/dev/vhost-net`.
    ///
    /// # Errors
    /// [`Error::Io`] with what is needed.
    pub fn open_vhost(&self, descriptors: &Descriptors) -> Result<Option<Kernel>> {
        if !self.vhost {
            return Ok(None);
        }
        let open = |index| {
            let name = self.vhost_name(index);
            let vhost = if descriptors.has(&name) {
                descriptors.handed(&name, "vhost-net").map(OwnedFd::into)?
            } else {
                self.open_fresh_vhost(&name)?
            };
            Vhost::new(vhost).map_err(|source| self.no_vhost(&name, source))
        };
        let pairs = (0..self.num_queue_pairs).map(open).collect::<Result<_>>()?;
        Kernel::new(pairs).map(Some).map_err(Error::io("eventfd"))
    }

    /// The name of the descriptor of the data path of one of its taps.
    pub(crate) fn vhost_name(&self, index: u8) -> String {
        format!("{}.vhost", self.tap_name(index))
    }

    /// Opens a data path that is nobody's yet.
    pub(crate) fn open_fresh_vhost(&self, name: &str) -> Result<File> {
        Access::ReadWrite.options().open(VHOST_NET).map_err(|source| self.no_vhost(name, source))
    }

    fn no_vhost(&self, name: &str, source: std::io::Error) -> Error {
        let id = &self.iface_id;
        let what =
            format!("interface {id:?}: vhost true needs a fresh {VHOST_NET}, or one handed over as {name:?}");
        Error::Io { what, source }
    }

    /// Checks what a data path in the host's kernel rules out.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn check_vhost(&self, track_dirty_pages: bool) -> Result<()> {
        let limited = self.rx_rate_limiter.is_some() || self.tx_rate_limiter.is_some();
        let why = match self.vhost {
            true if limited => "rx_rate_limiter and tx_rate_limiter are the monitor's own data path's",
            true if track_dirty_pages => "track_dirty_pages does not see what the host's kernel writes",
            _ => return Ok(()),
        };
        let id = &self.iface_id;
        Err(Error::Config(format!("network-interfaces: {id:?}: vhost true: {why}; one of both can be had")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::VmConfig;

    fn interface(more: &str) -> Result<NetworkInterface> {
        let config = format!(
            r#"{{"network-interfaces":[{{"iface_id":"e","host_dev_name":"t","vhost":true{more}}}]}}"#
        );
        VmConfig::from_json(&config).map(|mut config| config.network_interfaces.remove(0))
    }

    #[test]
    fn the_kernel_keeps_no_limits_and_notes_no_pages() {
        let limit = r#"{"ops":{"size":1,"refill_time":1}}"#;
        for field in ["rx_rate_limiter", "tx_rate_limiter"] {
            let error = interface(&format!(r#","{field}":{limit}"#)).unwrap_err().to_string();
            assert!(error.contains(r#""e": vhost true: rx_rate_limiter"#), "{error}");
        }
        let error = interface(r#"}],"machine-config":{"vcpu_count":1,"mem_size_mib":64,"track_dirty_pages":true},"entropy":{},"drives":[{"drive_id":"a","path_on_host":"a""#).unwrap_err();
        assert!(error.to_string().contains("track_dirty_pages"), "{error}");
        let update: NetworkInterfaceUpdate =
            serde_json::from_str(&format!(r#"{{"iface_id":"e","tx_rate_limiter":{limit}}}"#)).unwrap();
        let running = interface("").unwrap();
        assert!(update.apply(&running).check_vhost(false).is_err());
        assert!(update.apply(&NetworkInterface { vhost: false, ..running }).check_vhost(true).is_ok());
    }

    #[test]
    fn each_tap_has_a_name_for_its_own_data_path() {
        let several = interface(r#","num_queue_pairs":3"#).unwrap();
        assert_eq!(
            (0..3).map(|n| several.vhost_name(n)).collect::<Vec<_>>(),
            ["t.vhost", "t.1.vhost", "t.2.vhost"]
        );
        // What is handed over under that name is what is used.
        let descriptors = Descriptors::default();
        descriptors.insert("t.vhost", File::open("/dev/null").unwrap()).unwrap();
        let error = several.open_vhost(&descriptors).unwrap_err().chain();
        for part in [r#"interface "e": vhost true"#, VHOST_NET, r#""t.vhost""#, "VHOST_GET_FEATURES"] {
            assert!(error.contains(part), "{error}");
        }
    }
}
