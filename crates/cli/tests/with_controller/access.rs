//! Accounts and key pairs.

use crate::stack::Stack;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

#[test]
fn an_administrator_makes_an_account_that_then_acts_for_itself() {
    let stack = Stack::start();
    let me = stack.json(&["whoami"]);
    assert_eq!((&me["admin"], &me["region"]), (&true.into(), &"home-1".into()));

    let made = stack.roost(&["account", "create", "alice", "--save-profile", "alice"]);
    assert!(!made.stdout.contains("secret"), "{made:?}");
    made.ok();
    let alice = stack.json(&["--profile", "alice", "whoami"]);
    assert_eq!((&alice["account_name"], &alice["admin"]), (&"alice".into(), &false.into()));
    let all = stack.json(&["account", "ls"]);
    assert_eq!(all["accounts"].as_array().unwrap().len(), 2);
    assert!(stack.roost(&["account", "ls"]).ok().contains("alice"));

    // Without a profile to keep it, the secret is shown once.
    let bob = stack.json(&["account", "create", "bob"]);
    assert_eq!(bob["secret_access_key"].as_str().unwrap().len(), 40);
    stack.roost(&["--profile", "alice", "account", "create", "eve"]).fails(4, &["UnauthorizedOperation"]);
    stack.roost(&["account", "create", "no spaces"]).fails(3, &["InvalidParameterValue", "no spaces"]);
}

#[test]
fn a_key_pair_is_made_kept_private_imported_and_forgotten() {
    let stack = Stack::start();
    let said = stack.roost(&["key", "create", "home"]);
    let file = stack.path("cli/keys/home.pem");
    assert!(said.stderr.contains(file.to_str().unwrap()), "{said:?}");
    said.ok();
    assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);

    // The file is a key that ssh itself takes, and its public half is the one that the controller has.
    let public = Command::new("ssh-keygen").args(["-y", "-f"]).arg(&file).output().unwrap();
    let public = String::from_utf8(public.stdout).unwrap();
    let known = stack.json(&["key", "ls"]);
    let known = known["key_pairs"][0]["public_key"].as_str().unwrap();
    let words = |line: &str| line.split_whitespace().take(2).map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(words(known), words(&public));

    stack.roost(&["key", "create", "home"]).fails(6, &["home.pem", "--out"]);
    let elsewhere = stack.path("other.pem");
    stack
        .roost(&["key", "create", "home", "--out", elsewhere.to_str().unwrap()])
        .fails(6, &["InvalidKeyPair.Duplicate", "home"]);
    assert!(!elsewhere.exists(), "nothing half made");

    let public_file = stack.path("id.pub");
    std::fs::write(&public_file, &public).unwrap();
    stack.roost(&["key", "import", "mine", public_file.to_str().unwrap()]).ok();
    stack.roost(&["key", "import", "bad", file.to_str().unwrap()]).fails(3, &["private key"]);
    assert_eq!(stack.json(&["key", "ls"])["key_pairs"].as_array().unwrap().len(), 2);
    stack.roost(&["key", "rm", "home"]).ok();
    assert!(file.exists(), "the private half is the user's own");
    assert_eq!(stack.json(&["key", "ls"])["key_pairs"][0]["key_name"], "mine");
}

#[test]
fn another_profile_keeps_its_keys_apart() {
    let stack = Stack::start();
    stack.roost(&["account", "create", "alice", "--save-profile", "alice"]).ok();
    stack.roost(&["key", "create", "home"]).ok();
    stack.roost(&["--profile", "alice", "key", "create", "home"]).ok();
    assert!(stack.path("cli/keys/alice/home.pem").is_file());
}

#[test]
fn a_public_key_file_is_taken_as_people_have_it_and_a_private_one_never_leaves() {
    let stack = Stack::start();
    const KEY: &str = "AAAAC3NzaC1lZDI1NTE5AAAAIAt+fXthYKfCVXXVcBE/Od6eT9KrnFbLo9RilGMsJQyj";
    let file = stack.path("key.pub");
    let import = |name: &str, content: &[u8]| {
        std::fs::write(&file, content).unwrap();
        stack.roost(&["key", "import", name, file.to_str().unwrap()])
    };
    import("tab", format!("ssh-ed25519\t{KEY}\tsomeone's laptop — büro\t \r\n").as_bytes()).ok();
    import("blanks", format!("\n# mine\nssh-ed25519  {KEY}  \n").as_bytes()).ok();
    import("latin-1", &[format!("ssh-ed25519 {KEY} b").as_bytes(), b"\xfcro\n"].concat()).ok();
    import("options", format!("no-pty,command=\"a b\" ssh-ed25519 {KEY} x").as_bytes())
        .fails(3, &["InvalidKey.Format", "no-pty", "grep -o"]);
    import("two", format!("ssh-ed25519 {KEY}\nssh-ed25519 {KEY}\n").as_bytes()).fails(3, &["lines 1, 2"]);
    import("rfc4716", b"---- BEGIN SSH2 PUBLIC KEY ----\nAAAA\n---- END SSH2 PUBLIC KEY ----\n")
        .fails(3, &["ssh-keygen -i -f FILE"]);
    import("putty", b"PuTTY-User-Key-File-3: ssh-ed25519\n").fails(3, &["puttygen", "roost key import"]);
    import("der", b"\x30\x82\x00\x01").fails(3, &["ssh-keygen -y -f"]);
    let listed = stack.json(&["key", "ls"]);
    for pair in listed["key_pairs"].as_array().unwrap() {
        assert!(pair["public_key"].as_str().unwrap().starts_with(&format!("ssh-ed25519 {KEY}")), "{pair}");
    }
    assert_eq!(listed["key_pairs"].as_array().unwrap().len(), 3);
}
