//! Waiting until instances are where they should be.

use crate::client::Client;
use crate::context::Context;
use crate::error::{Error, Result};
use roost_types::api::{DescribeInstances, Instance};
use roost_types::{ErrorCode, InstanceId, InstanceState, Step};
use std::time::Duration;
use tokio::time::Instant;

/// What to wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Goal {
    /// Virtual CPUs run.
    Running,
    /// Ready for use.
    Ready {
        /// Whether the image runs an ssh server; `None` if the image does not state it.
        ssh: Option<bool>,
    },
    /// The guest's ssh host key is known.
    HostKey,
    /// Nothing of it runs.
    Stopped,
    /// Nothing of it is left.
    Terminated,
}

/// How one instance stands to a goal.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Verdict {
    Reached,
    NotYet(String),
    Never(String),
}

/// Description of this step's work.
fn doing(step: Step) -> &'static str {
    match step {
        Step::Place => "its host is asked whether it answers",
        Step::Launch => {
            "its host makes its disk (the first time, it fetches and unpacks the image) and starts it"
        }
        other => other.as_str(),
    }
}

fn judge(instance: &Instance, goal: Goal) -> Verdict {
    use InstanceState::{Pending, Running, ShuttingDown, Stopped, Stopping, Terminated};
    let id = &instance.instance_id;
    let state = instance.state;
    let trouble = instance.trouble.as_ref().map(|trouble| format!(" ({trouble})")).unwrap_or_default();
    let reason =
        instance.state_reason.as_ref().map(|reason| format!(": {}", reason.message)).unwrap_or_default();
    let not_yet = |what: &str| Verdict::NotYet(format!("{id} {what}{trouble}"));
    let never = || Verdict::Never(format!("{id} is {state}{reason}"));
    match (goal, state) {
        (Goal::Stopped, Stopped) | (Goal::Terminated, Terminated) => Verdict::Reached,
        (Goal::Stopped, ShuttingDown | Terminated) => never(),
        (Goal::Stopped | Goal::Terminated, _) => not_yet(&format!("is {state}")),
        (_, Pending) => not_yet(&format!("is {state}: {}", doing(instance.step))),
        (_, Stopping | Stopped | ShuttingDown | Terminated) => never(),
        (Goal::Running, Running) => Verdict::Reached,
        (Goal::Ready { ssh: Some(false) | None }, Running) if instance.guest_ready => Verdict::Reached,
        (Goal::HostKey | Goal::Ready { ssh: Some(true) | None }, Running)
            if instance.ssh_host_key.is_some() =>
        {
            Verdict::Reached
        }
        (Goal::Ready { .. }, Running) => not_yet("runs; its guest boots"),
        (Goal::HostKey, Running) => not_yet("runs; its ssh host key is not on its console yet"),
    }
}

/// The pause before the next look: short while much happens.
fn pause(waited: Duration) -> Duration {
    match waited.as_secs() {
        0..5 => Duration::from_millis(100),
        5..30 => Duration::from_millis(300),
        _ => Duration::from_secs(1),
    }
}

/// Waits until every instance is there. A controller that does not answer for a while is waited for as well.
pub async fn until(
    context: &Context,
    client: &Client,
    ids: &[InstanceId],
    goal: Goal,
    timeout: Duration,
) -> Result<Vec<Instance>> {
    let request = DescribeInstances {
        instance_ids: ids.iter().map(ToString::to_string).collect(),
        include_terminated: true,
        all_accounts: false,
    };
    let began = Instant::now();
    let mut progress = context.progress();
    loop {
        let behind = match client.call(&request).await {
            Ok(answer) => match verdict_of_all(&answer.instances, goal) {
                Verdict::Reached => return Ok(in_order(answer.instances, ids)),
                Verdict::Never(why) => return Err(Error::State(why)),
                Verdict::NotYet(behind) => behind,
            },
            // A terminated instance's row is kept for a while only.
            Err(error) if goal == Goal::Terminated && error.is_api(ErrorCode::InvalidInstanceIdNotFound) => {
                return Ok(vec![]);
            }
            Err(error) if error.is_transport() || error.is_api(ErrorCode::Unavailable) => error.chain(),
            Err(error) => return Err(error),
        };
        progress.set(&behind);
        let waited = began.elapsed();
        if waited >= timeout {
            return Err(Error::Unavailable(format!(
                "{behind} after {} s; it goes on: wait again, or see `roost describe {}`",
                timeout.as_secs(),
                ids.first().map_or("ID", InstanceId::as_str),
            )));
        }
        tokio::time::sleep(pause(waited).min(timeout - waited)).await;
    }
}

