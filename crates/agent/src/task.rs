//! One task per instance: look, plan, do one thing, again. It holds no state that it could not read again from the
//! records and the host, apart from how long a guest has been asked to power off.

use crate::error::{Error, Result};
use crate::host::{Facts, Host, MonitorFact};
use crate::plan::{self, Action, Deadlines, Power};
use crate::record::{Accepted, Ended, Records, Run};
use crate::scan::{Said, Scan};
use roost_types::agent::{InstanceSpec, Observed, StateReason, TimedPart};
use roost_types::state::DesiredState;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, watch};

/// How long things may take.
#[derive(Debug, Clone)]
pub struct Pace {
    /// From the power button to the kill.
    pub stop_grace: Duration,
    /// How long until the power button is pressed again: a guest that is still booting does not hear it, and neither
    /// the monitor nor the guest remembers that it was pressed.
    pub press_again: Duration,
    /// Time limit of a call to a monitor; the client's own limit is shorter.
    pub answer: Duration,
    /// How often a running guest is looked after.
    pub tick: Duration,
    /// Longest time from a monitor's end to the next monitor's vCPUs, in a reboot.
    pub restart: Duration,
    /// Least time between two host keys of one run.
    pub host_key: Duration,
    /// First pause after a failure; doubles up to `retry_max`.
    pub retry_first: Duration,
    /// Longest pause after a failure.
    pub retry_max: Duration,
    /// How old the durable "last seen alive" may get.
    pub last_seen: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            stop_grace: Duration::from_secs(60),
            press_again: Duration::from_secs(3),
            answer: Duration::from_secs(90),
            tick: Duration::from_millis(500),
            restart: Duration::from_secs(60),
            host_key: Duration::from_secs(60),
            retry_first: Duration::from_millis(250),
            retry_max: Duration::from_secs(15),
            last_seen: Duration::from_secs(5),
        }
    }
}

/// What the report is made from: written by the task and by whoever takes in `ensure`.
#[derive(Debug, Clone)]
pub struct Live {
    /// The newest accepted `ensure`.
    pub accepted: Accepted,
    /// Refusal of the newest `ensure`, if it was refused.
    pub refused: Option<String>,
    /// What became of the incarnation at hand, as it is on disk.
    pub run: Run,
    /// What it is.
    pub state: Observed,
    /// Since when, nanoseconds of CLOCK_BOOTTIME.
    pub since_ns: u64,
    /// Why, for `stopped` and `failed`.
    pub reason: Option<StateReason>,
    /// What failed last and is being tried again.
    pub trouble: Option<String>,
}

/// The handles that a task shares with the agent.
#[derive(Debug, Clone)]
pub struct Shared {
    /// See [`Live`].
    pub live: Arc<Mutex<Live>>,
    /// Rings when there is something new to do.
    pub wake: Arc<Notify>,
    /// Bumped whenever a report would differ.
    pub changed: Arc<watch::Sender<u64>>,
}

impl Shared {
    /// The live part. A panic elsewhere while it was held leaves it readable.
    pub fn live(&self) -> MutexGuard<'_, Live> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says that a report would differ now.
    pub fn bump(&self) {
        self.changed.send_modify(|version| *version += 1);
    }
}

/// That a guest has been asked to power off.
#[derive(Debug, Clone, Copy)]
struct Asked {
    /// For the sake of what.
    wanted: DesiredState,
    /// Since when it has known, or could have.
    since: Instant,
    /// When its button was pressed last; none: the monitor has not taken it yet.
    pressed: Option<Instant>,
}

/// The task of one instance.
pub struct Task<H: Host> {
    host: Arc<H>,
    records: Records,
    shared: Shared,
    pace: Pace,
    /// When this task began: the time before, without an agent, delayed no monitor.
    begun_ns: u64,
    asked: Option<Asked>,
    saw_alive: bool,
    /// CLOCK_BOOTTIME of the last look that showed the monitor alive, in nanoseconds.
    seen_ns: u64,
    failures: u32,
    scan: Scan,
    scanned: Option<u64>,
    /// When this run's newest host key was recorded.
    key_taken: Option<Instant>,
    /// The newest host key that the guest printed, until it is recorded.
    key_said: Option<String>,
}

