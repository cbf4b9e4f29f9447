//! What the controller refuses: EC2's code, the exit code of its class, the value and the way out.

use crate::stack::Stack;

#[test]
fn each_refusal_has_its_code_and_its_way_out() {
    let stack = Stack::start();
    let folder = stack.image_folder("tiny", 1);
    stack.roost(&["image", "import", &folder]).ok();
    let launch = |more: &[&str]| {
        let mut args = vec!["launch"];
        args.extend(more);
        stack.roost(&args)
    };
    launch(&["--type", "t9.huge", "--image", "tiny"]).fails(3, &["InvalidParameterValue", "t9.huge"]);
    launch(&["--type", "t3.nano", "--image", "nope"])
        .fails(5, &["InvalidAMIID.NotFound", "nope", "roost image ls"]);
    launch(&["--type", "t3.nano", "--image", "tiny", "--key", "nokey"])
        .fails(5, &["InvalidKeyPair.NotFound", "nokey", "roost key create"]);
    launch(&["--type", "t3.nano", "--image", "tiny"]).fails(7, &[]);
    let unknown = "i-0123456789abcdef0";
    for action in ["describe", "stop", "start", "reboot", "terminate", "console"] {
        stack.roost(&[action, unknown]).fails(5, &["InvalidInstanceID.NotFound", unknown]);
    }
    stack.roost(&["resize", unknown, "--type", "t3.nano"]).fails(5, &["InvalidInstanceID.NotFound"]);
    stack.roost(&["stop", "nobody"]).fails(5, &["nobody", "roost ls"]);
    assert_eq!(stack.json(&["ls", "--all"])["instances"], serde_json::json!([]), "nothing half made");
}

#[test]
fn a_wrong_secret_an_unknown_key_and_a_wrong_authority_are_told_apart() {
    let stack = Stack::start();
    let config = stack.path("cli/config.toml");
    let text = std::fs::read_to_string(&config).unwrap();
    let change = |field: &str, value: &str| {
        let line = |line: &str| {
            if line.starts_with(field) { format!("{field} = \"{value}\"") } else { line.to_owned() }
        };
        std::fs::write(&config, text.lines().map(line).collect::<Vec<_>>().join("\n")).unwrap();
    };
    change("secret_access_key", &"0".repeat(40));
    stack.roost(&["ls"]).fails(4, &["AuthFailure", "roost configure ls"]);
    change("access_key_id", "AKIA0000000000000000");
    stack.roost(&["ls"]).fails(4, &["AuthFailure"]);
    change("region", "elsewhere-1");
    stack.roost(&["ls"]).fails(4, &["elsewhere-1"]);
    let other = Stack::start();
    std::fs::write(&config, &text).unwrap();
    stack.roost(&["ls", "--endpoint", &other.endpoint]).fails(8, &["certificate", &other.endpoint]);
}
