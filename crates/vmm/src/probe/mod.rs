//! What this host's KVM can do, found out by running small guests on it: how fast kernel-mode code runs, and whether
//! the instructions that every kernel needs work. Some machines have a `/dev/kvm` that answers as usual but emulates
//! kernel-mode code a thousand times too slowly, or without instructions that a kernel uses.
//!
//! Each question gets a machine of its own with a time limit, so that one bad answer spoils no other.

mod guest;
mod questions;

use std::fmt;

use kvm_ioctls::{Cap, Kvm};
use serde::{Deserialize, Serialize};

use guest::Answer;

/// Kernel-mode instructions per second below which a host counts as slow: real hardware and a nested KVM under full
/// emulation of a CPU are both above 500 million (and above this on a busy host), an instruction emulator is below 5.
pub const SLOW_BELOW: u64 = 20_000_000;

/// Everything that was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The device.
    pub kvm: KvmReport,
    /// How fast kernel-mode code runs.
    #[serde(rename = "loop", default, skip_serializing_if = "Option::is_none")]
    pub speed: Option<Speed>,
    /// The instructions that were tried.
    #[serde(default)]
    pub instructions: Vec<Instruction>,
    /// What follows.
    pub verdict: Verdict,
    /// One sentence for people.
    pub summary: String,
}

/// `/dev/kvm` itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvmReport {
    /// The device file is there.
    pub present: bool,
    /// This process may open it.
    pub permitted: bool,
    /// The API version; 12 is the only one there ever was.
    pub api_version: Option<i32>,
    /// What the monitor needs and whether it is there.
    pub capabilities: Vec<Capability>,
    /// Most vCPUs per machine.
    pub max_vcpus: Option<usize>,
    /// What went wrong.
    pub error: Option<String>,
}

/// One capability of KVM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capability {
    /// Its name in the KVM API, without `KVM_CAP_`.
    pub name: String,
    /// Whether KVM has it.
    pub present: bool,
    /// Whether the monitor cannot run without it.
    pub needed: bool,
}

/// Speed of a counted loop in 64-bit kernel mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Speed {
    /// Instructions that ran.
    pub instructions: u64,
    /// How long they took, microseconds.
    pub micros: u64,
    /// The quotient.
    pub instructions_per_second: u64,
}

/// One instruction.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instruction {
    /// Its name.
    pub name: String,
    /// How it went.
    pub outcome: Outcome,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

/// How an instruction went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// It works.
    Ok,
    /// It does not.
    Failed,
    /// The CPU model that KVM offers does not have it, so no kernel will use it.
    NotOffered,
}

/// What follows from the findings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Linux guests run.
    Good,
    /// There is no `/dev/kvm`.
    Missing,
    /// `/dev/kvm` may not be opened.
    Forbidden,
    /// KVM lacks what the monitor needs.
    Unfit,
    /// Kernel-mode code is emulated: too slow, and mostly incomplete too.
    Slow,
    /// An instruction that kernels need does not work.
    Incomplete,
}

impl Report {
    /// Whether Linux guests run here.
    #[must_use]
    pub const fn usable(&self) -> bool {
        matches!(self.verdict, Verdict::Good)
    }
}

/// What follows from findings: a pure function.
#[must_use]
pub fn judge(kvm: &KvmReport, speed: Option<&Speed>, instructions: &[Instruction]) -> (Verdict, String) {
    let lacking: Vec<&str> =
        kvm.capabilities.iter().filter(|c| c.needed && !c.present).map(|c| c.name.as_str()).collect();
    let failed: Vec<&str> =
        instructions.iter().filter(|i| i.outcome == Outcome::Failed).map(|i| i.name.as_str()).collect();
    let also = if failed.is_empty() {
        String::new()
    } else {
        format!("; these instructions fail: {}", failed.join(", "))
    };
    if !kvm.present {
        return (Verdict::Missing, "there is no /dev/kvm".into());
    }
    if !kvm.permitted {
        let why = kvm.error.as_deref().unwrap_or("permission denied");
        return (Verdict::Forbidden, format!("/dev/kvm cannot be opened: {why}"));
    }
    if kvm.api_version != Some(12) || !lacking.is_empty() {
        return (
            Verdict::Unfit,
            format!(
                "KVM lacks {}",
                if lacking.is_empty() { "API version 12".into() } else { lacking.join(", ") }
            ),
        );
    }
    match speed {
        None => {
            let why = kvm.error.as_deref().unwrap_or("it did not end");
            (Verdict::Unfit, format!("a counted loop in kernel mode does not run: {why}{also}"))
        }
        Some(speed) if speed.instructions_per_second < SLOW_BELOW => (
            Verdict::Slow,
            format!(
                "kernel-mode code runs at {:.1} million instructions per second, so it is emulated; Linux guests do not boot{also}",
                speed.instructions_per_second as f64 / 1e6
            ),
        ),
        Some(_) if !failed.is_empty() => (
            Verdict::Incomplete,
            format!("instructions that kernels need do not work: {}", failed.join(", ")),
        ),
        Some(speed) => (
            Verdict::Good,
            format!(
                "kernel-mode code runs at {} million instructions per second",
                speed.instructions_per_second / 1_000_000
            ),
        ),
    }
}