impl<H: Host> Task<H> {
    /// A task; [`Task::run`] does the work.
    pub fn new(host: Arc<H>, records: Records, shared: Shared, pace: Pace) -> Self {
        Self {
            begun_ns: host.now_ns(),
            host,
            records,
            shared,
            pace,
            asked: None,
            saw_alive: false,
            seen_ns: 0,
            failures: 0,
            scan: Scan::default(),
            scanned: None,
            key_taken: None,
            key_said: None,
        }
    }

    /// Works until nothing of the instance is left.
    pub async fn run(mut self) {
        loop {
            let accepted = self.shared.live().accepted.clone();
            let mut run = self.shared.live().run.clone();
            let outcome = self.step(&accepted, &mut run).await;
            let pause = match outcome {
                Ok(Next::Gone) => return,
                Ok(Next::Again) => {
                    self.failures = 0;
                    self.trouble(None);
                    continue;
                }
                Ok(Next::Rest(pause)) => {
                    self.failures = 0;
                    self.trouble(None);
                    pause
                }
                Err(error) => self.failed(&accepted, &mut run, &error),
            };
            let monitor = run.monitor.clone().filter(|_| self.saw_alive);
            tokio::select! {
                () = self.shared.wake.notified() => {}
                () = tokio::time::sleep(pause) => {}
                () = async {
                    match &monitor {
                        Some(monitor) => self.host.ended(&accepted, monitor).await,
                        None => std::future::pending().await,
                    }
                } => {}
            }
        }
    }

    fn failed(&mut self, accepted: &Accepted, run: &mut Run, error: &Error) -> Duration {
        let text = error.chain();
        tracing::warn!(instance = %accepted.id(), error = %text, "a step failed");
        // A permanent error ends the start, or the run that is being rebooted. A clean-up is
        // retried without limit.
        let starting = accepted.spec().desired == DesiredState::Running
            && run.incarnation == accepted.spec().incarnation
            && (!run.is_open() || run.restart_ns.is_some());
        if error.is_permanent() && starting && run.ended.is_none() {
            let open = run.is_open();
            run.ended = Some(if open { plan::not_restarted(run, &text) } else { plan::failed(text.clone()) });
            if let Err(error) = self.note(accepted, run) {
                tracing::error!(instance = %accepted.id(), error = %error.chain(), "cannot write run.json");
            }
            return Duration::ZERO;
        }
        self.trouble(Some(text));
        let pause = self.pace.retry_first.saturating_mul(1 << self.failures.min(16)).min(self.pace.retry_max);
        self.failures += 1;
        pause
    }

    async fn step(&mut self, accepted: &Accepted, run: &mut Run) -> Result<Next> {
        let begin = self.host.now_ns();
        let facts = self.host.look(accepted, run).await?;
        let alive = matches!(facts.monitor, MonitorFact::Alive { .. });
        self.saw_alive |= alive;
        if alive {
            self.seen_ns = begin;
        }
        let spec = accepted.spec();
        run.volume_made |= accepted.ensure.volume_made;
        let power = self.power(spec, alive);
        let late = plan::restarts(spec, run, &facts).then(|| self.restart_overdue(run)).flatten();
        let action = plan::plan(spec, run, &facts, Deadlines { power, restart: late.as_deref() });
        self.show(spec, run, &facts, &action);
        if !matches!(action, Action::Rest(_)) {
            tracing::debug!(instance = %accepted.id(), ?action, "next");
        }
        self.execute(accepted, run, action).await
    }

