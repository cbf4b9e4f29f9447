//! Memory of Linux guests that a program brings.

use super::by_hand::{ByHand, MEMORY_MIB, SOON};
use roost_e2e::{Rig, wait_for};
use serde_json::{Value, json};

/// `roost-vmm serve-memory` on the host, for one machine's snapshot.
struct Server<'a> {
    rig: &'a Rig,
    dir: String,
    unit: String,
}

impl<'a> Server<'a> {
    fn start(of: &ByHand<'a>) -> Server<'a> {
        let server = Server { rig: of.rig, dir: of.dir.clone(), unit: format!("{}-memory", of.unit) };
        let (bin, dir) = (of.rig.host_bin.display(), &of.dir);
        server
            .rig
            .host(&format!(
                "systemd-run --quiet --collect --unit {} sh -c 'exec {bin}/roost-vmm serve-memory --memory {dir}/memory \
                 --socket {dir}/faults --working-set {dir}/set 2> {dir}/served' &&
                 until [ -S {dir}/faults ]; do sleep 0.05; done",
                server.unit
            ))
            .ok();
        server
    }

    fn backend(&self) -> Value {
        json!({ "mem_backend": { "backend_type": "Uffd", "backend_path": format!("{}/faults", self.dir) } })
    }

    /// Pages that a clone had ahead and those that it asked for, once it has ended.
    fn brought(&self, clone: u32) -> (u64, u64) {
        let line = wait_for("the clone's end", SOON, || {
            let said = self.rig.host(&format!("grep 'clone {clone}: ' {}/served", self.dir));
            if said.stdout.is_empty() { Err(said.stderr) } else { Ok(said.stdout) }
        });
        let (_, words) = line.split_once(&format!("clone {clone}: ")).unwrap();
        let numbers: Vec<u64> = words.split(' ').filter_map(|word| word.parse().ok()).collect();
        (numbers[0], numbers[1])
    }
}

impl Drop for Server<'_> {
    fn drop(&mut self) {
        self.rig.host(&format!("systemctl stop {}", self.unit));
    }
}

#[test]
fn a_linux_guests_memory_is_served_and_the_second_clone_has_what_the_first_touched() {
    let rig = Rig::get();
    let balloon = json!({ "amount_mib": 0, "deflate_on_oom": true, "free_page_reporting": true });
    let machine = json!({ "vcpu_count": 2, "mem_size_mib": MEMORY_MIB });
    let devices = json!({ "machine-config": machine, "balloon": balloon });
    let (original, cold) = ByHand::boot(&rig, "served", &devices);
    assert_eq!(original.ask("hold 20"), "held 20");
    original.snapshot();
    let server = Server::start(&original);

    let mut clones = Vec::new();
    for number in [1, 2] {
        let name = format!("served-{number}");
        let (clone, took) = ByHand::load(&rig, &name, &original, &server.backend());
        assert_eq!(clone.ask("hold 1"), "held 21");
        // What the guest gives back and takes again is none of the file's.
        assert_eq!((clone.ask("drop"), clone.ask("hold 30")), ("dropped".into(), "held 30".into()));
        assert_eq!(clone.ask("upper all of it"), "ALL OF IT");
        assert_eq!(clone.ask("off"), "");
        let (ahead, asked) = server.brought(number);
        println!("clone {number}: {took:?} of {cold:?}, {ahead} pages ahead, {asked} when asked for");
        clones.push((ahead, asked));
    }
    let [(none, all), (ahead, asked)] = clones[..] else { panic!("{clones:?}") };
    assert!(none == 0 && ahead > 100 && asked < all, "{clones:?}");
}