/// Asks everything.
#[must_use]
pub fn run() -> Report {
    let mut kvm = KvmReport { present: std::path::Path::new("/dev/kvm").exists(), ..KvmReport::default() };
    let mut speed = None;
    let mut instructions = Vec::new();
    match Kvm::new() {
        Err(error) => kvm.error = Some(std::io::Error::from(error).to_string()),
        Ok(device) => {
            kvm.permitted = true;
            kvm.api_version = Some(device.get_api_version());
            kvm.capabilities = capabilities(&device);
            kvm.max_vcpus = Some(device.get_max_vcpus());
            match questions::speed(&device) {
                Ok(found) => speed = Some(found),
                Err(why) => kvm.error = Some(why),
            }
            instructions = questions::instructions(&device);
        }
    }
    let (verdict, summary) = judge(&kvm, speed.as_ref(), &instructions);
    Report { kvm, speed, instructions, verdict, summary }
}

fn capabilities(kvm: &Kvm) -> Vec<Capability> {
    let list = [
        (Cap::UserMemory, "USER_MEMORY", true),
        (Cap::Irqchip, "IRQCHIP", true),
        (Cap::Irqfd, "IRQFD", true),
        (Cap::Ioeventfd, "IOEVENTFD", true),
        (Cap::ImmediateExit, "IMMEDIATE_EXIT", true),
        (Cap::ExtCpuid, "EXT_CPUID", true),
        (Cap::MpState, "MP_STATE", true),
        (Cap::Pit2, "PIT2", true),
        (Cap::TscDeadlineTimer, "TSC_DEADLINE_TIMER", false),
        (Cap::AdjustClock, "ADJUST_CLOCK", false),
        (Cap::Xsave, "XSAVE", false),
        (Cap::Xcrs, "XCRS", false),
        (Cap::VcpuEvents, "VCPU_EVENTS", false),
    ];
    list.into_iter()
        .map(|(cap, name, needed)| Capability {
            name: name.to_owned(),
            present: kvm.check_extension(cap),
            needed,
        })
        .collect()
}

impl fmt::Display for Report {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(formatter, "{}", self.summary)?;
        for capability in self.kvm.capabilities.iter().filter(|capability| !capability.present) {
            let weight = if capability.needed { "needed" } else { "useful" };
            writeln!(formatter, "  capability {} ({weight}): missing", capability.name)?;
        }
        for instruction in &self.instructions {
            let (name, why) = (&instruction.name, instruction.why.as_deref().unwrap_or_default());
            match instruction.outcome {
                Outcome::Ok => writeln!(formatter, "  {name}: ok")?,
                Outcome::NotOffered => writeln!(formatter, "  {name}: not offered by this CPU model")?,
                Outcome::Failed => writeln!(formatter, "  {name}: FAILED: {why}")?,
            }
        }
        Ok(())
    }
}

impl Answer {
    /// As the outcome of an instruction that is meant to reach its end.
    fn judged(self) -> (Outcome, Option<String>) {
        match self {
            Self::Reached => (Outcome::Ok, None),
            other => (Outcome::Failed, Some(other.to_string())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> (KvmReport, Speed, Vec<Instruction>) {
        let kvm = KvmReport { present: true, permitted: true, api_version: Some(12), ..KvmReport::default() };
        let speed = Speed { instructions: 1, micros: 1, instructions_per_second: 900_000_000 };
        (kvm, speed, vec![Instruction { name: "int3".into(), outcome: Outcome::Ok, why: None }])
    }

    #[test]
    fn each_kind_of_host_gets_its_verdict() {
        let (kvm, speed, list) = good();
        assert_eq!(judge(&kvm, Some(&speed), &list).0, Verdict::Good);
        assert_eq!(judge(&KvmReport::default(), None, &[]).0, Verdict::Missing);
        let forbidden = KvmReport { permitted: false, ..kvm.clone() };
        assert_eq!(judge(&forbidden, None, &[]).0, Verdict::Forbidden);
        let lacking = Capability { name: "IRQCHIP".into(), present: false, needed: true };
        let unfit = KvmReport { capabilities: vec![lacking], ..kvm.clone() };
        let (verdict, summary) = judge(&unfit, Some(&speed), &list);
        assert_eq!(verdict, Verdict::Unfit);
        assert!(summary.contains("IRQCHIP"), "{summary}");
        let slow = Speed { instructions_per_second: 1_700_000, ..speed };
        assert_eq!(judge(&kvm, Some(&slow), &list).0, Verdict::Slow);
        let failed = vec![Instruction { name: "int3".into(), outcome: Outcome::Failed, why: None }];
        let (verdict, summary) = judge(&kvm, Some(&speed), &failed);
        assert_eq!(verdict, Verdict::Incomplete);
        assert!(summary.contains("int3"), "{summary}");
        let unoffered = vec![Instruction { name: "clac".into(), outcome: Outcome::NotOffered, why: None }];
        assert_eq!(judge(&kvm, Some(&speed), &unoffered).0, Verdict::Good);
    }
}
