//! CPU templates: what a guest's CPUs leave out of what the host has, so that a snapshot moves between hosts that are not alike.
//!
//! ```text
//!   KVM's tables ──offer──▶ what a guest could have ──template──▶ what it has ──topology──▶ each vCPU's own table
//!   an MSR as KVM makes it ──────────────────────────template──▶ what the vCPU starts with
//! ```
//! A template is one of the built-in levels ([`level`]) or the user's own, in the shape of Firecracker's custom templates. It leaves
//! out, or changes what describes; a feature that the host lacks cannot be added.

pub mod alike;
mod bitmap;

mod level;
pub mod msrs;
mod number;
mod xsave;

use std::collections::BTreeSet;

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

pub use bitmap::Bitmap;
pub use level::Level;

use super::features::{self, Register};
use crate::config::VmConfig;
use crate::error::{Error, Result};

/// `cpu-config` of a configuration: a template, or the name of a file that holds one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum CpuConfig {
    /// A descriptor handed over by this name, or a path; read when the machine is built.
    Named(String),
    /// The template itself.
    Template(CpuTemplate),
}

/// A template of the user's own.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuTemplate {
    /// Capabilities that this host's KVM must have, and ones that it need not have.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub kvm_capabilities: Vec<KvmCapability>,
    /// Changes of CPUID.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cpuid_modifiers: Vec<CpuidModifier>,
    /// Changes of MSRs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub msr_modifiers: Vec<MsrModifier>,
    /// For aarch64 alone: empty.
    #[serde(default, skip_serializing, deserialize_with = "number::reg_modifiers")]
    pub reg_modifiers: (),
    /// For aarch64 alone: empty.
    #[serde(default, skip_serializing, deserialize_with = "number::vcpu_features")]
    pub vcpu_features: (),
}

/// A capability of KVM's by its number: `"56"` must be there, `"!56"` need not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct KvmCapability {
    /// Its number (`KVM_CAP_*` of linux/kvm.h).
    pub number: u32,
    /// It must be there.
    pub needed: bool,
}

/// Changes of one leaf of CPUID.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuidModifier {
    /// The leaf.
    #[serde(serialize_with = "number::hex", deserialize_with = "number::leaf")]
    pub leaf: u32,
    /// The subleaf; 0 for a leaf that has none.
    #[serde(serialize_with = "number::hex", deserialize_with = "number::subleaf")]
    pub subleaf: u32,
    /// KVM's flags of this leaf: 1 if it has subleaves.
    pub flags: u32,
    /// What changes.
    pub modifiers: Vec<RegisterModifier>,
}

/// A change of one register of a leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegisterModifier {
    /// The register.
    pub register: Register,
    /// Its bits.
    pub bitmap: Bitmap<32>,
}

/// A change of an MSR.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MsrModifier {
    /// Its address.
    #[serde(serialize_with = "number::hex", deserialize_with = "number::addr")]
    pub addr: u32,
    /// Its bits.
    pub bitmap: Bitmap<64>,
}

/// The template of a machine.
#[derive(Clone, Copy, Debug)]
pub enum Template<'a> {
    /// A built-in one, or none.
    Level(Level),
    /// The user's own.
    Own(&'a CpuTemplate),
}

/// Topology is the machine's own: a template that changed it would change nothing.
const TOPOLOGY: [u32; 2] = [0xb, 0x1f];
/// Flags of KVM's that there are (`KVM_CPUID_FLAG_*`).
const FLAGS: u32 = 7;
/// Most modifiers of each kind: there are fewer leaves and MSRs.
const MAX_MODIFIERS: usize = 256;
/// Bits of physical and of linear addresses in leaf 0x8000_0008 EAX.
const ADDRESS_BITS: [(u32, &str); 2] = [(0, "physical"), (8, "linear")];

/// Checks a machine's template as far as that can be done without a host.
///
/// # Errors
/// [`Error::Config`], naming the field.
pub fn check(config: &VmConfig) -> Result<()> {
    let level = config.machine_config.cpu_template;
    match &config.cpu_config {
        None => Ok(()),
        Some(_) if !level.is_none() => Err(refuse(format!(
            "it stands beside machine-config's cpu_template {:?}; a machine has one template",
            level.name()
        ))),
        Some(CpuConfig::Template(template)) => template.check(),
        Some(CpuConfig::Named(_)) => Ok(()),
    }
}

