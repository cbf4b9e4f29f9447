//! The table of actions: each name with the function that answers it. Adding an action is one line here, its types
//! in `roost_types::api`, and the function.

mod accounts;
mod bills;
mod images;
mod key_pairs;

pub use accounts::new_account_rows;

use crate::engine::Caller;
use crate::server::{Front, body};
use roost_types::api::{
    Action, CreateAccount, CreateKeyPair, DeleteKeyPair, DeregisterImage, DescribeAccounts, DescribeHosts,
    DescribeImages, DescribeInstanceTiming, DescribeInstanceTypes, DescribeInstances, DescribeKeyPairs,
    DescribeVolumes, EndOrphan, GetBill, GetCallerIdentity, ImportKeyPair, ModifyInstanceType,
    RebootInstances, RegisterImage, RunInstances, StartInstances, StopInstances, TerminateInstances,
};
use roost_types::name::is_showable;
use roost_types::{ApiError, ErrorCode};
use std::collections::BTreeMap;
use std::sync::LazyLock;

type Answer<T> = Result<T, ApiError>;
type Run = Box<dyn Fn(&Front, &Caller, &[u8]) -> Answer<Vec<u8>> + Send + Sync>;

/// An action's name with the function that parses its request, runs it and writes its response.
fn on<A: Action>(
    run: impl Fn(&Front, &Caller, A) -> Answer<A::Response> + Send + Sync + 'static,
) -> (&'static str, Run) {
    let run = move |front: &Front, caller: &Caller, text: &[u8]| {
        let response = run(front, caller, body::parse(text)?)?;
        serde_json::to_vec(&response).map_err(|error| {
            ApiError::new(ErrorCode::InternalError, format!("the response cannot be written: {error}"))
        })
    };
    (A::NAME, Box::new(run))
}

static TABLE: LazyLock<BTreeMap<&'static str, Run>> = LazyLock::new(|| {
    BTreeMap::from([
        on(|f, c, r: GetCallerIdentity| accounts::who_am_i(f, c, &r)),
        on(|f, c, r: CreateAccount| accounts::create(f, c, r)),
        on(|f, c, r: DescribeAccounts| accounts::describe(f, c, &r)),
        on(|f, c, r: CreateKeyPair| key_pairs::create(f, c, r)),
        on(|f, c, r: ImportKeyPair| key_pairs::import(f, c, r)),
        on(|f, c, r: DescribeKeyPairs| key_pairs::describe(f, c, &r)),
        on(|f, c, r: DeleteKeyPair| key_pairs::delete(f, c, &r)),
        on(|f, c, r: RegisterImage| images::register(f, c, r)),
        on(|f, c, r: DescribeImages| images::describe(f, c, &r)),
        on(|f, c, r: DeregisterImage| images::deregister(f, c, &r)),
        on(|f, c, r: DescribeInstanceTypes| f.engine.describe_instance_types(c, r)),
        on(|f, c, r: DescribeHosts| f.engine.describe_hosts(c, r)),
        on(|f, c, r: EndOrphan| f.engine.end_orphan(c, &r)),
        on(|f, c, r: RunInstances| f.engine.run_instances(c, r)),
        on(|f, c, r: DescribeInstances| f.engine.describe_instances(c, r)),
        on(|f, c, r: StartInstances| f.engine.start_instances(c, r)),
        on(|f, c, r: StopInstances| f.engine.stop_instances(c, r)),
        on(|f, c, r: RebootInstances| f.engine.reboot_instances(c, r)),
        on(|f, c, r: TerminateInstances| f.engine.terminate_instances(c, r)),
        on(|f, c, r: ModifyInstanceType| f.engine.modify_instance_type(c, r)),
        on(|f, c, r: DescribeInstanceTiming| f.engine.describe_instance_timing(c, r)),
        on(|f, c, r: DescribeVolumes| f.engine.describe_volumes(c, r)),
        on(|f, c, r: GetBill| bills::get(f, c, &r)),
    ])
});

/// Runs an action by its name. Blocks.
///
/// # Errors
/// `InvalidAction` if there is none of that name; else the action's own.
pub fn run(front: &Front, caller: &Caller, name: &str, body: &[u8]) -> Answer<Vec<u8>> {
    let Some(run) = TABLE.get(name) else {
        let near = nearest(name).map(|near| format!(": did you mean {near:?}?")).unwrap_or_default();
        return Err(ApiError::new(ErrorCode::InvalidAction, format!("there is no action {name:?}{near}")));
    };
    run(front, caller, body)
}

/// Refuses who may not administrate.
fn admins_only(caller: &Caller, what: &str) -> Answer<()> {
    if caller.admin {
        return Ok(());
    }
    Err(ApiError::new(
        ErrorCode::UnauthorizedOperation,
        format!("account {:?} is no administrator and may not {what}", caller.account_name),
    ))
}

/// Checks a parameter's length in characters, all of which must be printable.
fn printable(parameter: &str, value: &str, least: usize, most: usize) -> Answer<()> {
    let count = value.chars().count();
    if (least..=most).contains(&count) && is_showable(value) {
        return Ok(());
    }
    let shown: String = value.chars().take(80).collect();
    Err(ApiError::new(
        ErrorCode::InvalidParameterValue,
        format!(
            "{parameter} is {shown:?} ({count} characters), allowed are {least} to {most} printable characters"
        ),
    ))
}

/// The action whose name is most like this one, if any is.
fn nearest(name: &str) -> Option<&'static str> {
    let wanted: Vec<char> = name.to_lowercase().chars().take(64).collect();
    let ranked = TABLE.keys().map(|known| (distance(&wanted, &known.to_lowercase()), *known)).min()?;
    (ranked.0 <= ranked.1.len() / 3).then_some(ranked.1)
}

/// Levenshtein distance.
fn distance(a: &[char], b: &str) -> usize {
    let mut row: Vec<usize> = (0..=a.len()).collect();
    for (i, letter) in b.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, other) in a.iter().enumerate() {
            let cost = diagonal + usize::from(*other != letter);
            diagonal = row[j + 1];
            row[j + 1] = cost.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[a.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use roost_types::api::ACTIONS;
    use std::collections::BTreeSet;

    #[test]
    fn the_table_has_every_action_that_there_is_and_no_other() {
        let table: BTreeSet<_> = TABLE.keys().copied().collect();
        assert_eq!(table, ACTIONS.iter().copied().collect());
    }

    #[test]
    fn a_misspelt_action_is_told_its_neighbour() {
        assert_eq!(nearest("RunInstance"), Some("RunInstances"));
        assert_eq!(nearest("describeinstances"), Some("DescribeInstances"));
        assert_eq!(nearest("Quux"), None);
        assert_eq!(nearest(""), None);
        let chars = |text: &str| text.chars().collect::<Vec<_>>();
        assert_eq!(distance(&chars("kitten"), "sitting"), 3);
    }
}
