//! Snapshots: a paused machine as two files, from which any number of machines go on.
//!
//! ```text
//!   state file    magic · version · length · checksum · the machine's state as JSON
//!   memory file   RAM, region by region, holes where there is nothing; then one page that says whose memory this is
//! ```
//! A full snapshot has every page. A diff snapshot has the pages that were written since the snapshot before it (since the start,
//! everything); put on top of that one's memory file ([`rebase`]), it is a full one.
//!
//! A machine that is loaded maps the memory file privately: pages are read when they are touched, clones share what none of them
//! has written, and the file is never written. It must not change while such a machine lives.
//!
//! Memory can also come from a program that answers page faults ([`lazy`]).
//!
//! Both files are on stable storage when the request that made them is answered.

mod format;
pub mod lazy;
pub(crate) mod memory_file;
pub mod requests;
mod state;

pub use format::{VERSION, frame};
pub use memory_file::{MemoryFile, Pages, rebase};
pub use state::{SavedMachine, read, write};
