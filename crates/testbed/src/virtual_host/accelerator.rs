//! How the virtual host's own CPUs are made: by the hardware where it can nest KVM, else by emulation.

use std::fs;
use std::fs::OpenOptions;

/// What QEMU runs the virtual host's CPUs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// Hardware KVM with nested virtualisation.
    Kvm,
    /// QEMU's own CPU emulation, which has AMD SVM with nested paging from QEMU 10 on.
    Tcg,
}

impl Accelerator {
    /// Looks at this machine.
    #[must_use]
    pub fn probe() -> Self {
        let nested =
            |vendor: &str| fs::read_to_string(format!("/sys/module/kvm_{vendor}/parameters/nested")).ok();
        let usable = OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
        choose_accelerator(usable, nested("amd").or_else(|| nested("intel")).as_deref())
    }

    /// The arguments that select it, for CPUs that lack these features.
    pub(super) fn arguments(self, lacks: &[String]) -> [String; 4] {
        let (accelerator, cpu) = match self {
            Self::Kvm => ("kvm", "host"),
            // No 5-level paging: a nested page walk through five levels is paid for at each TLB miss.
            Self::Tcg => ("tcg,thread=multi,tb-size=512", "max,-la57"),
        };
        let cpu = lacks.iter().fold(cpu.to_owned(), |cpu, feature| format!("{cpu},-{feature}"));
        ["-accel".to_owned(), accelerator.to_owned(), "-cpu".to_owned(), cpu]
    }

    /// Additions to the guest kernel's command line under emulation. An emulated CPU does not
    /// speculate, so each mitigation costs instructions for nothing. On a hardware CPU, tenants
    /// need every mitigation.
    pub(super) const fn boot_args(self) -> &'static str {
        match self {
            Self::Kvm => "",
            Self::Tcg => " mitigations=off",
        }
    }
}

/// KVM only when this user may open it and a hardware module says that guests may have it, too. A `/dev/kvm`
/// without `kvm_amd` or `kvm_intel` behind it does not run kernels at hardware speed, let alone nest them.
#[must_use]
pub fn choose_accelerator(kvm_opens: bool, nested_parameter: Option<&str>) -> Accelerator {
    match nested_parameter.map(str::trim) {
        Some("1" | "Y" | "y") if kvm_opens => Accelerator::Kvm,
        _ => Accelerator::Tcg,
    }
}

#[cfg(test)]
mod tests {
    use super::{Accelerator, choose_accelerator};

    #[test]
    fn hardware_kvm_is_used_only_when_it_opens_and_nests() {
        assert_eq!(choose_accelerator(true, Some("1\n")), Accelerator::Kvm);
        assert_eq!(choose_accelerator(true, Some("Y\n")), Accelerator::Kvm);
        assert_eq!(choose_accelerator(true, Some("0\n")), Accelerator::Tcg);
        assert_eq!(choose_accelerator(true, None), Accelerator::Tcg);
        assert_eq!(choose_accelerator(false, Some("1\n")), Accelerator::Tcg);
    }
}
