//! Instances by id or by their tag `Name`.

use crate::client::Client;
use crate::error::{Error, Result};
use roost_types::api::{DescribeInstances, Instance};
use roost_types::{InstanceId, InstanceState};

/// The ids that these texts name.
pub async fn ids(client: &Client, texts: &[String]) -> Result<Vec<InstanceId>> {
    let named = texts.iter().any(|text| !looks_like_id(text));
    let known = if named {
        let all = DescribeInstances { instance_ids: vec![], include_terminated: false, all_accounts: false };
        client.call(&all).await?.instances
    } else {
        vec![]
    };
    texts.iter().map(|text| one_of(text, &known)).collect()
}

/// The id that this text names.
pub async fn id(client: &Client, text: &str) -> Result<InstanceId> {
    let mut ids = ids(client, &[text.to_owned()]).await?;
    ids.pop().ok_or_else(|| Error::Internal("one text names one instance".to_owned()))
}

/// The instance that this text names, as it is now.
pub async fn instance(client: &Client, text: &str) -> Result<Instance> {
    describe(client, &id(client, text).await?).await
}

/// The instance of this id, as it is now, terminated or not.
pub async fn describe(client: &Client, id: &InstanceId) -> Result<Instance> {
    let one = DescribeInstances {
        instance_ids: vec![id.to_string()],
        include_terminated: true,
        all_accounts: false,
    };
    let found = client.call(&one).await?.instances.into_iter().find(|instance| instance.instance_id == *id);
    found.ok_or_else(|| Error::NotFound(format!("there is no instance {id}")))
}

fn looks_like_id(text: &str) -> bool {
    text.starts_with(InstanceId::PREFIX)
}

fn one_of(text: &str, known: &[Instance]) -> Result<InstanceId> {
    if looks_like_id(text) {
        return Ok(text.parse()?);
    }
    let alive = |instance: &&Instance| {
        !matches!(instance.state, InstanceState::ShuttingDown | InstanceState::Terminated)
    };
    let named = |instance: &&Instance| instance.tags.get("Name").is_some_and(|name| name == text);
    let found: Vec<&Instance> = known.iter().filter(alive).filter(named).collect();
    match found.as_slice() {
        [only] => Ok(only.instance_id.clone()),
        [] => Err(Error::NotFound(format!(
            "no instance has the name {text:?}: give an id (i-…) or a tag Name (`roost ls` shows both)"
        ))),
        several => {
            let ids: Vec<&str> = several.iter().map(|instance| instance.instance_id.as_str()).collect();
            Err(Error::parameter(format!(
                "{} instances have the name {text:?}: give one of the ids {}",
                ids.len(),
                ids.join(", ")
            )))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::samples;

    #[test]
    fn a_name_is_good_where_exactly_one_living_instance_has_it() {
        let known = samples::instances();
        let [web, db, twin] = &known[..] else { panic!("three samples") };
        assert_eq!(one_of("web", &known).unwrap(), web.instance_id);
        let mut twins = known.clone();
        twins[1].tags = web.tags.clone();
        let error = one_of("web", &twins).unwrap_err();
        assert!(error.to_string().contains(web.instance_id.as_str()), "{error}");
        assert!(error.to_string().contains(db.instance_id.as_str()), "{error}");
        assert_eq!(error.exit_code(), 3);
        twins[1].state = InstanceState::Terminated;
        assert_eq!(one_of("web", &twins).unwrap(), web.instance_id);
        assert_eq!(one_of(twin.instance_id.as_str(), &[]).unwrap(), twin.instance_id);
    }

    #[test]
    fn an_unknown_name_and_a_malformed_id_are_told_apart() {
        assert_eq!(one_of("nobody", &[]).unwrap_err().exit_code(), 5);
        let error = one_of("i-nope", &[]).unwrap_err();
        assert_eq!((error.code(), error.exit_code()), ("InvalidInstanceID.Malformed", 3));
    }
}
