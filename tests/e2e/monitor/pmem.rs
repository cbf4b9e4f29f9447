//! Files in the memory of Linux guests.

use super::by_hand::{ByHand, SOON};
use roost_e2e::{Rig, wait_for};
use serde_json::json;

/// Images of file systems in a folder of the host's, which goes with this.
struct Images<'a> {
    rig: &'a Rig,
    dir: String,
}

impl<'a> Images<'a> {
    /// `root`: a root file system with `roost-guest` as its init, a line of text and 48 MiB of something; `data`: an empty one of
    /// whole 2 MiB.
    fn new(rig: &'a Rig) -> Images<'a> {
        let images = Images { rig, dir: format!("/var/tmp/{}-pmem", rig.units) };
        let dir = &images.dir;
        rig.host(&format!("mkdir -p {dir}/tree")).ok();
        rig.copy_to_host(&[std::path::Path::new(env!("CARGO_BIN_EXE_roost-guest"))], dir);
        rig.host(&format!(
            "set -e
             cd {dir}/tree && mkdir -p sbin dev sys mnt && mv ../roost-guest sbin/init && chmod 755 sbin/init
             echo from the image > hello
             head -c 48M /dev/urandom > big
             truncate --size 80M ../root && mkfs.ext4 -q -b 4096 -d . ../root
             truncate --size 16M ../data && mkfs.ext4 -q -b 4096 ../data
             rm -r {dir}/tree; sync"
        ))
        .ok();
        images
    }
}

impl Drop for Images<'_> {
    fn drop(&mut self) {
        self.rig.host(&format!("rm -rf {}", self.dir));
    }
}

impl ByHand<'_> {
    /// KiB of the monitor's mappings of a file: all, by their share, its own; and of what it has beside files.
    #[track_caller]
    fn mapped(&self, path: &str) -> [u64; 4] {
        let look = format!(
            "pid=$(pgrep -f '^[^ ]*roost-vmm run --config {}/')
             awk '/^[0-9a-f]+-[0-9a-f]+ / {{ on = $NF == \"{path}\" }}
                  on && /^Rss:/ {{ r += $2 }} on && /^Pss:/ {{ p += $2 }} on && /^Private_/ {{ w += $2 }}
                  END {{ print r + 0, p + 0, w + 0 }}' /proc/$pid/smaps
             awk '/^RssAnon:/ {{ print $2 }}' /proc/$pid/status",
            self.dir
        );
        let said = self.rig.host(&look).ok();
        let found: Vec<u64> = said.split_whitespace().map(|word| word.parse().unwrap()).collect();
        found.try_into().unwrap_or_else(|_| panic!("{said}"))
    }
}

#[test]
fn linux_guests_share_a_root_file_system_in_their_memory() {
    let rig = Rig::get();
    let images = Images::new(&rig);
    let root = format!("{}/root", images.dir);
    let shared = json!({ "id": "root", "path_on_host": root, "root_device": true, "read_only": true });
    let data = json!({ "id": "data", "path_on_host": format!("{}/data", images.dir) });
    // No initrd and no root= on the command line: the monitor says where the root is.
    let boot = json!({ "initrd_path": null });
    let first = ByHand::start(&rig, "pmem-one", &json!({ "boot-source": boot, "pmem": [shared, data] }));
    let second = ByHand::start(&rig, "pmem-two", &json!({ "boot-source": boot, "pmem": [shared] }));
    let big = 48 << 10;
    for guest in [&first, &second] {
        assert_eq!(guest.ask("read /hello"), "from the image");
        let [.., before] = guest.mapped(&root);
        assert_eq!(guest.ask("length /big"), (big << 10).to_string());
        let [mapped, _, _, after] = guest.mapped(&root);
        // It is read where it is: the guest has no copy in its own memory.
        assert!(after < before + big / 4, "{before} KiB of its own, {after} KiB after {big} KiB were read");
        assert!(mapped >= big, "{mapped} KiB of the file are mapped");
    }
    for guest in [&first, &second] {
        let [mapped, share, own, _] = guest.mapped(&root);
        println!("{mapped} KiB of the file are mapped, {share} KiB by share, {own} KiB are its own");
        // Each of them may have touched some pages that the other did not.
        assert!(share <= mapped * 6 / 10 && own <= mapped / 10, "{share} and {own} of {mapped} KiB");
        let metrics = guest.get("/metrics")["devices"]["root"].clone();
        assert_eq!((&metrics["failed"], &metrics["refused"]), (&json!(0), &json!(0)), "{metrics}");
    }

    // What a guest writes to a file of its own is there for the host, and flushed when the guest asks.
    assert_eq!(first.ask("mount /dev/pmem1 dax"), "mounted");
    assert_eq!(first.ask("write /mnt/note from the guest"), "written");
    let metrics = first.get("/metrics")["devices"]["data"].clone();
    assert!(metrics["flushes"].as_u64() > Some(0) && metrics["syncs"].as_u64() > Some(0), "{metrics}");
    for guest in [&first, &second] {
        assert_eq!(guest.ask("off"), "");
    }
    wait_for("the monitor's end", SOON, || {
        let ran = rig.host(&format!("cat {}/code", first.dir));
        if ran.stdout.is_empty() { Err(ran.stderr) } else { Ok(()) }
    });
    // No loop device is needed: the journal is played back into the file, and the file is read. 1 is "corrected".
    let look = format!(
        "cd {} && {{ e2fsck -fy data > check || [ $? = 1 ]; }} && debugfs -R 'cat /note' data 2>> check",
        images.dir
    );
    assert_eq!(rig.host(&look).ok(), "from the guest\n");
}