fn verdict_of_all(instances: &[Instance], goal: Goal) -> Verdict {
    let verdicts: Vec<Verdict> = instances.iter().map(|instance| judge(instance, goal)).collect();
    let failed: Vec<&str> = verdicts
        .iter()
        .filter_map(|verdict| if let Verdict::Never(why) = verdict { Some(why.as_str()) } else { None })
        .collect();
    if !failed.is_empty() {
        return Verdict::Never(failed.join("; "));
    }
    let behind: Vec<&str> = verdicts
        .iter()
        .filter_map(|verdict| if let Verdict::NotYet(what) = verdict { Some(what.as_str()) } else { None })
        .collect();
    match behind.as_slice() {
        [] => Verdict::Reached,
        [only] => Verdict::NotYet((*only).to_owned()),
        [first, others @ ..] => Verdict::NotYet(format!("{first}, and {} more", others.len())),
    }
}

fn in_order(mut instances: Vec<Instance>, ids: &[InstanceId]) -> Vec<Instance> {
    instances.sort_by_key(|instance| ids.iter().position(|id| *id == instance.instance_id));
    instances
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::samples;
    use roost_types::agent::StateReason;

    fn at(state: InstanceState) -> Instance {
        Instance {
            state,
            guest_ready: false,
            ssh_host_key: None,
            trouble: None,
            state_reason: None,
            ..samples::instance()
        }
    }

    #[test]
    fn every_goal_ends_for_every_state_that_lasts() {
        use InstanceState::{Running, Stopped, Terminated};
        for goal in [Goal::Running, Goal::Ready { ssh: None }, Goal::HostKey, Goal::Stopped, Goal::Terminated]
        {
            for state in [Stopped, Terminated] {
                let waits = matches!(judge(&at(state), goal), Verdict::NotYet(_));
                // Only an instance that was asked to terminate leaves `stopped` by itself.
                assert_eq!(waits, goal == Goal::Terminated && state == Stopped, "{goal:?} {state}");
            }
        }
        assert_eq!(judge(&at(Running), Goal::Running), Verdict::Reached);
    }

    #[test]
    fn an_instance_is_ready_when_it_can_be_used() {
        let silent = at(InstanceState::Running);
        let says_so = Instance { guest_ready: true, ..silent.clone() };
        let shows_key = Instance { ssh_host_key: Some("ssh-ed25519 AAAA".into()), ..silent.clone() };
        for (instance, of_unknown, with_ssh, without_ssh) in
            [(&silent, false, false, false), (&says_so, true, false, true), (&shows_key, true, true, false)]
        {
            for (ssh, reached) in [(None, of_unknown), (Some(true), with_ssh), (Some(false), without_ssh)] {
                let verdict = judge(instance, Goal::Ready { ssh });
                assert_eq!(verdict == Verdict::Reached, reached, "{ssh:?} {verdict:?}");
            }
        }
        assert!(matches!(judge(&says_so, Goal::HostKey), Verdict::NotYet(_)));
    }

    #[test]
    fn one_failed_launch_ends_the_wait_and_says_why() {
        let reason = StateReason { code: "Server.InternalError".into(), message: "disk full".into() };
        let failed = Instance { state_reason: Some(reason), ..at(InstanceState::Stopped) };
        let verdict = verdict_of_all(&[at(InstanceState::Pending), failed], Goal::Running);
        assert!(
            matches!(&verdict, Verdict::Never(why) if why.ends_with("is stopped: disk full")),
            "{verdict:?}"
        );
    }

    #[test]
    fn trouble_that_is_being_retried_is_shown() {
        let slow = Instance { trouble: Some("no space".into()), ..at(InstanceState::Pending) };
        assert!(matches!(judge(&slow, Goal::Running), Verdict::NotYet(what) if what.contains("no space")));
    }
}
