//! From an agent's report to a bill, and the same bill again from the database alone.

use crate::harness::{Server, eventually, running};
use roost_controller::offline::{RecomputeOptions, export_usage_log, recompute_bill};
use roost_types::api::{Bill, BillBy, DescribeInstances, GetBill, Instance};
use roost_types::metering::UsageEvent;
use roost_types::{Micros, Money};

async fn only_instance(client: &crate::harness::Client) -> Instance {
    let all = DescribeInstances { instance_ids: Vec::new(), include_terminated: true, all_accounts: false };
    client.call(&all).await.unwrap().instances.remove(0)
}

#[tokio::test]
async fn a_running_instance_is_billed_to_its_account_and_the_log_gives_the_same_bytes() {
    let server = Server::start().await;
    let agent = server.host("box-1").await;
    server.admin().image("debian").await;
    let (alice, bob) = (server.account("alice").await, server.account("bob").await);
    let instance = alice.launch("debian").await;
    let ask = |by, all_accounts| GetBill { since: None, until: None, by, all_accounts };
    let of_instance = |bill: &Bill| -> Option<(u128, u128)> {
        let line = bill.lines.iter().find(|line| line.meter == "instance-seconds");
        line.map(|line| (line.used, line.billed))
    };
    let before = alice.call(&ask(BillBy::Instance, false)).await.unwrap();
    assert_eq!(of_instance(&before), None, "pending costs nothing");

    let generation = only_instance(&alice).await.generation;
    agent.report(running(&instance, generation, 0)).await;
    eventually("the instance runs", async || only_instance(&alice).await.state.as_str() == "running").await;
    let bill = alice.call(&ask(BillBy::Instance, false)).await.unwrap();
    let (used, billed) = of_instance(&bill).unwrap();
    assert!(used < 60 && billed == 60, "{used} {billed}");
    assert_eq!(bill.lines.iter().map(|line| line.amount).sum::<Money>(), bill.total);
    let everybodys = server.admin().call(&ask(BillBy::Account, true)).await.unwrap();
    assert!(everybodys.total >= bill.total && bill.total > Money::ZERO);
    assert!(bob.call(&ask(BillBy::Instance, false)).await.unwrap().lines.is_empty());

    let (_dir, state) = server.stop().await;
    let recompute = |by, until| {
        let options = RecomputeOptions { since: None, until, by, account: None, prices: None };
        let mut bytes = Vec::new();
        recompute_bill(&state, &options, &mut bytes).unwrap();
        bytes
    };
    for by in BillBy::ALL {
        assert_eq!(recompute(*by, None), recompute(*by, None));
        let bill: Bill = serde_json::from_slice(&recompute(*by, None)).unwrap();
        assert_eq!(bill.lines.iter().map(|line| line.amount).sum::<Money>(), bill.total);
    }
    // At a stated moment after the end of the log, the instance costs what it cost while it ran: its minimum.
    let late = Micros(bill.until.0 + 1_000_000);
    let again: Bill = serde_json::from_slice(&recompute(BillBy::Instance, Some(late))).unwrap();
    assert_eq!(of_instance(&again).map(|(_, billed)| billed), Some(60));
    let mut log = Vec::new();
    export_usage_log(&state, &mut log).unwrap();
    let events: Vec<UsageEvent> =
        String::from_utf8(log).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(events.iter().any(|event| event.resource == instance.as_str()), "{events:?}");
}
