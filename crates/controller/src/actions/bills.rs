//! Bills: computed from the usage log each time, never kept.

use super::{Answer, admins_only};
use crate::auth::internal;
use crate::engine::Caller;
use crate::server::Front;
use roost_store::UsageFilter;
use roost_types::api::{Bill, GetBill};
use roost_types::{ApiError, ErrorCode};

pub(super) fn get(front: &Front, caller: &Caller, request: &GetBill) -> Answer<Bill> {
    if request.all_accounts {
        admins_only(caller, "see every account's bill")?;
    }
    let now = front.clock.now();
    let since = request.since.unwrap_or_else(|| roost_billing::month_start(request.until.unwrap_or(now)));
    let until = request.until.unwrap_or(now);
    if since > until {
        return Err(ApiError::new(
            ErrorCode::InvalidParameterCombination,
            format!("since is {since}, which is after until, {until} (seconds since 1970, UTC)"),
        ));
    }
    let account_id = (!request.all_accounts).then(|| caller.account_id.clone());
    // The proofs are read after the log: an interval that closes in between is billed by its end all the same.
    let events = front.store.usage_events(&UsageFilter { account_id, resource: None }).map_err(internal)?;
    let proofs = front.engine.proofs()?;
    Ok(roost_billing::bill(&events, &proofs, &front.prices, (since, until), request.by, now))
}
