//! Numbers that templates write as text: `0x1a0`, `0b101`, `416`.

use std::fmt::LowerHex;

use serde::de::{Error, IgnoredAny};
use serde::{Deserialize, Deserializer, Serializer};

fn parse(text: &str) -> Option<u32> {
    match (text.strip_prefix("0x"), text.strip_prefix("0b")) {
        (Some(digits), _) => u32::from_str_radix(digits, 16).ok(),
        (_, Some(digits)) => u32::from_str_radix(digits, 2).ok(),
        _ => text.parse().ok(),
    }
}

fn number<'de, D: Deserializer<'de>>(deserializer: D, field: &str) -> Result<u32, D::Error> {
    let text = String::deserialize(deserializer)?;
    let refuse = || {
        D::Error::custom(format!("{field} {text:?} is no number of 32 bits, as text (\"0x1a0\", \"416\")"))
    };
    parse(&text).ok_or_else(refuse)
}

pub fn leaf<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    number(deserializer, "leaf")
}

pub fn subleaf<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    number(deserializer, "subleaf")
}

pub fn addr<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    number(deserializer, "addr")
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "the shape that serde calls")]
pub fn hex<S: Serializer>(value: &impl LowerHex, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&format!("{value:#x}"))
}

fn empty<'de, D: Deserializer<'de>>(deserializer: D, field: &str, of: &str) -> Result<(), D::Error> {
    if Vec::<IgnoredAny>::deserialize(deserializer)?.is_empty() {
        return Ok(());
    }
    Err(D::Error::custom(format!(
        "{field}: {of} are aarch64's; guests here are x86_64, so none can be there"
    )))
}

pub fn reg_modifiers<'de, D: Deserializer<'de>>(deserializer: D) -> Result<(), D::Error> {
    empty(deserializer, "reg_modifiers", "these registers")
}

pub fn vcpu_features<'de, D: Deserializer<'de>>(deserializer: D) -> Result<(), D::Error> {
    empty(deserializer, "vcpu_features", "features asked for at KVM_ARM_VCPU_INIT")
}
