//! One virtual host is one QEMU process and one folder (its *seat*) in the user's state folder:
//!
//! ```text
//!   start ──▶ image (guest-images/build) ─▶ shares ─▶ identity ─▶ QEMU ─▶ "ready" on its console ─▶ ssh
//!   up    ──▶ the same, in a session of its own, on a data disk that stays
//!   stop  ──▶ power off over ssh ─▶ deadline ─▶ SIGTERM ─▶ deadline ─▶ SIGKILL
//! ```

mod accelerator;
mod error;
mod host;
mod identity;
mod machine;
mod options;
mod process;
mod seat;
mod shares;
mod ssh;

pub use accelerator::{Accelerator, choose_accelerator};
pub use error::{Error, Result};
pub use host::VirtualHost;
pub use options::{Data, HostOptions, repository_root};
pub use shares::{Share, workspace_shares};
