//! The virtual machine as KVM knows it: memory slots, interrupt controllers, timers, vCPUs.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY, KVM_PIT_SPEAKER_DUMMY, kvm_clock_data, kvm_irqchip, kvm_pit_config, kvm_pit_state2,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::devices::virtio::mmio::page::Pages;
use crate::devices::virtio::pmem::image::Image;
use crate::error::{Error, Result};
use crate::layout;
use crate::memory::Memory;

/// The KVM API that the monitor speaks (the only one there ever was).
const API_VERSION: i32 = 12;
/// Without these nothing works.
const NEEDED: [(Cap, &str); 8] = [
    (Cap::UserMemory, "user memory slots"),
    (Cap::Irqchip, "an in-kernel interrupt controller"),
    (Cap::Irqfd, "irqfd"),
    (Cap::Ioeventfd, "ioeventfd"),
    (Cap::ImmediateExit, "immediate exit"),
    (Cap::ExtCpuid, "CPUID tables"),
    (Cap::MpState, "multiprocessor states"),
    (Cap::Pit2, "the PIT"),
];

/// What the monitor calls a capability that it cannot do without.
#[must_use]
pub fn needed(capability: u32) -> Option<&'static str> {
    NEEDED.iter().find(|(cap, _)| *cap as u32 == capability).map(|(_, name)| *name)
}

/// An open `/dev/kvm`, checked.
///
/// # Errors
/// [`Error::Kvm`], [`Error::KvmLacks`].
pub fn open_kvm(handed: Option<OwnedFd>) -> Result<Kvm> {
    use std::os::fd::{FromRawFd, IntoRawFd};
    let kvm = match handed {
        // SAFETY: the descriptor is open and owned; from here on the Kvm value owns it.
        Some(descriptor) => unsafe { Kvm::from_raw_fd(descriptor.into_raw_fd()) },
        None => Kvm::new().map_err(Error::kvm("opening /dev/kvm"))?,
    };
    let version = kvm.get_api_version();
    if version != API_VERSION {
        return Err(Error::KvmLacks(format!("API version {API_VERSION} (it has {version})")));
    }
    for (cap, name) in NEEDED {
        if !kvm.check_extension(cap) {
            return Err(Error::KvmLacks(name.to_owned()));
        }
    }
    Ok(kvm)
}

/// A machine of KVM's that has nothing yet. Making one can take many milliseconds that the host spends waiting (Linux 6.1 waits for all
/// its CPUs to take notice when it starts a thread of its own for it).
pub struct EmptyVm {
    /// Where it was made.
    pub kvm: Kvm,
    fd: VmFd,
}

impl EmptyVm {
    /// Makes one.
    ///
    /// # Errors
    /// [`Error::Kvm`], [`Error::KvmLacks`].
    pub fn new(handed: Option<OwnedFd>) -> Result<Self> {
        let kvm = open_kvm(handed)?;
        let fd = retry_interrupted(|| kvm.create_vm()).map_err(Error::kvm("KVM_CREATE_VM"))?;
        Ok(Self { kvm, fd })
    }
}

impl std::fmt::Debug for EmptyVm {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("EmptyVm")
    }
}

/// The machine.
pub struct Vm {
    fd: VmFd,
    start: ChipState,
    /// After the machine that reads it.
    _shown: Pages,
}

/// The state of chips that all vCPUs share.
#[derive(Clone, Serialize, Deserialize)]
pub struct ChipState {
    irqchips: Vec<kvm_irqchip>,
    pit: Option<kvm_pit_state2>,
}

