//! A vCPU's whole state. Taken right after its creation, putting it back is what a reset line does; taken later, it is what a
//! snapshot holds.

use std::time::Duration;

use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_fpu, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

const MSR_TSC: u32 = 0x10;
const MSR_TSC_ADJUST: u32 = 0x3b;
/// Means something only when the local APIC's timer is in its mode and the TSC has its value.
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// Most MSRs that KVM takes in one call.
const MSRS_PER_CALL: usize = 200;

/// The state. What this KVM cannot read is left out, and is not put back.
#[derive(Serialize, Deserialize)]
pub struct VcpuState {
    regs: kvm_regs,
    sregs: kvm_sregs,
    /// Part of the XSAVE area; read by itself only where KVM has no XSAVE.
    #[serde(skip)]
    fpu: Option<kvm_fpu>,
    xsave: Option<Box<kvm_xsave>>,
    xcrs: Option<kvm_xcrs>,
    debug: Option<kvm_debugregs>,
    events: Option<kvm_vcpu_events>,
    mp_state: Option<kvm_mp_state>,
    lapic: Option<Box<kvm_lapic_state>>,
    msrs: Vec<kvm_msr_entry>,
}

/// What a snapshot holds of a vCPU: its state, and the time that its TSC shows.
#[derive(Serialize, Deserialize)]
pub struct SavedVcpu {
    state: VcpuState,
    tsc: u64,
    tsc_adjust: Option<u64>,
    /// kHz.
    tsc_khz: Option<u32>,
}

impl SavedVcpu {
    /// Reads it of a vCPU that does not run. `start` is its state after its creation, whose MSRs are those that there are.
    ///
    /// # Errors
    /// [`Error::Kvm`].
    pub fn capture(vcpu: &VcpuFd, start: &VcpuState) -> Result<Self> {
        let msrs: Vec<u32> = start.msrs.iter().map(|entry| entry.index).collect();
        let state = VcpuState::capture(vcpu, &msrs)?;
        let clock = read(vcpu, &[MSR_TSC, MSR_TSC_ADJUST]);
        let value = |index| clock.iter().find(|entry| entry.index == index).map(|entry| entry.data);
        let tsc = value(MSR_TSC).ok_or_else(|| Error::KvmLacks("a TSC that can be read".into()))?;
        Ok(Self { state, tsc, tsc_adjust: value(MSR_TSC_ADJUST), tsc_khz: vcpu.get_tsc_khz().ok() })
    }

    /// The value of an MSR.
    #[must_use]
    pub fn msr(&self, index: u32) -> Option<u64> {
        self.state.msrs.iter().find(|entry| entry.index == index).map(|entry| entry.data)
    }

    /// Puts it into a vCPU that does not run, its TSC set forward by `passed`. The MSRs of `template` must be what they were.
    ///
    /// # Errors
    /// [`Error::Kvm`], [`Error::Snapshot`] for a TSC frequency and an MSR that this host cannot give.
    pub fn restore(&self, vcpu: &VcpuFd, passed: Duration, template: &[u32]) -> Result<()> {
        if let Some(khz) = self.tsc_khz.filter(|khz| vcpu.get_tsc_khz().ok() != Some(*khz)) {
            vcpu.set_tsc_khz(khz).map_err(|source| {
                Error::Snapshot(format!(
                    "the guest's TSC runs at {khz} kHz, which this host cannot give it ({source}); load it where the TSC \
                     runs at that frequency or can be scaled"
                ))
            })?;
        }
        let ticks = passed.as_nanos() * u128::from(self.tsc_khz.unwrap_or(0)) / 1_000_000;
        let tsc = self.tsc.wrapping_add(u64::try_from(ticks).unwrap_or(0));
        // TSC_ADJUST comes first: writing it moves the TSC.
        let clock: Vec<_> = self
            .tsc_adjust
            .map(|data| msr(MSR_TSC_ADJUST, data))
            .into_iter()
            .chain([msr(MSR_TSC, tsc)])
            .collect();
        write_msrs(vcpu, &clock);
        self.state.restore(vcpu)?;
        for entry in self.state.msrs.iter().filter(|entry| template.contains(&entry.index)) {
            let has = read(vcpu, &[entry.index]).first().map(|entry| entry.data);
            if has != Some(entry.data) {
                return Err(Error::Snapshot(format!(
                    "MSR {:#x} of the guest's CPU template was {:#x}, which this host's KVM does not take",
                    entry.index, entry.data
                )));
            }
        }
        Ok(())
    }
}

const fn msr(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry { index, data, reserved: 0 }
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

    /// Whether it runs, halts, or waits for INIT.
    #[must_use]
    pub const fn mp_state(&self) -> Option<kvm_mp_state> {
        self.mp_state
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
        let (deadline, others): (Vec<_>, Vec<_>) =
            self.msrs.iter().copied().partition(|entry| entry.index == MSR_TSC_DEADLINE);
        write_msrs(vcpu, &others);
        if let Some(lapic) = &self.lapic {
            vcpu.set_lapic(lapic).map_err(Error::kvm("KVM_SET_LAPIC"))?;
        }
        write_msrs(vcpu, &deadline);
        if let Some(events) = &self.events {
            vcpu.set_vcpu_events(events).map_err(Error::kvm("KVM_SET_VCPU_EVENTS"))?;
        }
        Ok(())
    }
}

/// Reads as many of the MSRs as this KVM reads: one that it lists but refuses is stepped over.
fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Vec<kvm_msr_entry> {
    let wanted: Vec<u32> =
        indices.iter().copied().filter(|i| !matches!(*i, MSR_TSC | MSR_TSC_ADJUST)).collect();
    read(vcpu, &wanted)
}

/// Reads these; one that KVM does not know is left out.
pub fn read(vcpu: &VcpuFd, indices: &[u32]) -> Vec<kvm_msr_entry> {
    let mut found = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let now = rest.len().min(MSRS_PER_CALL);
        let entries: Vec<_> = rest[..now].iter().map(|index| msr(*index, 0)).collect();
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
