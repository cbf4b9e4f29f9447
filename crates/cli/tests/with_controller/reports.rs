//! Types, hosts, volumes and bills where nothing runs yet.

use crate::stack::Stack;

#[test]
fn types_have_sizes_and_prices_and_a_family_narrows_them() {
    let stack = Stack::start();
    let all = stack.json(&["types"]);
    assert!(all["instance_types"].as_array().unwrap().len() > 100);
    let t3 = stack.json(&["types", "--family", "t3"]);
    for kind in t3["instance_types"].as_array().unwrap() {
        assert_eq!(kind["family"], "t3");
        assert!(kind["price_per_hour"].as_str().unwrap().parse::<u64>().unwrap() > 0, "{kind}");
    }
    let table = stack.roost(&["types", "--family", "t3"]).ok();
    assert!(table.contains("t3.micro") && table.contains("PER-HOUR"), "{table}");
    stack.roost(&["types", "--family", "t33"]).fails(5, &["t33", "t3"]);
}

#[test]
fn an_empty_house_has_empty_lists_and_an_empty_bill() {
    let stack = Stack::start();
    for (args, list) in [(&["ls"][..], "instances"), (&["hosts"], "hosts"), (&["volumes"], "volumes")] {
        assert_eq!(stack.json(args)[list], serde_json::json!([]), "{args:?}");
        assert!(stack.roost(args).ok().starts_with("No "), "{args:?}");
    }
    for by in ["instance", "account", "type", "day"] {
        let bill = stack.json(&["bill", "--by", by, "--since", "1h", "--all-accounts"]);
        assert_eq!((&bill["lines"], &bill["total"]), (&serde_json::json!([]), &"0".into()));
    }
    assert!(stack.roost(&["bill"]).ok().contains("TOTAL"));
}