impl Vm {
    /// Gives a machine this memory, these files in it, what it reads of its devices, and its interrupt controllers. Slots have the
    /// numbers of the regions, then of the files.
    ///
    /// # Errors
    /// [`Error::Kvm`], [`Error::KvmLacks`].
    pub fn new(empty: EmptyVm, memory: &Memory, files: &[Arc<Image>], shown: Pages) -> Result<(Self, Kvm)> {
        let EmptyVm { kvm, fd } = empty;
        if files.iter().any(|file| file.read_only()) && !kvm.check_extension(Cap::ReadonlyMem) {
            return Err(Error::KvmLacks("read-only memory, for pmem with read_only".into()));
        }
        // Memory comes before the interrupt controllers: a slot that is registered later costs milliseconds.
        let ram = memory
            .iter()
            .map(|region| (region, if region.bitmap().is_some() { KVM_MEM_LOG_DIRTY_PAGES } else { 0 }));
        let files =
            files.iter().map(|file| (&**file.region(), if file.read_only() { KVM_MEM_READONLY } else { 0 }));
        let regions = ram.chain(files).map(|(region, flags)| {
            let host = region
                .get_host_address(MemoryRegionAddress(0))
                .map_err(Error::memory("address of a region"))?;
            Ok((region.start_addr().raw_value(), region.len(), host as u64, flags))
        });
        let window_pages = shown.region().filter(|_| kvm.check_extension(Cap::ReadonlyMem));
        let window_pages = window_pages.map(|region| {
            Ok((layout::VIRTIO_MMIO_START, region.size() as u64, region.as_ptr() as u64, KVM_MEM_READONLY))
        });
        for (slot, region) in regions.chain(window_pages).enumerate() {
            let (guest_phys_addr, memory_size, userspace_addr, flags) = region?;
            let slot = u32::try_from(slot).unwrap_or(u32::MAX);
            let slot =
                kvm_userspace_memory_region { slot, guest_phys_addr, memory_size, userspace_addr, flags };
            // SAFETY: each region is one mapping, which `memory` or a file keeps, and the caller keeps these beside the machine; or the
            // machine keeps it.
            unsafe { fd.set_user_memory_region(slot) }.map_err(Error::kvm("KVM_SET_USER_MEMORY_REGION"))?;
        }
        fd.set_tss_address(layout::KVM_TSS_ADDR).map_err(Error::kvm("KVM_SET_TSS_ADDR"))?;
        fd.set_identity_map_address(layout::KVM_IDENTITY_MAP_ADDR)
            .map_err(Error::kvm("KVM_SET_IDENTITY_MAP_ADDR"))?;
        fd.create_irq_chip().map_err(Error::kvm("KVM_CREATE_IRQCHIP"))?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..kvm_pit_config::default() };
        fd.create_pit2(pit).map_err(Error::kvm("KVM_CREATE_PIT2"))?;
        let start = ChipState::capture(&fd)?;
        Ok((Self { fd, start, _shown: shown }, kvm))
    }

    /// Resets what all vCPUs share.
    ///
    /// # Errors
    /// [`Error::Kvm`].
    pub fn reset_chips(&self) -> Result<()> {
        self.start.restore(&self.fd)
    }

    /// Reads what all vCPUs share, and the guest's clock. No vCPU runs.
    ///
    /// # Errors
    /// [`Error::Kvm`].
    pub fn save(&self) -> Result<SavedVm> {
        let clock = self.fd.get_clock().map_err(Error::kvm("KVM_GET_CLOCK"))?;
        Ok(SavedVm { chips: ChipState::capture(&self.fd)?, clock_ns: clock.clock })
    }

    /// Puts it back, the clock set forward by `passed`. No vCPU runs.
    ///
    /// # Errors
    /// [`Error::Kvm`].
    pub fn restore(&self, saved: &SavedVm, passed: Duration) -> Result<()> {
        saved.chips.restore(&self.fd)?;
        let passed = u64::try_from(passed.as_nanos()).unwrap_or(0);
        let clock =
            kvm_clock_data { clock: saved.clock_ns.saturating_add(passed), ..kvm_clock_data::default() };
        self.fd.set_clock(&clock).map_err(Error::kvm("KVM_SET_CLOCK"))
    }

    /// Pages that the guest wrote since the last time: one bit each, from the start of the memory slot on.
    ///
    /// # Errors
    /// [`Error::Kvm`].
    pub fn dirty_pages(&self, slot: usize, bytes: u64) -> Result<Vec<u64>> {
        let slot = u32::try_from(slot).unwrap_or(u32::MAX);
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        self.fd.get_dirty_log(slot, bytes).map_err(Error::kvm("KVM_GET_DIRTY_LOG"))
    }

    /// Makes a vCPU.
    ///
    /// # Errors
    /// [`Error::Kvm`].
    pub fn create_vcpu(&self, id: u8) -> Result<VcpuFd> {
        self.fd.create_vcpu(u64::from(id)).map_err(Error::kvm("KVM_CREATE_VCPU"))
    }

    /// An eventfd that raises an interrupt line.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Kvm`].
    pub fn interrupt_line(&self, gsi: u32) -> Result<EventFd> {
        let line = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(Error::io("eventfd"))?;
        self.fd.register_irqfd(&line, gsi).map_err(Error::kvm("KVM_IRQFD"))?;
        Ok(line)
    }

    /// An eventfd that is written when the guest writes `value` (32 bits) at `address`.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Kvm`].
    pub fn bell(&self, address: u64, value: u32) -> Result<EventFd> {
        let bell = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(Error::io("eventfd"))?;
        self.fd
            .register_ioevent(&bell, &IoEventAddress::Mmio(address), value)
            .map_err(Error::kvm("KVM_IOEVENTFD"))?;
        Ok(bell)
    }

    /// Lets KVM take the guest's write of `value` (32 bits) at `address`, so that nobody hears of it. The eventfd may go: KVM keeps it.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Kvm`].
    pub fn swallow(&self, address: u64, value: u32) -> Result<()> {
        self.bell(address, value).map(drop)
    }
}

