//! The seam between deciding and doing: everything that the reconciler wants of a host.
//!
//! [`crate::real::RealHost`] does it with cgroups, namespaces and processes; the tests have one that does it in
//! memory and dies wherever it is told to. Each method is idempotent: it may be called again after it was cut short
//! anywhere.

use crate::error::Result;
use crate::record::{Accepted, MonitorId, Run};
use crate::trouble::Troubles;
use roost_types::agent::{HostFacts, TimedPart};
use roost_types::ids::InstanceId;
use std::collections::BTreeSet;
use std::future::Future;

/// What a look at the host showed of one instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// Every blob that it boots from is here, unpacked.
    pub images: bool,
    /// Its root volume exists.
    pub disk: bool,
    /// Its network stands as the spec wants it, its DHCP and metadata services included.
    pub network: bool,
    /// Its cgroup has the limits that the spec wants.
    pub cgroup: bool,
    /// Its monitor.
    pub monitor: MonitorFact,
    /// Anything is there that exists only for a run: cgroup, namespace, link, run folder.
    pub run_objects: bool,
    /// Its volume, if that goes with it, or another file of it is there.
    pub files: bool,
}

/// What a look showed of the monitor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MonitorFact {
    /// None is recorded and none lives.
    None,
    /// Processes of the instance live that no record names: a start that was cut short.
    Stray,
    /// The recorded one lives.
    Alive {
        /// Since when its vCPUs run, if they do.
        ran_ns: Option<u64>,
        /// Times of the guest's resets, oldest first. The monitor restarts the guest in the same
        /// process.
        resets_ns: Vec<u64>,
    },
    /// The recorded one is gone.
    Dead(Death),
}

/// What is known of a monitor's end.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Death {
    /// When its vCPUs began to run, if they ever did.
    pub ran_ns: Option<u64>,
    /// Its own durable word.
    pub word: Option<LastWord>,
    /// The kernel killed it because it used up its memory.
    pub out_of_memory: bool,
    /// The host has booted since.
    pub host_rebooted: bool,
}

/// What a monitor said before it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LastWord {
    /// When, nanoseconds of CLOCK_BOOTTIME.
    pub at_ns: u64,
    /// What kind of end.
    pub reason: roost_vmm::status::ExitReason,
    /// A sentence.
    pub message: String,
}

/// A host and what can be done on it.
pub trait Host: Send + Sync + 'static {
    /// CLOCK_BOOTTIME now, nanoseconds.
    fn now_ns(&self) -> u64;
    /// This boot.
    fn boot_id(&self) -> String;
    /// What the host can hold.
    fn facts(&self) -> HostFacts;
    /// Slots whose user ids are in use by a process.
    fn slots_in_use(&self) -> BTreeSet<u32>;
    /// Troubles of the host itself.
    fn troubles(&self) -> &Troubles;
    /// Trouble of an instance's network whose objects are as they were made.
    fn network_trouble(&self, _: &InstanceId) -> Option<String> {
        None
    }

    /// Looks at one instance.
    fn look(&self, of: &Accepted, run: &Run) -> impl Future<Output = Result<Facts>> + Send;
    /// Fetches and unpacks the blobs.
    fn fetch(&self, of: &Accepted) -> impl Future<Output = Result<()>> + Send;
    /// Makes the root volume.
    fn make_disk(&self, of: &Accepted) -> impl Future<Output = Result<()>> + Send;
    /// Makes or replaces network, firewall, DHCP and metadata services, without a break for a running guest.
    fn make_network(&self, of: &Accepted) -> impl Future<Output = Result<()>> + Send;
    /// Makes the cgroup, sets each limit and reads it back.
    fn make_cgroup(&self, of: &Accepted) -> impl Future<Output = Result<()>> + Send;
    /// Starts the monitor in its jail, held: threads parked, no vCPU runs.
    fn start_monitor(&self, of: &Accepted) -> impl Future<Output = Result<Started>> + Send;
    /// Puts the threads in their place and lets the vCPUs run; gives when they began.
    fn let_run(&self, of: &Accepted, monitor: &MonitorId) -> impl Future<Output = Result<u64>> + Send;
    /// Presses the guest's power button.
    fn press_power(&self, of: &Accepted) -> impl Future<Output = Result<()>> + Send;
    /// Ends every process of the instance and waits until they are gone.
    fn kill(&self, of: &Accepted) -> impl Future<Output = Result<()>> + Send;
    /// Returns when the monitor has ended.
    fn ended(&self, of: &Accepted, monitor: &MonitorId) -> impl Future<Output = ()> + Send;
    /// Removes what exists for a run only.
    fn tear_down(&self, of: &Accepted) -> impl Future<Output = Result<()>> + Send;
    /// Removes the volume, if it goes with the instance.
    fn remove_disk(&self, of: &Accepted) -> impl Future<Output = Result<()>> + Send;

    /// CPU time used since the cgroup was made, microseconds.
    fn cpu_usage_us(&self, of: &Accepted) -> Option<u64>;
    /// What the guest wrote to its console from `offset` on, and where that ends.
    fn console(&self, of: &Accepted, offset: u64) -> Option<(Vec<u8>, u64)>;
}

/// A monitor that was started and is held.
#[derive(Debug, Clone)]
pub struct Started {
    /// The process.
    pub monitor: MonitorId,
    /// Where the console's stream stood.
    pub console_from: u64,
    /// How long the parts took.
    pub timing: Vec<TimedPart>,
}
