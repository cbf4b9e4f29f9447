//! The life of an instance as pure functions over its rows. Nothing here reads a clock, a database or a network.
//!
//! ```text
//!   api call ───── accept::{start, stop, reboot, terminate, retype} ─┐
//!   agent's report ─ observe: what is new, dated by our clock ───────┼─→ Draft ─→ one Change, one transaction
//!   any of both, or time ─ advance: step, hop, step … until a nap ───┘
//!
//!   Place ──host answers──→ Launch ──vCPUs run──→ Run ──ended, or asked to──→ Stop ──nothing runs──→ Rest
//!     └─ no answer ─┐          └─ failed ─┐        └─ host rebooted: Stop, Rest, Place in one transaction,
//!                   ▼                     ▼           as a new incarnation
//!          first start: Terminate;  restart: Stop                  … ──terminate──→ Terminate ──absent──→ Gone
//! ```
//! A step is a function `(row, view) → StepOutcome`; [`Draft::apply`] is the only place that changes a step, and it
//! checks every hop against [`roost_types::Step::TRANSITIONS`]. There is no undo: a failed launch is terminated
//! like any other instance.
//!
//! # What is billed
//! An interval opens when the virtual CPUs began to run, in the transaction that makes the instance `running`. The
//! moment at which its end was asked for is written to the row (`bill_until`) in the transaction that makes it
//! `stopping` or `shutting-down`, and nothing after it is ever billed. The closing event follows in the transaction
//! in which the agent's word on the end arrives, and dates the *earlier* of the two ends. So an
//! instance that had already died unseen when its owner stopped it is not billed until the call, and one whose
//! agent was away for a minute but that ran on is not given a minute for free. Until then the open interval
//! reaches to its last proof of life, as for every open interval. See [`meter`].

pub mod accept;
pub mod adopt;
pub mod draft;
pub mod meter;
pub mod observe;
pub mod spec;
pub mod step;

pub use draft::{Draft, Limits, View, advance};
pub use step::{StepOutcome, step};
