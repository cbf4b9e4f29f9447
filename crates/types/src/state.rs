//! The life of an instance: what a user sees (its state), what the controller is doing about it (its step), and
//! what was asked for (its desired state). Each machine has its transition table as data.
//!
//! ```text
//!            ┌────────── start ───────────┐
//!            ▼                            │
//! launch → pending ──→ running ──→ stopping ──→ stopped
//!            │  └──── start failed ───▶┘ │         │
//!            ▼            │              ▼         │
//!          shutting-down ◀┴──────────────┴─────────┘
//!            │
//!            ▼
//!          terminated
//! ```
//! A step is finer than a state and has exactly one state: [`Step::state`].

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// A text that names no value of an enum.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown {what} {value:?}: expected one of {allowed}")]
pub struct UnknownName {
    /// What was being named.
    pub what: &'static str,
    /// The text as it came.
    pub value: String,
    /// The names there are.
    pub allowed: String,
}

macro_rules! named_enum {
    ($(#[$doc:meta])* $name:ident, $what:literal { $($(#[$vdoc:meta])* $variant:ident = $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub enum $name { $($(#[$vdoc])* #[serde(rename = $text)] $variant,)* }

        impl $name {
            /// Every value, in the order of a life.
            pub const ALL: &'static [$name] = &[$($name::$variant),*];

            /// The name on the wire, in the database and on the screen.
            pub const fn as_str(self) -> &'static str {
                match self { $($name::$variant => $text,)* }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.as_str())
            }
        }

        impl FromStr for $name {
            type Err = UnknownName;
            fn from_str(text: &str) -> Result<Self, UnknownName> {
                Self::ALL.iter().copied().find(|value| value.as_str() == text).ok_or_else(|| UnknownName {
                    what: $what,
                    value: text.to_owned(),
                    allowed: Self::ALL.iter().map(|value| value.as_str()).collect::<Vec<_>>().join(", "),
                })
            }
        }
    };
}
pub(crate) use named_enum;

named_enum! {
    /// The state of an instance as EC2 shows it. Only `running` is billed.
    InstanceState, "instance state" {
        /// Accepted; its virtual CPUs do not run yet.
        Pending = "pending",
        /// Its virtual CPUs run.
        Running = "running",
        /// Asked to stop, or found ended; the host is clearing up. Not billed.
        Stopping = "stopping",
        /// Holds no CPU and no memory; its volumes and addresses stay.
        Stopped = "stopped",
        /// Being removed for good. Not billed.
        ShuttingDown = "shutting-down",
        /// Gone; its row stays visible for a while.
        Terminated = "terminated",
    }
}

impl InstanceState {
    /// Every allowed change of state.
    pub const TRANSITIONS: &'static [(InstanceState, InstanceState)] = {
        use InstanceState::{Pending, Running, ShuttingDown, Stopped, Stopping, Terminated};
        &[
            (Pending, Running),
            (Pending, Stopping),
            (Pending, ShuttingDown),
            (Running, Stopping),
            (Running, ShuttingDown),
            (Stopping, Stopped),
            (Stopping, ShuttingDown),
            (Stopped, Pending),
            (Stopped, ShuttingDown),
            (ShuttingDown, Terminated),
        ]
    };

    /// Whether an instance may go from this state to that one.
    pub fn may_become(self, next: InstanceState) -> bool {
        Self::TRANSITIONS.contains(&(self, next))
    }

    /// Whether an instance in this state holds CPU and memory of its host.
    pub const fn holds_capacity(self) -> bool {
        !matches!(self, InstanceState::Stopped | InstanceState::Terminated)
    }

    /// EC2's numeric code of the state.
    pub const fn code(self) -> u16 {
        match self {
            InstanceState::Pending => 0,
            InstanceState::Running => 16,
            InstanceState::ShuttingDown => 32,
            InstanceState::Terminated => 48,
            InstanceState::Stopping => 64,
            InstanceState::Stopped => 80,
        }
    }
}

named_enum! {
    /// What the owner wants an instance to be.
    DesiredState, "desired state" {
        /// Its virtual CPUs run.
        Running = "running",
        /// Its disk and addresses stay, nothing else.
        Stopped = "stopped",
        /// Nothing of it is left on any host.
        Terminated = "terminated",
    }
}

named_enum! {
    /// What the controller does next about an instance: the step label in its row.
    Step, "step" {
        /// A host has been claimed; check that it answers.
        Place = "place",
        /// Ensure the instance on its host until its virtual CPUs run.
        Launch = "launch",
        /// It runs: watch.
        Run = "run",
        /// Ensure it stopped on its host until nothing of it runs.
        Stop = "stop",
        /// It is stopped: nothing to do.
        Rest = "rest",
        /// Ensure it absent from its host until nothing of it is left.
        Terminate = "terminate",
        /// Nothing of it is left.
        Gone = "gone",
    }
}

