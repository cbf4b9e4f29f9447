//! What the targets share: the guest's side of queues ([`guest`]), and the host's side as plain memory ([`host`]).
//!
//! | target | what is attacked | its input |
//! |---|---|---|
//! | `block`, `net`, `vsock`, `balloon`, `entropy`, `mem`, `pmem` | a device's queue logic | rings, descriptors and buffers, mostly valid |
//! | `mmio` | a device behind its registers | register accesses, ring contents, bells |
//! | `api` | the HTTP parser and every route before the build | bytes of a connection |
//! | `config`, `status` | the configuration, the status file | text |
//! | `kernel`, `qcow2`, `console`, `snapshot` | the loaders of a kernel, an image, a console ring, a snapshot's state | a file |
//! | `pages` | what `serve-memory` reads: a working set, and what a monitor says of its memory | text |

pub mod guest;
pub mod host;
