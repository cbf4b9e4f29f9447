//! The image `debian-12`: cloud-init finds our metadata service, applies cloud-config and runs
//! scripts.
//!
//! `scripts/test --full` builds and imports the image and runs this.
#![allow(clippy::unwrap_used, missing_docs)]

use roost_e2e::{Ran, Rig, TempFile, Tenant, user_data};

const CONFIG: &str = "#cloud-config
users:
  - default
  - name: alice
    gecos: Made by cloud-init
    shell: /bin/bash
write_files:
  - path: /etc/roost-proof
    permissions: '0640'
    content: |
      written by cloud-init
runcmd:
  - [sh, -c, 'echo ran in $(cat /var/lib/cloud/data/instance-id) >> /root/ran']
";

fn ssh(tenant: &Tenant<'_>, id: &str, key: &str, command: &str) -> Ran {
    tenant.roost(&["ssh", id, "--key", key, "--timeout", "420", "--", command])
}

#[test]
#[ignore = "slow: its guest boots for a minute; scripts/test --full runs it"]
fn cloud_init_finds_the_metadata_service_and_obeys_cloud_config() {
    let rig = Rig::get();
    let tenant = rig.tenant("cloud-init");
    let key = std::env::temp_dir().join(format!("roost-e2e-{}.pem", tenant.profile));
    let key = key.to_str().unwrap();
    tenant.roost(&["key", "create", "login", "--out", key]).ok();
    let config = TempFile::new("cloud-config.yaml", CONFIG);
    let id = tenant.launch(
        "debian-12",
        "home1.small",
        &["--key", "login", "--volume-gib", "4", "--user-data", config.path(), "--tag", "role=web"],
    );

    // The key pair opens the image's user; cloud-init put it there.
    let status = ssh(&tenant, &id, key, "sudo cloud-init status --wait --long").ok();
    assert!(status.contains("status: done"), "{status}");
    // EC2 in a kernel's words: found by the metadata service's answers, known by the SMBIOS tables.
    let of =
        |query: &str| ssh(&tenant, &id, key, &format!("cloud-init query {query}")).ok().trim().to_owned();
    assert_eq!(of("cloud_name"), "aws");
    assert_eq!(of("instance_id"), id);
    assert_eq!(of("ds.meta_data.tags.instance.role"), "web");
    let proof = "sudo stat -c '%a %U' /etc/roost-proof; sudo cat /etc/roost-proof; getent passwd alice | cut -d: -f5,7; sudo cat /root/ran; hostname";
    let private = tenant.describe(&id)["private_ip"].as_str().unwrap().replace('.', "-");
    let expected =
        format!("640 root\nwritten by cloud-init\nMade by cloud-init:/bin/bash\nran in {id}\nip-{private}\n");
    assert_eq!(ssh(&tenant, &id, key, proof).ok(), expected);

    // A second boot of the same instance: the same host key, and runcmd does not run again.
    let host_key = ssh(&tenant, &id, key, "cat /etc/ssh/ssh_host_ed25519_key.pub").ok();
    tenant.roost(&["stop", &id, "--wait"]).ok();
    tenant.roost(&["start", &id, "--wait"]).ok();
    ssh(&tenant, &id, key, "sudo cloud-init status --wait").ok();
    assert_eq!(ssh(&tenant, &id, key, proof).ok(), expected);
    assert_eq!(ssh(&tenant, &id, key, "cat /etc/ssh/ssh_host_ed25519_key.pub").ok(), host_key);
    tenant.terminate_clean(&id);
    let _ = std::fs::remove_file(key);
}

#[test]
#[ignore = "slow: its guest boots for a minute; scripts/test --full runs it"]
fn cloud_init_runs_scripts_where_the_fast_image_runs_them() {
    let rig = Rig::get();
    let tenant = rig.tenant("cloud-script");
    let key = std::env::temp_dir().join(format!("roost-e2e-{}.pem", tenant.profile));
    let key = key.to_str().unwrap();
    tenant.roost(&["key", "create", "login", "--out", key]).ok();
    let script = TempFile::new("user-data.gz", &user_data::dos_gzip(&user_data::tells("/root/proof")));
    let id = tenant.launch("debian-12", "home1.small", &["--key", "login", "--user-data", script.path()]);
    let proof = "sudo cloud-init status --wait > /dev/null; sudo cat /root/proof";
    assert_eq!(ssh(&tenant, &id, key, proof).ok(), user_data::TOLD);
    println!("cloud-init: {}", ssh(&tenant, &id, key, "systemd-analyze; cat /proc/uptime").ok());
    println!("{}", tenant.roost(&["describe", &id, "--timing"]).ok());
    tenant.terminate_clean(&id);
    let _ = std::fs::remove_file(key);
}
