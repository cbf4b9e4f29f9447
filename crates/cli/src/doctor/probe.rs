//! `roost-vmm probe --json`: guests of a few instructions tell what KVM can do.
//!
//! Of the monitor's report only what decides is read, so that a newer one may say more.

use super::decision::Kvm;
use super::gather::{program, run as run_program};
use serde::Deserialize;
use std::path::{Path, PathBuf};

/// The one version of the KVM API that there ever was.
const API_VERSION: i64 = 12;

#[derive(Deserialize)]
struct Report {
    kvm: Device,
    #[serde(rename = "loop")]
    speed: Option<Speed>,
    #[serde(default)]
    instructions: Vec<Instruction>,
    #[serde(default)]
    summary: String,
}

#[derive(Deserialize)]
struct Device {
    present: bool,
    permitted: bool,
    api_version: Option<i64>,
    #[serde(default)]
    capabilities: Vec<Capability>,
    error: Option<String>,
}

#[derive(Deserialize)]
struct Capability {
    name: String,
    present: bool,
    needed: bool,
}

#[derive(Deserialize)]
struct Speed {
    instructions_per_second: u64,
}

#[derive(Deserialize)]
struct Instruction {
    name: String,
    outcome: String,
}

/// Runs the probe guests in this monitor, in the one beside this program, or in one on the PATH.
pub async fn run(vmm: Option<&Path>, processor_can: bool) -> Kvm {
    let Some(vmm) = vmm.map(Path::to_owned).or_else(beside).or_else(|| program("roost-vmm")) else {
        return Kvm::Unknown(
            "the monitor roost-vmm is neither beside this program nor on the PATH".to_owned(),
        );
    };
    // It reports a bad KVM by its exit code as well; the report says more.
    match run_program(&vmm, &["probe", "--json"]).await {
        Ok(output) if output.stdout.is_empty() => Kvm::Unknown(output.failure(&vmm)),
        Ok(output) => read(&output.stdout, processor_can),
        Err(why) => Kvm::Unknown(why),
    }
}

fn beside() -> Option<PathBuf> {
    let path = std::env::current_exe().ok()?.with_file_name("roost-vmm");
    path.is_file().then_some(path)
}

/// Reads the monitor's report.
fn read(text: &str, processor_can: bool) -> Kvm {
    let report: Report = match serde_json::from_str(text) {
        Ok(report) => report,
        Err(error) => return Kvm::Unknown(format!("the monitor's report cannot be read ({error})")),
    };
    if !report.kvm.present {
        return Kvm::Missing { processor_can };
    }
    if !report.kvm.permitted {
        return Kvm::Forbidden;
    }
    if let Some(version) = report.kvm.api_version.filter(|version| *version != API_VERSION) {
        return Kvm::Broken(format!("KVM speaks API version {version}, and {API_VERSION} is needed"));
    }
    let lacking = |capability: &&Capability| capability.needed && !capability.present;
    let lacking: Vec<&str> =
        report.kvm.capabilities.iter().filter(lacking).map(|capability| capability.name.as_str()).collect();
    if !lacking.is_empty() {
        return Kvm::Broken(format!("KVM lacks {}", lacking.join(", ")));
    }
    let Some(speed) = report.speed else {
        return Kvm::Broken(report.kvm.error.unwrap_or(report.summary));
    };
    // What the processor model does not offer, no kernel uses.
    let failed = report
        .instructions
        .into_iter()
        .filter(|instruction| !matches!(instruction.outcome.as_str(), "ok" | "not_offered"))
        .map(|instruction| instruction.name)
        .collect();
    Kvm::Probed { cpl0_per_second: speed.instructions_per_second, failed }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn report() -> Value {
        json!({
            "kvm": {
                "present": true, "permitted": true, "api_version": 12, "max_vcpus": 64, "error": null,
                "capabilities": [{ "name": "IRQCHIP", "present": true, "needed": true },
                                 { "name": "X", "present": false, "needed": false }],
            },
            "loop": { "instructions": 1000, "micros": 1, "instructions_per_second": 1_000_000_000 },
            "instructions": [{ "name": "clac", "outcome": "ok" }, { "name": "xrstor", "outcome": "not_offered" }],
            "verdict": "good", "summary": "s", "news": [],
        })
    }

    fn with(pointer: &str, value: Value) -> Kvm {
        let mut report = report();
        *report.pointer_mut(pointer).unwrap() = value;
        read(&report.to_string(), true)
    }

    #[test]
    fn a_good_a_slow_and_an_incomplete_kvm_are_read() {
        let good = read(&report().to_string(), true);
        assert_eq!(good, Kvm::Probed { cpl0_per_second: 1_000_000_000, failed: vec![] });
        let slow = with("/loop/instructions_per_second", json!(1_700_000));
        assert_eq!(slow, Kvm::Probed { cpl0_per_second: 1_700_000, failed: vec![] });
        let incomplete = with("/instructions/0/outcome", json!("failed"));
        assert!(matches!(incomplete, Kvm::Probed { failed, .. } if failed == ["clac"]));
    }

    #[test]
    fn what_did_not_run_is_never_taken_for_good() {
        assert_eq!(with("/kvm/present", json!(false)), Kvm::Missing { processor_can: true });
        assert_eq!(with("/kvm/permitted", json!(false)), Kvm::Forbidden);
        assert!(matches!(with("/kvm/api_version", json!(11)), Kvm::Broken(why) if why.contains("11")));
        assert!(
            matches!(with("/kvm/capabilities/0/present", json!(false)), Kvm::Broken(why) if why.contains("IRQCHIP"))
        );
        assert!(matches!(with("/loop", Value::Null), Kvm::Broken(why) if why == "s"));
        assert!(
            matches!(with("/instructions/0/outcome", json!("odd")), Kvm::Probed { failed, .. } if failed.len() == 1)
        );
        for unreadable in ["{}", "", "Segmentation fault"] {
            assert!(matches!(read(unreadable, true), Kvm::Unknown(_)), "{unreadable}");
        }
    }
}