    async fn execute(&mut self, accepted: &Accepted, run: &mut Run, action: Action) -> Result<Next> {
        let host = Arc::clone(&self.host);
        match action {
            Action::Begin => {
                *run = Run::begin(accepted.spec(), &host.boot_id(), run);
                self.scanned = None;
                self.note(accepted, run)?;
            }
            Action::Fetch => timed(run, "agent.fetch", host.fetch(accepted)).await?,
            Action::MakeDisk => timed(run, "agent.disk", host.make_disk(accepted)).await?,
            Action::MakeNetwork => timed(run, "agent.network", host.make_network(accepted)).await?,
            Action::MakeCgroup => timed(run, "agent.cgroup", host.make_cgroup(accepted)).await?,
            Action::StartMonitor => {
                let started = host.start_monitor(accepted).await?;
                run.boot_id = host.boot_id();
                run.monitor = Some(started.monitor);
                // It has just said that its machine is built.
                self.saw_alive = true;
                run.console_from = started.console_from;
                // The mark is durable before the guest can write its first byte.
                run.volume_made = true;
                run.guest_ready = false;
                for part in started.timing {
                    keep(run, part);
                }
                self.scanned = None;
                self.key_taken = None;
                self.key_said = None;
                self.note(accepted, run)?;
            }
            Action::LetRun => {
                let Some(monitor) = run.monitor.clone() else { return Ok(Next::Again) };
                let start = timed(run, "monitor.start", host.let_run(accepted, &monitor));
                let Some(began) = self.answer(self.pace.answer, start).await? else { return Ok(Next::Again) };
                if run.began_ns.is_none() {
                    run.began_ns = Some(began);
                }
                run.last_seen_ns = Some(host.now_ns());
                run.restart_ns = None;
                self.note(accepted, run)?;
            }
            Action::NoteBegan(at) => {
                run.began_ns = Some(at);
                self.note(accepted, run)?;
            }
            Action::NoteFailedStart(why) => self.note_failed_start(accepted, run, &why)?,
            Action::NoteReboot => {
                tracing::info!(instance = %accepted.id(), "rebooting: the monitor starts again");
                run.reboots_done = accepted.spec().reboots;
                run.restart_ns = Some(host.now_ns());
                run.monitor = None;
                run.guest_ready = false;
                self.over();
                self.note(accepted, run)?;
            }
            Action::NoteEnded(ended) => self.note_ended(accepted, run, ended)?,
            Action::PowerOff => return self.power_off(accepted).await,
            Action::Kill => {
                host.kill(accepted).await?;
                self.asked = None;
            }
            Action::TearDown => host.tear_down(accepted).await?,
            Action::RemoveDisk => host.remove_disk(accepted).await?,
            Action::Forget => {
                self.records.remove(accepted.id())?;
                self.set_state(Observed::Absent, None, None);
                return Ok(Next::Gone);
            }
            Action::Rest(Observed::Running) => return self.look_after(accepted, run),
            Action::Rest(_) => return Ok(Next::Rest(Duration::from_secs(3600))),
        }
        self.keep_in_memory(run);
        Ok(Next::Again)
    }

    fn note_failed_start(&mut self, accepted: &Accepted, run: &mut Run, why: &str) -> Result<()> {
        run.monitor = None;
        run.boot_id = self.host.boot_id();
        run.failed_starts += 1;
        self.over();
        if run.failed_starts >= plan::START_ATTEMPTS {
            run.ended = Some(plan::failed(format!(
                "the monitor ended {} times before the guest ran, lastly: {why}",
                run.failed_starts
            )));
        }
        self.note(accepted, run)?;
        if run.ended.is_none() && accepted.spec().desired == DesiredState::Running {
            return Err(Error::NotNow(format!("the monitor ended before the guest ran: {why}")));
        }
        Ok(())
    }

    fn note_ended(&mut self, accepted: &Accepted, run: &mut Run, mut ended: Ended) -> Result<()> {
        let now = self.host.now_ns();
        // The end is dated by the monitor, between the last look that showed it alive and now.
        // Without a date of the monitor's, the end is now if this agent started it or saw it alive.
        // Otherwise nobody knows the end.
        let seen = self.seen_ns.max(run.last_seen_ns.unwrap_or(0));
        ended.at_ns = ended.at_ns.map(|at| at.max(seen).min(now)).or_else(|| self.saw_alive.then_some(now));
        if run.ended.is_none() {
            run.cpu_usage_us = self.host.cpu_usage_us(accepted).or(run.cpu_usage_us);
            run.ended = Some(ended);
        }
        run.monitor = None;
        self.over();
        self.records.save_run(accepted.id(), run)?;
        // An end and its reason are reported together: an end without a reason reads as the guest's
        // own.
        let spec = accepted.spec();
        let state =
            if run.incarnation == spec.incarnation { Observed::Stopping } else { self.shared.live().state };
        self.set_state(state, reason(spec, run, state), Some(run));
        self.shared.bump();
        Ok(())
    }

