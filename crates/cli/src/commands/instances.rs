//! What is done to instances that exist.

use crate::args::{DescribeArgs, LsArgs, RebootArgs, ResizeArgs, StartArgs, StopArgs, TerminateArgs};
use crate::client::Client;
use crate::context::Context;
use crate::error::Result;
use crate::output::views;
use crate::resolve;
use crate::wait::{self, Goal};
use roost_types::api::{
    DescribeInstanceTiming, DescribeInstances, Instances, ModifyInstanceType, RebootInstances,
    StartInstances, StateChanges, StopInstances, TerminateInstances,
};
use roost_types::{ErrorCode, InstanceId, InstanceState};
use std::time::Duration;

fn texts(ids: &[InstanceId]) -> Vec<String> {
    ids.iter().map(ToString::to_string).collect()
}

/// `ls`.
pub async fn ls(context: &Context, args: LsArgs) -> Result<()> {
    let client = context.client()?;
    let request = DescribeInstances {
        instance_ids: texts(&resolve::ids(&client, &args.instances).await?),
        include_terminated: args.all,
        all_accounts: args.all_accounts,
    };
    let found = client.call(&request).await?;
    context.output.response(&found, || views::instances(&found.instances, args.all_accounts, context.now()))
}

/// `describe`.
pub async fn describe(context: &Context, args: DescribeArgs) -> Result<()> {
    let client = context.client()?;
    if args.timing {
        let instance_id = resolve::id(&client, &args.instance).await?.to_string();
        let timing = client.call(&DescribeInstanceTiming { instance_id }).await?;
        return context.output.response(&timing, || views::timing(&timing));
    }
    let instance = resolve::instance(&client, &args.instance).await?;
    let found = Instances { instances: vec![instance] };
    context
        .output
        .lines(&found, || found.instances.iter().map(|one| views::instance(one, context.now())).collect())
}

/// `stop`.
pub async fn stop(context: &Context, args: StopArgs) -> Result<()> {
    let client = context.client()?;
    let ids = resolve::ids(&client, &args.instances).await?;
    let changes = client.call(&StopInstances { instance_ids: texts(&ids), force: args.force }).await?;
    let wait = args.wait.then_some(args.timeout.timeout);
    changed(context, &client, changes, &ids, Goal::Stopped, wait).await
}

/// `start`.
pub async fn start(context: &Context, args: StartArgs) -> Result<()> {
    let client = context.client()?;
    let ids = resolve::ids(&client, &args.instances).await?;
    let changes = client.call(&StartInstances { instance_ids: texts(&ids) }).await?;
    let wait = args.wait.then_some(args.timeout.timeout);
    changed(context, &client, changes, &ids, Goal::Running, wait).await
}

/// `terminate`.
pub async fn terminate(context: &Context, args: TerminateArgs) -> Result<()> {
    let client = context.client()?;
    let ids = resolve::ids(&client, &args.instances).await?;
    let changes = client.call(&TerminateInstances { instance_ids: texts(&ids) }).await?;
    let wait = args.wait.then_some(args.timeout.timeout);
    changed(context, &client, changes, &ids, Goal::Terminated, wait).await
}

/// `reboot`.
pub async fn reboot(context: &Context, args: RebootArgs) -> Result<()> {
    let client = context.client()?;
    let ids = resolve::ids(&client, &args.instances).await?;
    let done = client.call(&RebootInstances { instance_ids: texts(&ids) }).await?;
    context.output.lines(&done, || format!("{} will reboot", texts(&ids).join(" ")))
}

/// Waits if asked to, and prints what changed, as it is by then.
async fn changed(
    context: &Context,
    client: &Client,
    mut changes: StateChanges,
    ids: &[InstanceId],
    goal: Goal,
    wait: Option<Duration>,
) -> Result<()> {
    if let Some(timeout) = wait {
        context.on_interrupt("interrupted; what was asked for goes on: `roost ls` shows it");
        let reached = wait::until(context, client, ids, goal, timeout).await?;
        for change in &mut changes.changes {
            let now = reached.iter().find(|instance| instance.instance_id == change.instance_id);
            change.current = now.map_or(InstanceState::Terminated, |instance| instance.state);
        }
    }
    context.output.response(&changes, || views::changes(&changes))
}

/// `resize`.
pub async fn resize(context: &Context, args: ResizeArgs) -> Result<()> {
    let client = context.client()?;
    let id = resolve::id(&client, &args.instance).await?;
    let before = resolve::describe(&client, &id).await?;
    let ids = [id.clone()];
    let timeout = args.timeout.timeout;
    let must_stop =
        matches!(before.state, InstanceState::Pending | InstanceState::Running | InstanceState::Stopping);
    if must_stop && args.stop_start {
        context.on_interrupt(format!(
            "interrupted; {id} may be stopped, of either type: `roost describe {id}` shows it, `roost start {id}` \
             starts it"
        ));
        if before.state == InstanceState::Pending {
            wait::until(context, &client, &ids, Goal::Running, timeout).await?;
        }
        client.call(&StopInstances { instance_ids: texts(&ids), force: false }).await?;
        wait::until(context, &client, &ids, Goal::Stopped, timeout).await?;
    }
    let modify =
        ModifyInstanceType { instance_id: id.to_string(), instance_type: args.instance_type.clone() };
    let modified = client.call(&modify).await;
    // Whether or not it could be resized: what ran runs again.
    if must_stop && args.stop_start {
        client.call(&StartInstances { instance_ids: texts(&ids) }).await?;
        if modified.is_ok() {
            wait::until(context, &client, &ids, Goal::Running, timeout).await?;
        }
    }
    modified.map_err(|error| {
        if !must_stop || args.stop_start {
            return error;
        }
        error.with_advice(
            ErrorCode::IncorrectInstanceState,
            &format!(
                "`roost stop --wait {id}`, then this again, then `roost start {id}`; or all three with --stop-start"
            ),
        )
    })?;
    let after = resolve::describe(&client, &id).await?;
    let found = Instances { instances: vec![after.clone()] };
    context.output.lines(&found, || {
        format!(
            "{id} is {}: {} → {} ({} vCPU, {} MiB)",
            after.state, before.instance_type, after.instance_type, after.vcpus, after.memory_mib
        )
    })
}
