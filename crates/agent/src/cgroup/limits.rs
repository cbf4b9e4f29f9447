//! What a spec means in the words of cgroup v2: pure.

use roost_types::agent::InstanceSpec;

/// Period of `cpu.max` where nobody chose one, microseconds: the kernel's own.
pub const PERIOD_US: u64 = 100_000;
/// CPU beside the vCPUs' that a monitor's device and API threads may take, in milli-CPUs.
const IO_MILLI: u64 = 1000;
/// Threads beside the vCPUs'.
const IO_THREADS: u64 = 16;

/// One file and what it must hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limit {
    /// Its name in the cgroup.
    pub file: &'static str,
    /// Its content.
    pub value: String,
}

/// The limits of an instance and of its `vcpu` child: pure.
pub fn limits(spec: &InstanceSpec, overhead_mib: u64, period_us: u64) -> (Vec<Limit>, Vec<Limit>) {
    let limit = |file, value: String| Limit { file, value };
    let quota = |milli: u64| {
        // 1 ms is the least that the kernel takes.
        format!("{} {period_us}", (milli * period_us / 1000).max(1000))
    };
    let vcpu = u64::from(spec.cpu.max_milli);
    let memory = (spec.memory_mib + overhead_mib) << 20;
    let instance = vec![
        limit("memory.max", memory.to_string()),
        limit("memory.swap.max", "0".into()),
        limit("memory.oom.group", "1".into()),
        limit("pids.max", (u64::from(spec.cpu.vcpus) + IO_THREADS).to_string()),
        limit("cpu.weight", spec.cpu.weight.to_string()),
        limit("cpu.max", quota(vcpu + IO_MILLI)),
    ];
    (instance, vec![limit("cpu.max", quota(vcpu))])
}

/// Whether a limit reads as it was written. Memory is kept in whole pages, so what was written is too.
pub fn same(got: &str, wanted: &str) -> bool {
    got.trim() == wanted
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::ensure;

    #[test]
    fn limits_follow_from_the_spec() {
        let mut spec = ensure(1).spec;
        spec.cpu.max_milli = 250;
        let (instance, vcpu) = limits(&spec, 64, PERIOD_US);
        assert_eq!(vcpu, [Limit { file: "cpu.max", value: "25000 100000".into() }]);
        assert!(instance.contains(&Limit { file: "memory.max", value: (192 << 20).to_string() }));
        assert!(instance.contains(&Limit { file: "memory.swap.max", value: "0".into() }));
        assert!(instance.contains(&Limit { file: "cpu.max", value: "125000 100000".into() }));
        spec.cpu.max_milli = 1;
        assert_eq!(limits(&spec, 0, PERIOD_US).1[0].value, "1000 100000", "the kernel's least");
        spec.cpu.max_milli = 250;
        assert_eq!(limits(&spec, 0, 400_000).1[0].value, "100000 400000");
    }
}
