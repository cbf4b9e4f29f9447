//! The seal: once a month is over and every host has reported, the month's bill is final.
//!
//! A month is sealed as soon as every run that was open at its end is proved past it. If the other
//! hosts are silent, it is sealed [`EngineSettings::seal_after`] later. An interval without a proof
//! past the month's end is then cut: the interval ends at its last proof, and the next part begins
//! with the new month. An agent that comes back after that changes nothing before the seal.
//!
//! [`EngineSettings::seal_after`]: super::EngineSettings::seal_after

use super::{ATTEMPTS, Answer, Engine, errors};
use crate::lifecycle::Draft;
use roost_store::{InstanceFilter, InstanceRecord, InstanceRow, StoreError};
use roost_types::state::Step;
use roost_types::{InstanceId, Micros};

/// How often an unsealed month is checked.
const LOOK: Micros = Micros::from_secs(60);

/// Time that hosts have to report to this run of the controller before they count as silent.
const SETTLED: Micros = Micros::from_secs(600);

impl Engine {
    /// End of the newest sealed month.
    ///
    /// # Errors
    /// If the store fails.
    pub fn sealed(&self) -> Result<Micros, StoreError> {
        if let Some((sealed, _)) = self.remember().sealed {
            return Ok(sealed);
        }
        let sealed = self.store.sealed()?;
        Ok(self.remember().sealed.get_or_insert((sealed, false)).0)
    }

    /// Seals the past month once it can be sealed.
    pub(super) fn seal_month(&self) -> Answer<()> {
        let now = self.clock.now();
        let end = roost_billing::month_start(now);
        let known = self.sealed().map_err(errors::of_store)?;
        let cut = self.remember().sealed.is_some_and(|(_, cut)| cut);
        if known >= end && cut {
            return Ok(());
        }
        let monotonic = self.clock.monotonic();
        if self.remember().seal_looked.is_some_and(|looked| monotonic - looked < LOOK) {
            return Ok(());
        }
        self.remember().seal_looked = Some(monotonic);
        let (records, _) =
            self.store.readable_instances(&InstanceFilter::default()).map_err(errors::of_store)?;
        if known < end {
            let (mut unheard, mut talking) = (false, false);
            for InstanceRecord { row, .. } in &records {
                if self.may_change(row, end).map_err(errors::of_store)? {
                    unheard = true;
                    talking |= self.is_host_alive(row.host_id.as_ref()).map_err(errors::of_store)?;
                }
            }
            // A host that reports is waited for. If its runs are not past the end, the controller's
            // clock is ahead.
            let waited = now - end >= self.settings.seal_after && monotonic - self.began.1 >= SETTLED;
            if unheard && (talking || !waited) {
                return Ok(());
            }
            self.store.seal(end).map_err(errors::of_store)?;
            tracing::info!(until = %end, "bills up to here do not change any more");
        }
        // The seal is written first, and the intervals are cut after it: no event slips in between.
        let until = known.max(end);
        self.remember().sealed = Some((until, false));
        let mut whole = true;
        for record in records.iter().filter(|record| record.row.open_since.is_some_and(|open| open < until)) {
            let id = &record.row.instance_id;
            if !self.is_aside(id) {
                self.settle(id, self.cut(id, until))?;
            }
            whole &= !self.is_aside(id);
        }
        self.remember().sealed = Some((until, whole));
        Ok(())
    }

    /// Returns true if an instance's usage before `end` may still grow.
    fn may_change(&self, row: &InstanceRow, end: Micros) -> Result<bool, StoreError> {
        if row.open_since.is_some() {
            let proof = self.with_proofs(|proofs| proofs.get(row.instance_id.as_str()).copied())?;
            return Ok(row.open_since < Some(end) && proof < Some(end));
        }
        Ok(matches!(row.step, Step::Place | Step::Launch) && row.incarnation_at < end)
    }

    fn cut(&self, id: &InstanceId, until: Micros) -> Result<(), StoreError> {
        for _ in 0..ATTEMPTS {
            let Some(record) = self.store.instance(id)? else { return Ok(()) };
            let proof = self.with_proofs(|proofs| proofs.get(id.as_str()).copied())?;
            let mut draft = Draft::new(record);
            draft.seal(proof, until);
            if !draft.is_change() {
                return Ok(());
            }
            match self.store.commit(&[draft.into_change()?], self.clock.now()) {
                Err(StoreError::Stale(_)) => {}
                written => return written,
            }
        }
        Err(StoreError::Stale(id.clone()))
    }
}
