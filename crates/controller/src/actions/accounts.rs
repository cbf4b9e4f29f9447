//! Accounts and their first access keys.

use super::{Answer, admins_only};
use crate::auth::{AccessKey, Sealer, internal};
use crate::engine::{Caller, Random};
use crate::server::Front;
use roost_store::{NewAccountRows, StoreError};
use roost_types::api::{
    Account, Accounts, CallerIdentity, CreateAccount, DescribeAccounts, GetCallerIdentity, NewAccount,
};
use roost_types::{ApiError, ErrorCode, SubnetId, VpcId};

pub(super) fn who_am_i(front: &Front, caller: &Caller, _: &GetCallerIdentity) -> Answer<CallerIdentity> {
    Ok(CallerIdentity {
        account_id: caller.account_id.clone(),
        account_name: caller.account_name.clone(),
        admin: caller.admin,
        region: front.region.clone(),
    })
}

pub(super) fn create(front: &Front, caller: &Caller, request: CreateAccount) -> Answer<NewAccount> {
    admins_only(caller, "make accounts")?;
    check_name(&request.name)?;
    let random = front.random.as_ref();
    let mut id = [0; 8];
    random.fill(&mut id);
    let account = Account {
        account_id: roost_types::AccountId::from_random(id),
        name: request.name,
        admin: request.admin,
        created_at: front.clock.now(),
    };
    let key = AccessKey::generate(random);
    let rows = new_account_rows(account.clone(), &key, &front.sealer, random, &front.region, &front.zones)?;
    front.store.create_account(&rows).map_err(|error| match error {
        StoreError::Duplicate { what: "account", .. } => ApiError::new(
            ErrorCode::InvalidParameterValue,
            format!("name is {:?}, and an account of that name exists", account.name),
        ),
        other => internal(other),
    })?;
    tracing::info!(new_account = %account.account_id, name = %account.name, admin = account.admin, "account made");
    Ok(NewAccount {
        account,
        access_key_id: key.id.clone(),
        secret_access_key: key.secret.as_str().to_owned(),
    })
}

pub(super) fn describe(front: &Front, caller: &Caller, _: &DescribeAccounts) -> Answer<Accounts> {
    let mut accounts = front.store.accounts().map_err(internal)?;
    accounts.retain(|account| caller.admin || account.account_id == caller.account_id);
    Ok(Accounts { accounts })
}

/// Everything that a new account is made of: itself, its key, its default VPC with a subnet in each zone.
///
/// # Errors
/// If the cipher refuses to seal the key.
pub fn new_account_rows(
    account: Account,
    key: &AccessKey,
    sealer: &Sealer,
    random: &dyn Random,
    region: &str,
    zones: &[String],
) -> Answer<NewAccountRows> {
    let fresh = || {
        let mut bytes = [0; roost_types::ID_BYTES];
        random.fill(&mut bytes);
        bytes
    };
    let sealed = key.seal(sealer, random, account.account_id.clone(), account.created_at);
    Ok(NewAccountRows {
        key: sealed.map_err(|error| ApiError::new(ErrorCode::InternalError, error.to_string()))?,
        vpc_id: VpcId::from_random(fresh()),
        subnets: zones.iter().map(|zone| (zone.clone(), SubnetId::from_random(fresh()))).collect(),
        region: region.to_owned(),
        account,
    })
}

fn check_name(name: &str) -> Answer<()> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    if (1..=64).contains(&name.len()) && name.bytes().all(plain) {
        return Ok(());
    }
    let shown: String = name.chars().take(80).collect();
    Err(ApiError::new(
        ErrorCode::InvalidParameterValue,
        format!("name is {shown:?}, allowed are 1 to 64 characters of a-z A-Z 0-9 . _ -"),
    ))
}
