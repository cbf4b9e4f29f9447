//! How the monitor process ends: one documented code per kind of end.

use serde::{Deserialize, Serialize};

/// Exit code of a `roost-vmm run` process. Codes above 128 mean: ended by signal (code − 128).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
pub enum ExitCode {
    /// The guest powered itself off.
    PowerOff = 0,
    /// A fault in the monitor itself (a panic).
    Internal = 1,
    /// The command line or the configuration is wrong; nothing was started.
    Config = 2,
    /// KVM is missing, forbidden, or refused a call.
    Kvm = 3,
    /// The guest crashed: triple fault, an instruction KVM cannot run, or a refused entry.
    GuestCrash = 4,
    /// A file, tap, socket or other host object failed.
    HostIo = 5,
    /// A thread made a system call that its filter forbids.
    Seccomp = 6,
    /// Ended by the API's `ForceStop` or by SIGTERM/SIGINT.
    Killed = 7,
    /// The guest reset itself and the configuration says to end then (`"on_reset": "exit"`).
    GuestReset = 8,
}

impl ExitCode {
    /// Every code, in order.
    pub const ALL: [Self; 9] = [
        Self::PowerOff,
        Self::Internal,
        Self::Config,
        Self::Kvm,
        Self::GuestCrash,
        Self::HostIo,
        Self::Seccomp,
        Self::Killed,
        Self::GuestReset,
    ];

    /// The process exit code.
    #[must_use]
    pub const fn code(self) -> i32 {
        self as i32
    }

    /// The code that a process ended with, if it is one of ours.
    #[must_use]
    pub fn from_code(code: i32) -> Option<Self> {
        Self::ALL.into_iter().find(|c| c.code() == code)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_distinct_and_read_back() {
        for code in ExitCode::ALL {
            assert_eq!(ExitCode::from_code(code.code()), Some(code));
        }
        assert_eq!(ExitCode::from_code(99), None);
    }
}