impl<'a> Template<'a> {
    /// The template of a machine.
    ///
    /// # Errors
    /// [`Error::State`] if its file has not been read, which the build does first.
    pub fn of(config: &'a VmConfig) -> Result<Self> {
        match &config.cpu_config {
            None => Ok(Self::Level(config.machine_config.cpu_template)),
            Some(CpuConfig::Template(template)) => Ok(Self::Own(template)),
            Some(CpuConfig::Named(name)) => {
                Err(Error::State(format!("the CPU template {name:?} has not been read")))
            }
        }
    }
}

fn refuse(why: impl std::fmt::Display) -> Error {
    Error::Config(format!("cpu-config: {why}"))
}

impl CpuTemplate {
    /// Parses a file.
    ///
    /// # Errors
    /// [`Error::Config`], naming the field.
    pub fn from_json(text: &str) -> Result<Self> {
        let template: Self = serde_json::from_str(text).map_err(refuse)?;
        template.check()?;
        Ok(template)
    }

    /// Checks what can be checked without a host.
    ///
    /// # Errors
    /// [`Error::Config`], naming the field.
    pub fn check(&self) -> Result<()> {
        for (field, count) in [
            ("kvm_capabilities", self.kvm_capabilities.len()),
            ("cpuid_modifiers", self.cpuid_modifiers.len()),
            ("msr_modifiers", self.msr_modifiers.len()),
        ] {
            if count > MAX_MODIFIERS {
                return Err(refuse(format!(
                    "{field} has {count} entries, at most {MAX_MODIFIERS} are allowed"
                )));
            }
        }
        for capability in self.kvm_capabilities.iter().filter(|capability| !capability.needed) {
            if let Some(name) = crate::vm::needed(capability.number) {
                return Err(refuse(format!(
                    "kvm_capabilities: \"!{}\": the monitor cannot do without {name}",
                    capability.number
                )));
            }
        }
        let mut seen = BTreeSet::new();
        for CpuidModifier { leaf, subleaf, flags, modifiers } in &self.cpuid_modifiers {
            let place = format!("cpuid_modifiers: leaf {leaf:#x}, subleaf {subleaf:#x}");
            if *flags > FLAGS {
                return Err(refuse(format!("{place}: flags {flags} is outside 0–{FLAGS}")));
            }
            if TOPOLOGY.contains(leaf) {
                return Err(refuse(format!(
                    "{place}: this leaf says which CPUs the machine has, so the monitor makes it"
                )));
            }
            for RegisterModifier { register, .. } in modifiers {
                if !seen.insert((leaf, subleaf, register)) {
                    return Err(refuse(format!("{place}: {} is there twice", register.name())));
                }
            }
        }
        let mut seen = BTreeSet::new();
        for MsrModifier { addr, .. } in &self.msr_modifiers {
            if msrs::CLOCKS.contains(addr) {
                return Err(refuse(format!(
                    "msr_modifiers: addr {addr:#x}: this is the guest's clock, which starts and goes on by itself"
                )));
            }
            if !seen.insert(addr) {
                return Err(refuse(format!("msr_modifiers: addr {addr:#x} is there twice")));
            }
        }
        Ok(())
    }

    fn apply(&self, table: &mut [kvm_cpuid_entry2]) -> std::result::Result<(), String> {
        for CpuidModifier { leaf, subleaf, flags, modifiers } in &self.cpuid_modifiers {
            let place = format!("cpuid_modifiers: leaf {leaf:#x}, subleaf {subleaf:#x}");
            let entry = features::find_mut(table, *leaf, *subleaf)
                .ok_or_else(|| format!("{place}: this host's KVM has no such leaf"))?;
            if (entry.flags ^ flags) & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0 {
                return Err(format!(
                    "{place}: flags {flags} is not KVM's {}: bit 0 says whether the leaf has subleaves",
                    entry.flags
                ));
            }
            for RegisterModifier { register, bitmap } in modifiers {
                let value = register.get_mut(entry);
                *value = u32::try_from(bitmap.apply((*value).into())).unwrap_or(*value);
            }
        }
        Ok(())
    }
}

