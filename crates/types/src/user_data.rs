//! Forms of user data that an image may not run.

use crate::state::{UnknownName, named_enum};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

named_enum! {
    /// A form of user data that a guest did not run. A guest can report these forms only.
    UserDataForm, "form of user data" {
        /// `#cloud-config`.
        CloudConfig = "cloud-config",
        /// `#cloud-config-archive`.
        CloudConfigArchive = "cloud-config-archive",
        /// MIME.
        Multipart = "multipart",
        /// `#cloud-boothook`.
        CloudBoothook = "cloud-boothook",
        /// `#include` and `#include-once`.
        Include = "include",
        /// `#part-handler`.
        PartHandler = "part-handler",
        /// `## template: jinja`.
        JinjaTemplate = "jinja-template",
        /// UTF-8 with a byte order mark.
        ByteOrderMark = "byte-order-mark",
        /// gzip that cannot be unpacked.
        DamagedGzip = "damaged-gzip",
        /// A first line that names a missing program.
        NoInterpreter = "no-interpreter",
        /// Any other form.
        Unknown = "unknown",
    }
}

impl UserDataForm {
    /// The reason, and the advice.
    #[must_use]
    pub fn why_not_run(self) -> String {
        match self {
            Self::ByteOrderMark => {
                "it begins with a byte order mark; save it as UTF-8 without one".to_owned()
            }
            Self::DamagedGzip => "its gzip data is damaged or unpacks to more than 16 MiB".to_owned(),
            Self::NoInterpreter => "the program that its first line names is not in this image".to_owned(),
            Self::Unknown => {
                "its first line is not \"#!\" and a program, and no form that is known".to_owned()
            }
            form => format!("{form} needs an image with cloud-init, such as debian-12"),
        }
    }
}
