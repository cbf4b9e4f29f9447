//! `roost-vmm probe --json`: a guest of a few instructions tells what KVM can do.
//!
//! Read tolerantly: a newer monitor may say more.

use super::decision::Kvm;
use super::gather::{program, said};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Runs the probe guest in this monitor, in the one beside this program, or in one on the PATH.
pub async fn run(vmm: Option<&Path>) -> Kvm {
    let Some(vmm) = vmm.map(Path::to_owned).or_else(beside).or_else(|| program("roost-vmm")) else {
        return Kvm::Unknown(
            "the monitor roost-vmm is neither beside this program nor on the PATH".to_owned(),
        );
    };
    match said(&vmm, &["probe", "--json"]).await {
        Ok(text) => read(&text),
        Err(why) => Kvm::Unknown(why),
    }
}

fn beside() -> Option<PathBuf> {
    let path = std::env::current_exe().ok()?.with_file_name("roost-vmm");
    path.is_file().then_some(path)
}

/// Reads the monitor's report.
fn read(text: &str) -> Kvm {
    let Ok(report) = serde_json::from_str::<Value>(text) else {
        return Kvm::Unknown("the monitor's report is no JSON".to_owned());
    };
    let flag = |names: &[&str]| names.iter().find_map(|name| find(&report, name)).and_then(Value::as_bool);
    if flag(&["present", "exists"]) == Some(false) {
        return Kvm::Missing { processor_can: false };
    }
    if flag(&["permission", "permitted", "accessible", "openable"]) == Some(false) {
        return Kvm::Forbidden;
    }
    if let Some(version) = find(&report, "api_version").and_then(Value::as_i64)
        && version != 12
    {
        return Kvm::Broken(format!("KVM speaks API version {version}, and 12 is needed"));
    }
    let speed = ["cpl0_instructions_per_second", "instructions_per_second"]
        .iter()
        .find_map(|name| find(&report, name))
        .and_then(whole);
    match speed {
        Some(cpl0_per_second) => Kvm::Probed { cpl0_per_second, failed: failed(&report) },
        None => {
            let why = find(&report, "error").and_then(Value::as_str).unwrap_or("the report has no speed");
            Kvm::Broken(format!("the probe guest did not run: {why}"))
        }
    }
}

/// A number without its fraction.
fn whole(number: &Value) -> Option<u64> {
    number.as_u64().or_else(|| number.to_string().split('.').next()?.parse().ok())
}

/// The first field of this name, at any depth, that is not null.
fn find<'a>(value: &'a Value, name: &str) -> Option<&'a Value> {
    match value {
        Value::Object(fields) => fields
            .get(name)
            .filter(|found| !found.is_null())
            .or_else(|| fields.values().find_map(|inner| find(inner, name))),
        Value::Array(items) => items.iter().find_map(|inner| find(inner, name)),
        _ => None,
    }
}

/// Names of the instructions that did not run.
fn failed(report: &Value) -> Vec<String> {
    let passed = |value: &Value| value.as_bool() == Some(true) || value["ok"].as_bool() == Some(true);
    match find(report, "instructions") {
        Some(Value::Array(items)) => items
            .iter()
            .filter(|item| !passed(item))
            .map(|item| item["name"].as_str().unwrap_or("one without a name").to_owned())
            .collect(),
        Some(Value::Object(fields)) => {
            fields.iter().filter(|(_, value)| !passed(value)).map(|(name, _)| name.clone()).collect()
        }
        _ => vec![],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_good_and_a_slow_kvm_are_read() {
        let good = r#"{"kvm":{"present":true,"permission":true,"api_version":12},
            "cpl0_instructions_per_second":1800000000.5,"instructions":[{"name":"clac","ok":true}],"new":[1]}"#;
        assert_eq!(read(good), Kvm::Probed { cpl0_per_second: 1_800_000_000, failed: vec![] });
        let slow = r#"{"api_version":12,"cpl0":{"instructions_per_second":1700000},
            "instructions":{"clac":{"ok":false,"detail":"suberror 1"},"rdtsc":true}}"#;
        assert_eq!(read(slow), Kvm::Probed { cpl0_per_second: 1_700_000, failed: vec!["clac".to_owned()] });
    }

    #[test]
    fn what_did_not_run_is_never_taken_for_good() {
        assert_eq!(read(r#"{"kvm":{"present":false}}"#), Kvm::Missing { processor_can: false });
        assert_eq!(read(r#"{"present":true,"permission":false}"#), Kvm::Forbidden);
        assert!(matches!(read(r#"{"api_version":11}"#), Kvm::Broken(why) if why.contains("11")));
        assert!(
            matches!(read(r#"{"api_version":12,"error":"no VM"}"#), Kvm::Broken(why) if why.contains("no VM"))
        );
        assert!(matches!(read("{}"), Kvm::Broken(_)));
        assert!(matches!(read("Segmentation fault"), Kvm::Unknown(_)));
    }
}