    fn over(&mut self) {
        self.asked = None;
        self.saw_alive = false;
    }

    /// What the guest has been asked, given what is wanted now.
    fn power(&mut self, spec: &InstanceSpec, alive: bool) -> Power {
        // A stop that overtakes a reboot (or the other way round) asks anew; so does a new monitor.
        if !alive || self.asked.is_some_and(|asked| asked.wanted != spec.desired) {
            self.asked = None;
        }
        match self.asked {
            None => Power::NotAsked,
            Some(asked) if asked.since.elapsed() < self.pace.stop_grace => Power::Waiting,
            Some(_) => Power::Overdue,
        }
    }

    /// The last error, if a reboot's new monitor is overdue.
    fn restart_overdue(&self, run: &Run) -> Option<String> {
        let waited = self.host.now_ns().saturating_sub(run.restart_ns?.max(self.begun_ns));
        let last =
            self.shared.live().trouble.clone().unwrap_or_else(|| "its monitor did not run in time".into());
        (u128::from(waited) >= self.pace.restart.as_nanos())
            .then(|| format!("within {} s: {last}", self.pace.restart.as_secs()))
    }

    async fn power_off(&mut self, accepted: &Accepted) -> Result<Next> {
        let now = Instant::now();
        let wanted = accepted.spec().desired;
        let mut asked = *self.asked.get_or_insert(Asked { wanted, since: now, pressed: None });
        if asked.pressed.is_none_or(|at| at.elapsed() >= self.pace.press_again) {
            // Recorded before the call: a press without an answer counts as one.
            asked.pressed = Some(now);
            self.asked = Some(asked);
            let left = self.pace.stop_grace.saturating_sub(asked.since.elapsed());
            // A monitor that refuses the press is asked again after the usual pause, and killed
            // after the grace.
            match self.answer(left.min(self.pace.answer), self.host.press_power(accepted)).await {
                Ok(Some(())) => {}
                Ok(None) => return Ok(Next::Again),
                Err(error) => {
                    self.asked = Some(Asked { pressed: None, ..asked });
                    return Err(error);
                }
            }
        }
        let left = self.pace.stop_grace.saturating_sub(asked.since.elapsed()).min(self.pace.press_again);
        Ok(Next::Rest(left.max(Duration::from_millis(1))))
    }

    /// A monitor's answer. Returns `None` if the instance has news first, or the limit passes
    /// without an answer. A compromised monitor must not delay its own kill.
    async fn answer<T>(&self, limit: Duration, call: impl Future<Output = Result<T>>) -> Result<Option<T>> {
        tokio::select! {
            biased;
            answer = call => answer.map(Some),
            () = self.shared.wake.notified() => Ok(None),
            () = tokio::time::sleep(limit) => Ok(None),
        }
    }

    /// A running guest: note that it lives, and listen to its console.
    fn look_after(&mut self, accepted: &Accepted, run: &mut Run) -> Result<Next> {
        let now = self.host.now_ns();
        let mut durable = run
            .last_seen_ns
            .is_none_or(|seen| u128::from(now.saturating_sub(seen)) >= self.pace.last_seen.as_nanos());
        durable |= self.listen(accepted, run) | run.restart_ns.take().is_some();
        if durable {
            run.last_seen_ns = Some(now);
            run.cpu_usage_us = self.host.cpu_usage_us(accepted).or(run.cpu_usage_us);
            self.records.save_run(accepted.id(), run)?;
        }
        let news = {
            let mut live = self.shared.live();
            let told = |run: &Run| (run.guest_ready, run.ssh_host_key.clone(), run.user_data_not_run);
            let news = told(&live.run) != told(run);
            live.run = run.clone();
            news
        };
        if news {
            self.shared.bump();
        }
        Ok(Next::Rest(self.pace.tick))
    }

    fn listen(&mut self, accepted: &Accepted, run: &mut Run) -> bool {
        let from = self.scanned.unwrap_or(run.console_from);
        let Some((bytes, next)) = self.host.console(accepted, from) else { return self.take_key(run) };
        let length = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        if next.saturating_sub(length) > from {
            self.scan.gap();
        }
        self.scanned = Some(next);
        let mut news = false;
        for said in self.scan.feed(&bytes) {
            match said {
                Said::Ready => {
                    news |= !run.guest_ready;
                    run.guest_ready = true;
                }
                Said::UserDataNotRun(form) => {
                    news |= run.user_data_not_run != Some(form);
                    run.user_data_not_run = Some(form);
                }
                Said::HostKey(key) => self.key_said = Some(key),
            }
        }
        news | self.take_key(run)
    }

