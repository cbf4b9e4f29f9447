//! Images (AMIs).

use crate::ids::{AccountId, BlobId, ImageId};
use crate::time::Micros;
use serde::{Deserialize, Serialize};

/// Makes an image of uploaded blobs. Administrators' images are public, others' are their own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegisterImage {
    /// Unique in the account.
    pub name: String,
    /// A sentence.
    #[serde(default)]
    pub description: String,
    /// Uploaded kernel.
    pub kernel: BlobId,
    /// Uploaded initial RAM disk.
    #[serde(default)]
    pub initrd: Option<BlobId>,
    /// Uploaded raw root disk.
    pub root: BlobId,
    /// Size of the root disk in bytes, uncompressed.
    pub root_bytes: u64,
    /// Kernel command line.
    pub boot_args: String,
    /// The login that gets the key pair.
    pub default_user: String,
    /// Whether instances of the image run an ssh server, which needs a key pair; absent if unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ssh: Option<bool>,
}

/// An image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Its id.
    pub image_id: ImageId,
    /// Its owner.
    pub owner: AccountId,
    /// Its name.
    pub name: String,
    /// A sentence.
    pub description: String,
    /// Whether every account may launch it.
    pub public: bool,
    /// Smallest root volume, in GiB.
    pub min_volume_gib: u64,
    /// Kernel command line.
    pub boot_args: String,
    /// The login that gets the key pair.
    pub default_user: String,
    /// Whether instances of the image run an ssh server, which needs a key pair; absent if unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ssh: Option<bool>,
    /// When it was registered.
    pub created_at: Micros,
}

/// Lists images that the caller may launch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DescribeImages {}

/// Images.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Images {
    /// By name.
    pub images: Vec<Image>,
}

/// Withdraws an image: nothing new can be launched from it; what runs goes on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeregisterImage {
    /// Its id or its name.
    pub image: String,
}
