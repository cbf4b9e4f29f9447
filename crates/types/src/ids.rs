//! Typed ids that look like EC2's: a prefix and 17 hex digits (`i-0123456789abcdef0`).
//!
//! Requests may also carry the 8-digit form of old scripts: it parses, and is then simply not found.
//! An id of the right type with the wrong shape is *malformed*, which EC2 tells apart from *not found*.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Bytes of randomness that one id takes: 9 bytes give 18 hex digits, of which 17 are used.
pub const ID_BYTES: usize = 9;

/// An id text that does not have its type's shape.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("malformed {what} id {value:?}: expected {prefix:?} followed by 17 hexadecimal digits")]
pub struct MalformedId {
    /// What the id should have named, such as `instance`.
    pub what: &'static str,
    /// The prefix that this id type has.
    pub prefix: &'static str,
    /// The text as it came.
    pub value: String,
}

fn hex17(random: [u8; ID_BYTES]) -> String {
    use std::fmt::Write;
    let mut text = random.iter().fold(String::with_capacity(18), |mut acc, byte| {
        let _ = write!(acc, "{byte:02x}");
        acc
    });
    text.truncate(17);
    text
}

fn is_hex(text: &str) -> bool {
    matches!(text.len(), 8 | 17) && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident, $prefix:literal, $what:literal;)*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The prefix of every such id.
            pub const PREFIX: &'static str = $prefix;

            /// Makes an id from random bytes.
            pub fn from_random(random: [u8; ID_BYTES]) -> Self {
                Self(format!("{}{}", $prefix, hex17(random)))
            }

            /// The whole id as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }

            /// The hexadecimal digits after the prefix.
            pub fn digits(&self) -> &str {
                &self.0[$prefix.len()..]
            }
        }

        impl FromStr for $name {
            type Err = MalformedId;
            fn from_str(text: &str) -> Result<Self, MalformedId> {
                match text.strip_prefix($prefix) {
                    Some(digits) if is_hex(digits) => Ok(Self(text.to_owned())),
                    _ => Err(MalformedId { what: $what, prefix: $prefix, value: text.to_owned() }),
                }
            }
        }

        impl TryFrom<String> for $name {
            type Error = MalformedId;
            fn try_from(text: String) -> Result<Self, MalformedId> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    )*};
}

ids! {
    /// An instance: one virtual machine over its whole life.
    InstanceId, "i-", "instance";
    /// A reservation: what one launch call made.
    ReservationId, "r-", "reservation";
    /// An image (AMI).
    ImageId, "ami-", "image";
    /// A key pair.
    KeyPairId, "key-", "key pair";
    /// A volume.
    VolumeId, "vol-", "volume";
    /// A snapshot of a volume.
    SnapshotId, "snap-", "snapshot";
    /// A virtual private cloud.
    VpcId, "vpc-", "VPC";
    /// A subnet of a VPC.
    SubnetId, "subnet-", "subnet";
    /// A network interface (ENI).
    InterfaceId, "eni-", "network interface";
    /// A security group.
    SecurityGroupId, "sg-", "security group";
    /// A host: one machine with one agent.
    HostId, "h-", "host";
}

/// An account (tenant): 12 decimal digits.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct AccountId(String);

impl AccountId {
    /// Makes an account id from random bytes: twelve digits, the first never 0.
    pub fn from_random(random: [u8; 8]) -> Self {
        let number = 100_000_000_000 + u64::from_le_bytes(random) % 900_000_000_000;
        Self(number.to_string())
    }

    /// The twelve digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for AccountId {
    type Err = MalformedId;
    fn from_str(text: &str) -> Result<Self, MalformedId> {
        if text.len() == 12 && text.bytes().all(|b| b.is_ascii_digit()) {
            Ok(Self(text.to_owned()))
        } else {
            Err(MalformedId { what: "account (12 decimal digits)", prefix: "", value: text.to_owned() })
        }
    }
}

impl TryFrom<String> for AccountId {
    type Error = MalformedId;
    fn try_from(text: String) -> Result<Self, MalformedId> {
        text.parse()
    }
}

impl From<AccountId> for String {
    fn from(id: AccountId) -> String {
        id.0
    }
}

impl fmt::Display for AccountId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A blob in the controller's image store: the SHA-256 of the (compressed) bytes, 64 hex digits.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct BlobId(String);

impl BlobId {
    /// Makes the id from a SHA-256 digest.
    pub fn from_sha256(digest: [u8; 32]) -> Self {
        use std::fmt::Write;
        Self(digest.iter().fold(String::with_capacity(64), |mut acc, byte| {
            let _ = write!(acc, "{byte:02x}");
            acc
        }))
    }

    /// The 64 hex digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for BlobId {
    type Err = MalformedId;
    fn from_str(text: &str) -> Result<Self, MalformedId> {
        if text.len() == 64 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
            Ok(Self(text.to_owned()))
        } else {
            Err(MalformedId { what: "blob (64 hexadecimal digits)", prefix: "", value: text.to_owned() })
        }
    }
}

impl TryFrom<String> for BlobId {
    type Error = MalformedId;
    fn try_from(text: String) -> Result<Self, MalformedId> {
        text.parse()
    }
}

impl From<BlobId> for String {
    fn from(id: BlobId) -> String {
        id.0
    }
}

impl fmt::Display for BlobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_has_its_prefix_and_seventeen_digits_and_parses_back() {
        let id = InstanceId::from_random([0xab; 9]);
        assert_eq!(id.as_str(), "i-abababababababaab".replace("baab", "baba").as_str());
        assert_eq!(id.digits().len(), 17);
        assert_eq!(id.as_str().parse::<InstanceId>().unwrap(), id);
    }

    #[test]
    fn the_old_eight_digit_form_is_well_formed() {
        assert!("i-1234abcd".parse::<InstanceId>().is_ok());
    }

    #[test]
    fn other_shapes_are_malformed_and_say_what_is_expected() {
        for bad in ["", "i-", "i-xyz", "i-0123456789ABCDEF0", "vol-0123456789abcdef0", "i-0123456789abcdef01"]
        {
            let error = bad.parse::<InstanceId>().unwrap_err();
            assert!(error.to_string().contains("17 hexadecimal digits"), "{error}");
        }
    }

    #[test]
    fn account_ids_are_twelve_digits_for_any_random_bytes() {
        for random in [[0; 8], [0xff; 8], [7; 8]] {
            let id = AccountId::from_random(random);
            assert_eq!(id.as_str().parse::<AccountId>().unwrap(), id);
        }
        assert!("12345678901".parse::<AccountId>().is_err());
    }

    #[test]
    fn serde_refuses_a_malformed_id() {
        assert!(serde_json::from_str::<VolumeId>("\"vol-0123456789abcdef0\"").is_ok());
        assert!(serde_json::from_str::<VolumeId>("\"../etc/passwd\"").is_err());
    }
}