impl Template<'_> {
    /// What of the offered table a guest has.
    ///
    /// # Errors
    /// [`Error::Config`]: what the template asks for and the host does not have, by name.
    pub fn apply(self, offered: &[kvm_cpuid_entry2]) -> Result<Vec<kvm_cpuid_entry2>> {
        let mut table = offered.to_vec();
        let (field, applied) = match self {
            Self::Level(Level::None) => return Ok(table),
            Self::Level(level) => ("machine-config", level.apply(&mut table)),
            Self::Own(template) => ("cpu-config", template.apply(&mut table)),
        };
        if matches!(self, Self::Own(_)) {
            alike::trim(&mut table);
        }
        let checked = applied.and_then(|()| within(&table, offered)).and_then(|()| xsave::settle(&mut table));
        checked.map_err(|why| Error::Config(format!("{field}: {why}")))?;
        Ok(table)
    }

    /// The changes of MSRs of a vCPU with this table.
    #[must_use]
    pub fn msrs(self, table: &[kvm_cpuid_entry2]) -> Vec<MsrModifier> {
        match self {
            Self::Level(Level::None) => Vec::new(),
            Self::Level(_) if features::has(table, "arch_capabilities") => vec![msrs::affected_by_all()],
            Self::Level(_) => Vec::new(),
            Self::Own(template) => template.msr_modifiers.clone(),
        }
    }

    /// Capabilities that this host's KVM must have.
    pub fn capabilities(self) -> impl Iterator<Item = u32> {
        let all = match self {
            Self::Level(_) => &[][..],
            Self::Own(template) => &template.kvm_capabilities,
        };
        all.iter().filter(|capability| capability.needed).map(|capability| capability.number)
    }
}

/// Nothing is in a table that the host does not have.
fn within(table: &[kvm_cpuid_entry2], offered: &[kvm_cpuid_entry2]) -> std::result::Result<(), String> {
    let lacking = features::lacking(table, offered);
    if !lacking.is_empty() {
        return Err(format!("this host's CPU or KVM lacks what the template sets: {}", lacking.join(", ")));
    }
    match wider(table, offered) {
        Some(why) => Err(format!("the template sets what this host cannot have: {why}")),
        None => Ok(()),
    }
}

/// Addresses of a table that are longer than another's.
#[must_use]
pub fn wider(table: &[kvm_cpuid_entry2], host: &[kvm_cpuid_entry2]) -> Option<String> {
    let of = |table, shift: u32| Register::Eax.of(table, 0x8000_0008, 0) >> shift & 0xff;
    ADDRESS_BITS.into_iter().find_map(|(shift, name)| {
        let (wanted, has) = (of(table, shift), of(host, shift));
        (wanted > has).then(|| {
            format!("{name} addresses of {wanted} bits (CPUID leaf 0x80000008 eax), where it has {has}")
        })
    })
}

impl TryFrom<String> for KvmCapability {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        let (needed, digits) = match text.strip_prefix('!') {
            Some(digits) => (false, digits),
            None => (true, text.as_str()),
        };
        let number = digits.parse().map_err(|_| {
            format!("kvm_capabilities: {text:?} is not the number of a capability (\"56\"), or one that need not be there (\"!56\")")
        })?;
        Ok(Self { number, needed })
    }
}

impl From<KvmCapability> for String {
    fn from(capability: KvmCapability) -> Self {
        format!("{}{}", if capability.needed { "" } else { "!" }, capability.number)
    }
}

impl<'de> Deserialize<'de> for CpuConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        /// By hand, so that what is wrong in a template is named.
        struct Either;

        impl<'de> Visitor<'de> for Either {
            type Value = CpuConfig;

            fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                formatter.write_str("a CPU template, or the name of a file that holds one")
            }

            fn visit_str<E: serde::de::Error>(self, name: &str) -> std::result::Result<CpuConfig, E> {
                Ok(CpuConfig::Named(name.to_owned()))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> std::result::Result<CpuConfig, A::Error> {
                CpuTemplate::deserialize(MapAccessDeserializer::new(map)).map(CpuConfig::Template)
            }
        }

        deserializer.deserialize_any(Either)
    }
}

#[cfg(test)]
pub(in crate::cpu) mod tests;