impl ChipState {
    fn capture(fd: &VmFd) -> Result<Self> {
        let mut irqchips = Vec::new();
        for chip_id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC] {
            let mut chip = kvm_irqchip { chip_id, ..kvm_irqchip::default() };
            fd.get_irqchip(&mut chip).map_err(Error::kvm("KVM_GET_IRQCHIP"))?;
            irqchips.push(chip);
        }
        Ok(Self { irqchips, pit: fd.get_pit2().ok() })
    }

    fn restore(&self, fd: &VmFd) -> Result<()> {
        for chip in &self.irqchips {
            fd.set_irqchip(chip).map_err(Error::kvm("KVM_SET_IRQCHIP"))?;
        }
        if let Some(pit) = &self.pit {
            fd.set_pit2(pit).map_err(Error::kvm("KVM_SET_PIT2"))?;
        }
        Ok(())
    }
}

/// What a snapshot holds of the machine beside its vCPUs.
#[derive(Clone, Serialize, Deserialize)]
pub struct SavedVm {
    chips: ChipState,
    /// The guest's clock (kvmclock), nanoseconds.
    clock_ns: u64,
}

impl std::fmt::Debug for Vm {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Vm")
    }
}

/// Numbers of the MSRs that make up a vCPU's state.
///
/// # Errors
/// [`Error::Kvm`].
pub fn msr_indices(kvm: &Kvm) -> Result<Vec<u32>> {
    let list = kvm.get_msr_index_list().map_err(Error::kvm("KVM_GET_MSR_INDEX_LIST"))?;
    Ok(list.as_slice().to_vec())
}

/// KVM_CREATE_VM may be interrupted by a signal on a busy host.
fn retry_interrupted<T>(
    mut call: impl FnMut() -> std::result::Result<T, kvm_ioctls::Error>,
) -> std::result::Result<T, kvm_ioctls::Error> {
    for _ in 0..4 {
        match call() {
            Err(error) if error.errno() == libc::EINTR => {}
            result => return result,
        }
    }
    call()
}
