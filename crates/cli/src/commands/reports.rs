//! What there is and what it costs.

use crate::args::{BillArgs, HostsArgs, TypesArgs};
use crate::context::Context;
use crate::error::{Error, Result};
use crate::output::{format, views};
use crate::parse;
use roost_types::api::{
    DescribeHosts, DescribeInstanceTypes, DescribeVolumes, EndOrphan, GetBill, GetCallerIdentity,
    InstanceTypes,
};

/// `bill`.
pub async fn bill(context: &Context, args: BillArgs) -> Result<()> {
    let now = context.now();
    let moment = |what, text: Option<&String>| text.map(|text| parse::moment(what, text, now)).transpose();
    let (since, until) = (moment("--since", args.since.as_ref())?, moment("--until", args.until.as_ref())?);
    if let (Some(since), Some(until)) = (since, until)
        && since >= until
    {
        return Err(Error::parameter(format!(
            "--since {} is not before --until {}",
            format::moment(since),
            format::moment(until)
        )));
    }
    let request = GetBill { since, until, by: args.by, all_accounts: args.all_accounts };
    let bill = context.client()?.call(&request).await?;
    context.output.response(&bill, || views::bill(&bill))?;
    if !context.json() {
        context.output.note(&format!("{} to {}", format::moment(bill.since), format::moment(bill.until)));
    }
    Ok(())
}

/// `types`.
pub async fn types(context: &Context, args: TypesArgs) -> Result<()> {
    let InstanceTypes { mut instance_types, currency } =
        context.client()?.call(&DescribeInstanceTypes {}).await?;
    if let Some(family) = &args.family {
        let mut families: Vec<String> =
            instance_types.iter().map(|priced| priced.instance_type.family.clone()).collect();
        instance_types.retain(|priced| priced.instance_type.family == *family);
        if instance_types.is_empty() {
            families.dedup();
            return Err(Error::NotFound(format!(
                "there is no family {family:?}: there are {}",
                families.join(", ")
            )));
        }
    }
    let types = InstanceTypes { instance_types, currency };
    context.output.response(&types, || views::types(&types))
}

/// `hosts`.
pub async fn hosts(context: &Context, args: HostsArgs) -> Result<()> {
    if let Some(instance_id) = args.end_orphan {
        let done = context.client()?.call(&EndOrphan { instance_id: instance_id.clone() }).await?;
        return context.output.lines(&done, || format!("{instance_id} is removed from its host.\n"));
    }
    let hosts = context.client()?.call(&DescribeHosts {}).await?;
    context.output.response(&hosts, || views::hosts(&hosts, context.now()))
}

/// `volumes`.
pub async fn volumes(context: &Context) -> Result<()> {
    let volumes = context.client()?.call(&DescribeVolumes {}).await?;
    context.output.response(&volumes, || views::volumes(&volumes, context.now()))
}

/// `whoami`.
pub async fn whoami(context: &Context) -> Result<()> {
    let me = context.client()?.call(&GetCallerIdentity {}).await?;
    context.output.lines(&me, || {
        format!(
            "account  {}\nname     {}\nadmin    {}\nregion   {}\n",
            me.account_id,
            me.account_name,
            if me.admin { "yes" } else { "no" },
            me.region
        )
    })
}
