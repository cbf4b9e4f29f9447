//! A Debian guest as its owner uses it: ssh, metadata, user data, a disk that keeps and grows, walls around it.
#![allow(clippy::unwrap_used, missing_docs)]

use roost_e2e::{Ran, Rig, TempFile, Tenant, user_data};

fn ssh(tenant: &Tenant<'_>, id: &str, key: &str, command: &str) -> Ran {
    tenant.roost(&["ssh", id, "--key", key, "--timeout", "300", "--", command])
}

#[test]
fn a_debian_instance_can_be_entered_keeps_its_disk_and_knows_itself() {
    let rig = Rig::get();
    let tenant = rig.tenant("debian");
    let key = std::env::temp_dir().join(format!("roost-e2e-{}.pem", tenant.profile));
    let key = key.to_str().unwrap();
    tenant.roost(&["key", "create", "login", "--out", key]).ok();
    let user_data = TempFile::new("user-data.gz", &user_data::dos_gzip(&user_data::tells("/root/proof")));
    let id = tenant.launch(
        "debian-12-fast",
        "home1.small",
        &[
            "--key",
            "login",
            "--volume-gib",
            "4",
            "--user-data",
            user_data.path(),
            "--tag",
            "role=web",
            "--name",
            "deb",
        ],
    );
    let other = tenant.launch("tiny-fast", "home1.nano", &["--wait"]);

    // In by key, with the host key that the console showed; the host name, the user data and the tags are there.
    assert_eq!(ssh(&tenant, &id, key, "id -un").ok().trim(), "debian");
    // The script runs after the rest of the boot, which may be after the first login.
    let proof = "while [ $(systemctl is-active roost-user-data) = activating ] || [ $(systemctl is-active multi-user.target) != active ]; \
                 do sleep 0.2; done; sudo cat /root/proof";
    assert_eq!(ssh(&tenant, &id, key, proof).ok(), user_data::TOLD);
    let private = tenant.describe(&id)["private_ip"].as_str().unwrap().to_owned();
    assert_eq!(ssh(&tenant, &id, key, "hostname").ok().trim(), format!("ip-{}", private.replace('.', "-")));
    let imds = "T=$(wget -qO- --method=PUT --header='X-aws-ec2-metadata-token-ttl-seconds: 60' http://169.254.169.254/latest/api/token || \
                curl -fsS -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' http://169.254.169.254/latest/api/token); \
                for p in instance-id instance-type local-ipv4 public-keys/0/openssh-key; do \
                  wget -qO- --header=\"X-aws-ec2-metadata-token: $T\" http://169.254.169.254/latest/meta-data/$p || \
                  curl -fsS -H \"X-aws-ec2-metadata-token: $T\" http://169.254.169.254/latest/meta-data/$p; echo; done";
    let metadata = ssh(&tenant, &id, key, imds).ok();
    for fact in [id.as_str(), "home1.small", &private, "ssh-ed25519 "] {
        assert!(metadata.contains(fact), "{fact} in {metadata}");
    }
    // The root file system has grown to the volume.
    let kib: u64 =
        ssh(&tenant, &id, key, "df -k / | tail -n 1 | awk '{print $2}'").ok().trim().parse().unwrap();
    assert!(kib > 3_500_000, "{kib} KiB on a 4 GiB volume");

    // Walls: not the neighbour's private address, not the host's controller.
    let neighbour = tenant.describe(&other)["private_ip"].as_str().unwrap().to_owned();
    let probe = |address: &str, port: u16| {
        format!("timeout 5 bash -c '</dev/tcp/{address}/{port}' 2>/dev/null && echo open || echo closed")
    };
    assert_eq!(ssh(&tenant, &id, key, &probe(&neighbour, 80)).ok().trim(), "closed");
    let gateway = ssh(&tenant, &id, key, "ip route show default | awk '{print $3}'").ok();
    let host = rig.host("ip -4 -o addr show scope global | awk '{print $4}' | cut -d/ -f1 | head -n 1").ok();
    for (address, port) in [(gateway.trim(), 22), (host.trim(), 22), (host.trim(), 7443)] {
        assert_eq!(ssh(&tenant, &id, key, &probe(address, port)).ok().trim(), "closed", "{address}:{port}");
    }
    // In through the public address, as security allows: ssh yes, anything else no.
    let public = tenant.describe(&id)["public_ip"].as_str().unwrap().to_owned();
    assert_eq!(rig.host(&probe(&public, 22)).ok().trim(), "open");
    assert_eq!(rig.host(&probe(&public, 81)).ok().trim(), "closed");

    // The disk, the addresses and the host key outlive a stop.
    let identity = "cat /etc/machine-id; cat /etc/ssh/ssh_host_ed25519_key.pub";
    let before = ssh(&tenant, &id, key, &format!("echo kept > keep; sync; {identity}")).ok();
    tenant.roost(&["stop", &id, "--wait"]).ok();
    assert!(
        tenant.roost(&["console", &id]).stdout.to_lowercase().contains("power"),
        "it was shut down, not cut off"
    );
    tenant.roost(&["start", &id, "--wait"]).ok();
    assert_eq!(ssh(&tenant, &id, key, &format!("cat keep; {identity}")).ok(), format!("kept\n{before}"));
    assert_eq!(tenant.describe(&id)["private_ip"], private.as_str());
    for id in [id, other] {
        tenant.terminate_clean(&id);
    }
    let _ = std::fs::remove_file(key);
}
