//! The worker: leases rows that are due and runs their steps.
//!
//! Most steps run in the very transaction of the call or the report that causes them. The worker is for what
//! comes with time (a host that does not answer, a deadline) and for what a crash left behind.

use super::{ATTEMPTS, Answer, Engine, errors};
use crate::lifecycle::{Draft, advance};
use roost_store::StoreError;
use roost_types::{InstanceId, Micros};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// Rows per sweep.
const BATCH: u32 = 200;
/// Longest sleep between two sweeps.
const PERIOD: Duration = Duration::from_secs(1);
/// Shortest sleep, so that a failing store is not asked without pause.
const PAUSE: Duration = Duration::from_millis(20);

impl Engine {
    /// Runs the step of every due row and returns how many. A row that cannot be written delays no
    /// other.
    ///
    /// # Errors
    /// If the store as a whole fails.
    pub fn sweep(&self) -> Answer<usize> {
        self.seal_month()?;
        let due = self.store.due(self.clock.now(), BATCH).map_err(errors::of_store)?;
        let mut ran = 0;
        for id in due.iter().filter(|id| !self.is_aside(id)) {
            self.settle(id, self.run_leased(id))?;
            ran += 1;
        }
        Ok(ran)
    }

    fn run_leased(&self, id: &InstanceId) -> Result<(), StoreError> {
        let now = self.clock.now();
        let leased = self.store.lease(id, &self.name, now, now + self.settings.lease);
        let Some(mut record) = leased? else { return Ok(()) };
        for _ in 0..ATTEMPTS {
            let alive = self.is_host_alive(record.row.host_id.as_ref())?;
            let view = self.view(&record.row, alive, now)?;
            let mut draft = Draft::new(record);
            advance(&mut draft, &view);
            let told = draft.is_change();
            let _points = draft.point().map(roost_halt::around);
            let mut change = draft.into_change()?;
            change.release_lease = true;
            match self.store.commit(&[change], now) {
                Ok(()) => {
                    if told {
                        self.changed.send_modify(|count| *count = count.wrapping_add(1));
                    }
                    return Ok(());
                }
                // A report or a call came first: we still hold the lease, so decide again on what it wrote.
                Err(StoreError::Stale(_)) => {}
                Err(error) => return Err(error),
            }
            match self.store.instance(id)? {
                Some(fresh) => record = fresh,
                None => return Ok(()),
            }
        }
        Ok(())
    }

    /// Sweeps whenever something is due, until `shutdown` turns true or its sender is gone. Every commit is whole,
    /// so it may also simply be dropped.
    pub async fn work(self: Arc<Self>, mut shutdown: watch::Receiver<bool>) {
        loop {
            let engine = Arc::clone(&self);
            let swept = tokio::task::spawn_blocking(move || engine.sweep_once()).await;
            let sleep = match swept {
                Ok(Ok(sleep)) => sleep,
                Ok(Err(error)) => {
                    tracing::error!(%error, "a sweep failed; it is tried again");
                    PERIOD
                }
                Err(error) => {
                    tracing::error!(%error, "a sweep broke off; it is tried again");
                    PERIOD
                }
            };
            tokio::select! {
                () = self.due.notified() => {}
                () = tokio::time::sleep(sleep) => {}
                _ = shutdown.wait_for(|stop| *stop) => return,
            }
        }
    }

    /// One sweep, and how long to sleep after it.
    fn sweep_once(&self) -> Answer<Duration> {
        let ran = self.sweep()?;
        let next = self.store.next_due().map_err(errors::of_store)?;
        let wait = next.map_or(PERIOD.as_micros(), |next| {
            let Micros(wait) = Micros(next.0.saturating_sub(self.clock.now().0));
            u128::try_from(wait).unwrap_or(0)
        });
        // Due rows that did not run are set aside: no reason for an immediate second pass.
        let wait = if ran == 0 && wait == 0 { PERIOD.as_micros() } else { wait };
        let wait = Duration::from_micros(u64::try_from(wait).unwrap_or(u64::MAX));
        Ok(wait.clamp(PAUSE, PERIOD))
    }
}
