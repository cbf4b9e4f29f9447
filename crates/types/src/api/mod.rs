//! CLI ↔ controller: `POST /v1/ACTION` with a JSON body, signed with SigV4 (service `roost`).
//!
//! Names are EC2's. A failure is an [`crate::error::ErrorBody`] with EC2's code. Besides the actions:
//!
//! ```text
//! PUT /v1/blobs/BLOB                                     upload a zstd-compressed file; BLOB = its SHA-256, signed
//! HEAD /v1/blobs/BLOB                                    is it there already?
//! GET /v1/instances/ID/console?offset=N&follow=B&input=B (Upgrade: roost-stream)  as StreamTarget::Console
//! GET /v1/instances/ID/tcp/PORT                          (Upgrade: roost-stream)  as StreamTarget::Tcp
//! GET /v1/health                                         unsigned: is the controller up?
//! ```

mod accounts;
mod bill;
mod capacity;
mod images;
mod instances;
mod keys;
mod volumes;

pub use accounts::*;
pub use bill::*;
pub use capacity::*;
pub use images::*;
pub use instances::*;
pub use keys::*;
pub use volumes::*;

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Most instances that one launch may ask for.
pub const MAX_LAUNCH_COUNT: u32 = 1000;
/// Most bytes of user data before base64, as on EC2.
pub const MAX_USER_DATA: usize = 16 * 1024;
/// Service name in the credential scope of a signature.
pub const SIGNING_SERVICE: &str = "roost";

/// An action: its name on the wire, its request and its response.
pub trait Action: Serialize + for<'de> Deserialize<'de> {
    /// The last segment of the path.
    const NAME: &'static str;
    /// What a success answers.
    type Response: Serialize + for<'de> Deserialize<'de>;
}

macro_rules! actions {
    ($($request:ident => $response:ty;)*) => {
        $(impl Action for $request {
            const NAME: &'static str = stringify!($request);
            type Response = $response;
        })*
        /// Every action there is.
        pub const ACTIONS: &[&str] = &[$(stringify!($request)),*];
    };
}

actions! {
    GetCallerIdentity => CallerIdentity;
    CreateAccount => NewAccount;
    DescribeAccounts => Accounts;
    CreateKeyPair => NewKeyPair;
    ImportKeyPair => KeyPair;
    DescribeKeyPairs => KeyPairs;
    DeleteKeyPair => Done;
    RegisterImage => Image;
    DescribeImages => Images;
    DeregisterImage => Done;
    DescribeInstanceTypes => InstanceTypes;
    DescribeHosts => Hosts;
    EndOrphan => Done;
    RunInstances => Reservation;
    DescribeInstances => Instances;
    StartInstances => StateChanges;
    StopInstances => StateChanges;
    RebootInstances => Done;
    TerminateInstances => StateChanges;
    ModifyInstanceType => Done;
    DescribeInstanceTiming => InstanceTiming;
    DescribeVolumes => Volumes;
    GetBill => Bill;
}

/// Tags of a resource.
pub type Tags = BTreeMap<String, String>;

/// Nothing to say but that it is done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::time::Micros;

    #[test]
    fn an_unknown_parameter_is_refused_by_name() {
        let error = serde_json::from_str::<StopInstances>(r#"{"instance_ids":[],"fore":true}"#).unwrap_err();
        assert!(error.to_string().contains("`fore`"), "{error}");
    }

    #[test]
    fn secrets_do_not_show_in_debug_output() {
        let account = NewAccount {
            account: Account {
                account_id: "123456789012".parse().unwrap(),
                name: "a".into(),
                admin: false,
                created_at: Micros(0),
            },
            access_key_id: "AKIA".into(),
            secret_access_key: "hush".into(),
        };
        assert!(!format!("{account:?}").contains("hush"));
    }
}
