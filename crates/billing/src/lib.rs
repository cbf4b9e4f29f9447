//! Usage log + price book + window → charges. Pure: no I/O, no clock; the same log gives the same bytes, in
//! whatever order its events come.
//!
//! ```text
//! usage log ──→ intervals (one per resource, meter and part of a start)      interval.rs
//!                  │ a second belongs to the moment at which it begins, and begun seconds count;
//!                  │ a start's 60 s minimum belongs, whole, to the moment of the start; its parts share it
//!                  ▼
//!               pieces, cut at the window, at price changes and, for volumes, at month ends
//!                  │
//!                  ▼
//!               lines (resource, meter, sku, price, month): exact sum × exact rate, rounded once, half to even
//!                  │                                                bill.rs
//!                  ▼
//!               groups: sums of lines, so that every grouping has the same total
//! ```
//! Whatever is cut (a window in two, a month from the next) adds up again exactly in seconds,
//! because each piece is the difference of one cumulative count at its two ends. The charge up to a
//! moment changes only by events before it, or by later proofs of open intervals. The controller
//! seals a month, and writes neither after that.

#![forbid(unsafe_code)]

mod bill;
mod calendar;
mod interval;
mod prices;

pub use bill::bill;
pub use calendar::{month_start, parse_moment};
pub use interval::{MINIMUM_SECONDS, Seconds, seconds};
pub use prices::{PriceBook, PriceError};