impl Step {
    /// Every allowed hop.
    pub const TRANSITIONS: &'static [(Step, Step)] = &[
        (Step::Place, Step::Launch),
        (Step::Place, Step::Stop),
        (Step::Place, Step::Terminate),
        (Step::Launch, Step::Run),
        (Step::Launch, Step::Stop),
        (Step::Launch, Step::Terminate),
        (Step::Run, Step::Stop),
        (Step::Run, Step::Terminate),
        (Step::Stop, Step::Rest),
        (Step::Stop, Step::Terminate),
        (Step::Rest, Step::Place),
        (Step::Rest, Step::Terminate),
        (Step::Terminate, Step::Gone),
    ];

    /// Whether a row may hop from this step to that one.
    pub fn may_become(self, next: Step) -> bool {
        Self::TRANSITIONS.contains(&(self, next))
    }

    /// The one state that a user sees while this step is due.
    pub const fn state(self) -> InstanceState {
        match self {
            Step::Place | Step::Launch => InstanceState::Pending,
            Step::Run => InstanceState::Running,
            Step::Stop => InstanceState::Stopping,
            Step::Rest => InstanceState::Stopped,
            Step::Terminate => InstanceState::ShuttingDown,
            Step::Gone => InstanceState::Terminated,
        }
    }
}

named_enum! {
    /// The state of a volume.
    VolumeState, "volume state" {
        /// Being made on its host.
        Creating = "creating",
        /// Attached to nothing.
        Available = "available",
        /// Attached to an instance.
        InUse = "in-use",
        /// Being removed.
        Deleting = "deleting",
        /// Gone.
        Deleted = "deleted",
    }
}

impl VolumeState {
    /// Every allowed change of state.
    pub const TRANSITIONS: &'static [(VolumeState, VolumeState)] = {
        use VolumeState::{Available, Creating, Deleted, Deleting, InUse};
        &[
            (Creating, Available),
            (Creating, InUse),
            (Creating, Deleting),
            (Available, InUse),
            (Available, Deleting),
            (InUse, Available),
            (InUse, Deleting),
            (Deleting, Deleted),
        ]
    };

    /// Whether a volume may go from this state to that one.
    pub fn may_become(self, next: VolumeState) -> bool {
        Self::TRANSITIONS.contains(&(self, next))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// Every state that can be reached from `start` over `table`.
    fn reachable<T: Copy + Ord>(start: T, table: &[(T, T)]) -> BTreeSet<T> {
        let mut seen = BTreeSet::from([start]);
        loop {
            let before = seen.len();
            for (from, to) in table {
                if seen.contains(from) {
                    seen.insert(*to);
                }
            }
            if seen.len() == before {
                return seen;
            }
        }
    }

    #[test]
    fn every_pair_of_instance_states_is_allowed_exactly_if_the_table_says_so() {
        let mut allowed = 0;
        for from in InstanceState::ALL {
            for to in InstanceState::ALL {
                let in_table = InstanceState::TRANSITIONS.iter().any(|pair| pair == &(*from, *to));
                assert_eq!(from.may_become(*to), in_table, "{from} -> {to}");
                allowed += usize::from(in_table);
            }
        }
        assert_eq!(allowed, InstanceState::TRANSITIONS.len(), "no pair stands twice in the table");
    }

    #[test]
    fn a_terminated_instance_never_comes_back_and_every_state_can_reach_it() {
        for state in InstanceState::ALL {
            assert!(!InstanceState::Terminated.may_become(*state));
            assert!(reachable(*state, InstanceState::TRANSITIONS).contains(&InstanceState::Terminated));
        }
        for step in Step::ALL {
            assert!(!Step::Gone.may_become(*step));
            assert!(reachable(*step, Step::TRANSITIONS).contains(&Step::Gone), "{step}");
        }
    }

    #[test]
    fn every_hop_between_steps_is_an_allowed_change_of_state() {
        for from in Step::ALL {
            for to in Step::ALL {
                if from.may_become(*to) && from.state() != to.state() {
                    assert!(from.state().may_become(to.state()), "{from} -> {to}");
                }
            }
        }
        // And the other way: no change of state is without a hop that makes it.
        for (from, to) in InstanceState::TRANSITIONS {
            assert!(
                Step::TRANSITIONS.iter().any(|(a, b)| a.state() == *from && b.state() == *to),
                "{from} -> {to}"
            );
        }
    }

    #[test]
    fn volumes_end_deleted() {
        for state in VolumeState::ALL {
            assert!(!VolumeState::Deleted.may_become(*state));
            assert!(reachable(*state, VolumeState::TRANSITIONS).contains(&VolumeState::Deleted));
        }
    }

    #[test]
    fn names_round_trip_and_a_wrong_one_lists_what_is_allowed() {
        for step in Step::ALL {
            assert_eq!(step.as_str().parse::<Step>().unwrap(), *step);
        }
        let error = "asleep".parse::<InstanceState>().unwrap_err().to_string();
        assert!(error.contains("pending, running, stopping"), "{error}");
    }
}
