//! What the targets share: the guest's side of queues ([`guest`]), and the host's side as plain memory ([`host`]).
//!
//! | target | what is attacked | its input |
//! |---|---|---|
//! | `block`, `net`, `vsock`, `balloon`, `entropy` | a device's queue logic | rings, descriptors and buffers, mostly valid |
//! | `mmio` | a device behind its registers | register accesses, ring contents, bells |
//! | `api` | the HTTP parser and every route before the build | bytes of a connection |
//! | `config`, `status` | the configuration, the status file | text |
//! | `kernel`, `qcow2`, `console` | the loaders of a kernel, an image, a console ring | a file |
//!
//! A snapshot's state file gets a target like `console` when there are snapshots.

pub mod guest;
pub mod host;
