//! Rows that cannot be written are set aside. Each is retried after 1 s, 2 s, 4 s … up to 64 s and
//! reported to administrators. No other row waits for it.

use super::memory::SetAside;
use super::{Answer, Engine, errors};
use crate::lifecycle::step::back_off;
use roost_store::{Change, StoreError};
use roost_types::InstanceId;

/// Outcome of writing one row.
pub enum Written {
    /// The row is up to date.
    Done,
    /// This row cannot be written.
    Faulty(StoreError),
}

impl Engine {
    /// Sorts a row's result: a fault of the row sets the row aside, a fault of the store is
    /// returned.
    pub(super) fn settle(&self, id: &InstanceId, written: Result<(), StoreError>) -> Answer<()> {
        match one_row(written)? {
            Written::Done => drop(self.remember().set_aside.remove(id.as_str())),
            Written::Faulty(error) => self.set_aside(id, &error),
        }
        Ok(())
    }

    /// Returns true if a row is set aside now.
    pub(super) fn is_aside(&self, id: &InstanceId) -> bool {
        self.remember().is_aside(id.as_str(), self.clock.monotonic())
    }

    pub(super) fn set_aside(&self, id: &InstanceId, error: &StoreError) {
        let why = error.to_string();
        let mut memory = self.remember();
        let tries = memory.set_aside.get(id.as_str()).map_or(0, |aside| aside.tries).saturating_add(1);
        let wait = back_off(tries - 1);
        let until = self.clock.monotonic() + wait;
        memory.set_aside.insert(id.to_string(), SetAside { tries, until, why: why.clone() });
        drop(memory);
        tracing::error!(instance = %id, tries, error = %why, "its row cannot be written; the others go on");
        // The owner sees the reason too, if the row accepts that much.
        if let Ok(Some(mut record)) = self.store.instance(id) {
            let row = &mut record.row;
            row.trouble = Some(format!("the controller cannot write down what happens to it: {why}"));
            row.not_before = row.not_before.max(self.clock.now() + wait);
            if let Err(error) = self.store.commit(&[Change::of(record.row)], self.clock.now()) {
                tracing::debug!(instance = %id, %error, "nor can that be told to its owner");
            }
        }
    }
}

/// Distinguishes a fault of one row from a fault of the store.
fn one_row(written: Result<(), StoreError>) -> Answer<Written> {
    match written {
        Ok(()) => Ok(Written::Done),
        Err(error) if errors::is_of_one_row(&error) => Ok(Written::Faulty(error)),
        Err(error) => Err(errors::of_store(error)),
    }
}
