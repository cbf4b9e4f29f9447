//! A vCPU's whole state, taken right after its creation: putting it back is what a reset line does.

use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_fpu, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;

use crate::error::{Error, Result};

const MSR_TSC: u32 = 0x10;
const MSR_TSC_ADJUST: u32 = 0x3b;
/// Most MSRs that KVM takes in one call.
const MSRS_PER_CALL: usize = 200;

/// The state. What this KVM cannot read is left out, and is not put back.
pub struct VcpuState {
    regs: kvm_regs,
    sregs: kvm_sregs,
    fpu: Option<kvm_fpu>,
    xsave: Option<Box<kvm_xsave>>,
    xcrs: Option<kvm_xcrs>,
    debug: Option<kvm_debugregs>,
    events: Option<kvm_vcpu_events>,
    mp_state: Option<kvm_mp_state>,
    lapic: Option<Box<kvm_lapic_state>>,
    msrs: Vec<kvm_msr_entry>,
}

impl VcpuState {
    /// Reads it. `msr_indices` is KVM's own list.
    ///
    /// # Errors
    /// [`Error::Kvm`] for the registers that every KVM has.
    pub fn capture(vcpu: &VcpuFd, msr_indices: &[u32]) -> Result<Self> {
        Ok(Self {
            regs: vcpu.get_regs().map_err(Error::kvm("KVM_GET_REGS"))?,
            sregs: vcpu.get_sregs().map_err(Error::kvm("KVM_GET_SREGS"))?,
            fpu: vcpu.get_fpu().ok(),
            xsave: vcpu.get_xsave().ok().map(Box::new),
            xcrs: vcpu.get_xcrs().ok(),
            debug: vcpu.get_debug_regs().ok(),
            events: vcpu.get_vcpu_events().ok(),
            mp_state: vcpu.get_mp_state().ok(),
            lapic: vcpu.get_lapic().ok().map(Box::new),
            msrs: read_msrs(vcpu, msr_indices),
        })
    }

    /// The special registers, as a start for those of a kernel's entry.
    #[must_use]
    pub const fn sregs(&self) -> &kvm_sregs {
        &self.sregs
    }

    /// Puts it back. The TSC goes on, as the machine's clock does.
    ///
    /// # Errors
    /// [`Error::Kvm`].
    pub fn restore(&self, vcpu: &VcpuFd) -> Result<()> {
        if let Some(mp_state) = self.mp_state {
            vcpu.set_mp_state(mp_state).map_err(Error::kvm("KVM_SET_MP_STATE"))?;
        }
        vcpu.set_regs(&self.regs).map_err(Error::kvm("KVM_SET_REGS"))?;
        vcpu.set_sregs(&self.sregs).map_err(Error::kvm("KVM_SET_SREGS"))?;
        if let Some(xsave) = &self.xsave {
            // SAFETY: no feature beyond the 4 KiB area was enabled with arch_prctl, so KVM reads no more than that.
            unsafe { vcpu.set_xsave(xsave) }.map_err(Error::kvm("KVM_SET_XSAVE"))?;
        } else if let Some(fpu) = &self.fpu {
            vcpu.set_fpu(fpu).map_err(Error::kvm("KVM_SET_FPU"))?;
        }
        if let Some(xcrs) = &self.xcrs {
            vcpu.set_xcrs(xcrs).map_err(Error::kvm("KVM_SET_XCRS"))?;
        }
        if let Some(debug) = &self.debug {
            vcpu.set_debug_regs(debug).map_err(Error::kvm("KVM_SET_DEBUGREGS"))?;
        }
        write_msrs(vcpu, &self.msrs);
        if let Some(lapic) = &self.lapic {
            vcpu.set_lapic(lapic).map_err(Error::kvm("KVM_SET_LAPIC"))?;
        }
        if let Some(events) = &self.events {
            vcpu.set_vcpu_events(events).map_err(Error::kvm("KVM_SET_VCPU_EVENTS"))?;
        }
        Ok(())
    }
}

/// Reads as many of the MSRs as this KVM reads: one that it lists but refuses is stepped over.
fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Vec<kvm_msr_entry> {
    let mut found = Vec::with_capacity(indices.len());
    let wanted: Vec<u32> =
        indices.iter().copied().filter(|i| !matches!(*i, MSR_TSC | MSR_TSC_ADJUST)).collect();
    let mut rest = wanted.as_slice();
    while !rest.is_empty() {
        let now = rest.len().min(MSRS_PER_CALL);
        let entries: Vec<_> = rest[..now]
            .iter()
            .map(|index| kvm_msr_entry { index: *index, ..kvm_msr_entry::default() })
            .collect();
        let Ok(mut msrs) = Msrs::from_entries(&entries) else { break };
        let read = vcpu.get_msrs(&mut msrs).unwrap_or(0).min(now);
        found.extend_from_slice(&msrs.as_slice()[..read]);
        rest = &rest[if read < now { read + 1 } else { read }..];
    }
    found
}

/// Writes them; one that KVM refuses is stepped over.
pub fn write_msrs(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) {
    let mut rest = entries;
    while !rest.is_empty() {
        let now = rest.len().min(MSRS_PER_CALL);
        let Ok(msrs) = Msrs::from_entries(&rest[..now]) else { break };
        let written = vcpu.set_msrs(&msrs).unwrap_or(0).min(now);
        rest = &rest[if written < now { written + 1 } else { written }..];
    }
}