    /// Records the host key that the guest printed last. The first key of a run is recorded at
    /// once. Later keys are rate-limited, as each costs the host and the controller a flush of
    /// their disks.
    fn take_key(&mut self, run: &mut Run) -> bool {
        if self.key_taken.is_some_and(|at| at.elapsed() < self.pace.host_key) {
            return false;
        }
        let Some(key) = self.key_said.take() else { return false };
        let news = run.ssh_host_key.as_ref() != Some(&key);
        if news {
            run.ssh_host_key = Some(key);
            self.key_taken = Some(Instant::now());
        }
        news
    }

    /// Makes the run durable, then visible.
    fn note(&self, accepted: &Accepted, run: &Run) -> Result<()> {
        self.records.save_run(accepted.id(), run)?;
        self.keep_in_memory(run);
        self.shared.bump();
        Ok(())
    }

    fn keep_in_memory(&self, run: &Run) {
        self.shared.live().run = run.clone();
    }

    fn trouble(&self, trouble: Option<String>) {
        let changed = {
            let mut live = self.shared.live();
            let changed = live.trouble != trouble;
            live.trouble = trouble;
            changed
        };
        if changed {
            self.shared.bump();
        }
    }

    fn show(&self, spec: &InstanceSpec, run: &Run, facts: &Facts, action: &Action) {
        let state = state(spec, run, facts, action);
        self.set_state(state, reason(spec, run, state), None);
    }

    /// Publishes a state with the run that it belongs to.
    fn set_state(&self, state: Observed, reason: Option<StateReason>, run: Option<&Run>) {
        let changed = {
            let mut live = self.shared.live();
            if let Some(run) = run {
                live.run = run.clone();
            }
            let changed = live.state != state || live.reason != reason;
            if live.state != state {
                live.since_ns = self.host.now_ns();
            }
            live.state = state;
            live.reason = reason;
            changed
        };
        if changed {
            self.shared.bump();
        }
    }
}

enum Next {
    Again,
    Rest(Duration),
    Gone,
}

/// What an instance is while an action is due.
pub fn state(spec: &InstanceSpec, run: &Run, facts: &Facts, action: &Action) -> Observed {
    if let Action::Rest(state) = action {
        return *state;
    }
    let current = run.incarnation == spec.incarnation;
    if spec.desired != DesiredState::Running {
        return Observed::Stopping;
    }
    // An end is an end even if it cannot be recorded, as on a full disk.
    if current && (run.ended.is_some() || matches!(action, Action::NoteEnded(_))) {
        return Observed::Stopping;
    }
    // A reboot takes a new monitor within one run; `plan` ends the run if that takes too long.
    let runs = matches!(facts.monitor, MonitorFact::Alive { ran_ns: Some(_), .. });
    let between = plan::restarts(spec, run, facts) || *action == Action::NoteReboot;
    if current && run.began_ns.is_some() && (runs || between) {
        return Observed::Running;
    }
    Observed::Preparing
}

/// The reason for a state that the end of the run caused.
pub fn reason(spec: &InstanceSpec, run: &Run, state: Observed) -> Option<StateReason> {
    let over = matches!(state, Observed::Stopping | Observed::Stopped | Observed::Failed);
    let ended = run.ended.as_ref().filter(|_| over && run.incarnation == spec.incarnation);
    ended.and_then(|ended| ended.reason.clone())
}

/// Does something and notes how long it took.
async fn timed<T>(run: &mut Run, part: &str, work: impl Future<Output = Result<T>>) -> Result<T> {
    let begin = Instant::now();
    let result = work.await?;
    let took_us = u64::try_from(begin.elapsed().as_micros()).unwrap_or(u64::MAX);
    keep(run, TimedPart { part: part.to_owned(), took_us });
    Ok(result)
}

fn keep(run: &mut Run, part: TimedPart) {
    run.timing.retain(|known| known.part != part.part);
    run.timing.push(part);
}
