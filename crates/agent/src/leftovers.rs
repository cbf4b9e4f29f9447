//! Clean means clean: everything on a host that belongs to an instance, found by looking, not by remembering.

use crate::cgroup::Cgroups;
use crate::durable;
use crate::error::Result;
use crate::names::{self, Folders};
use crate::net::{firewall, links, walls};
use roost_types::ids::InstanceId;
use serde::Serialize;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// A thing that is there.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Leftover {
    /// `process`, `cgroup`, `netns`, `link`, `nft`, `mount` or `file`.
    pub kind: &'static str,
    /// Which.
    pub what: String,
}

/// What is there of one instance. Blocks.
///
/// # Errors
/// The firewall cannot be read.
pub fn of(folders: &Folders, cgroups: &Cgroups, id: &InstanceId) -> Result<Vec<Leftover>> {
    let mut found = BTreeSet::new();
    let mut add = |kind, what: String| {
        found.insert(Leftover { kind, what });
    };
    for path in cgroups.of(id) {
        add("cgroup", path.display().to_string());
    }
    for pid in processes(id) {
        add("process", pid.to_string());
    }
    let netns = folders.netns_file(id);
    if netns.exists() {
        add("netns", netns.display().to_string());
    }
    let veth = names::host_veth(id);
    if links::link_exists(&veth) {
        add("link", veth);
    }
    for address in firewall::public_addresses(id)? {
        add("nft", format!("{} public {address}", names::HOST_TABLE));
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    for line in mounts.lines().filter(|line| line.contains(id.as_str())) {
        add("mount", line.split(' ').nth(4).unwrap_or(line).to_owned());
    }
    let quarantined = folders.quarantine().join(id.as_str());
    for path in [folders.instance(id), folders.running(id), quarantined] {
        if path.exists() {
            add("file", path.display().to_string());
        }
    }
    Ok(found.into_iter().collect())
}

/// Every instance that has left a trace.
fn traces(folders: &Folders, cgroups: &Cgroups) -> BTreeSet<InstanceId> {
    let mut ids = BTreeSet::new();
    let mut note = |name: &str| {
        if let Ok(id) = name.parse::<InstanceId>() {
            ids.insert(id);
        }
    };
    for folder in [folders.instances(), folders.quarantine(), folders.run.clone()] {
        entries(&folder).iter().for_each(|name| note(name));
    }
    for name in entries(&folders.netns) {
        note(name.strip_prefix("roost-").unwrap_or_default());
    }
    for family in entries(cgroups.root()) {
        entries(&cgroups.root().join(family)).iter().for_each(|name| note(name));
    }
    ids
}

/// Ends and removes everything of every instance of a state folder, volumes and images too. Blocks.
///
/// # Errors
/// Something cannot be removed.
pub fn purge(folders: &Folders, cgroups: &Cgroups) -> Result<()> {
    for id in &traces(folders, cgroups) {
        cgroups.kill(id)?;
        links::remove(folders, id)?;
        walls::release(id, None)?;
        cgroups.remove(id)?;
        durable::remove_folder(&folders.running(id))?;
        durable::remove_folder(&folders.instance(id))?;
    }
    firewall::remove_empty_host_table()?;
    for folder in [folders.instances(), folders.quarantine(), folders.volumes(), folders.images()] {
        durable::remove_folder(&folder)?;
    }
    Ok(())
}

/// What is there of any instance, volumes that outlive theirs included. Blocks.
///
/// # Errors
/// The firewall cannot be read.
pub fn all(folders: &Folders, cgroups: &Cgroups) -> Result<Vec<Leftover>> {
    let ids = traces(folders, cgroups);
    let mut found = Vec::new();
    for id in &ids {
        found.extend(of(folders, cgroups, id)?);
    }
    // Links whose instance has no other trace.
    let prefix_len = names::VETH_PREFIX.len();
    for name in entries(Path::new("/sys/class/net")) {
        let ours = name.starts_with(names::VETH_PREFIX)
            && name.len() > prefix_len
            && name[prefix_len..].bytes().all(|byte| byte.is_ascii_hexdigit());
        if ours && !ids.iter().any(|id| names::host_veth(id) == name) {
            found.push(Leftover { kind: "link", what: name });
        }
    }
    for name in entries(&folders.volumes()) {
        found.push(Leftover { kind: "file", what: folders.volumes().join(name).display().to_string() });
    }
    Ok(found)
}

fn entries(folder: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(folder) else { return vec![] };
    entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

/// Processes whose cgroup or command line names the instance.
fn processes(id: &InstanceId) -> Vec<i32> {
    let own = std::process::id().to_string();
    let named = |pid: &str| {
        let read = |file: &str| fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
        let cgroup = String::from_utf8_lossy(&read("cgroup")).contains(&format!("/{id}"));
        let command = read("cmdline");
        let arguments: Vec<&[u8]> = command.split(|byte| *byte == 0).collect();
        let monitor = arguments.first().is_some_and(|name| name.ends_with(b"roost-vmm"))
            && arguments.iter().any(|argument| *argument == id.as_str().as_bytes());
        cgroup || monitor
    };
    let pids =
        entries(Path::new("/proc")).into_iter().filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()));
    pids.filter(|pid| *pid != own && named(pid)).filter_map(|pid| pid.parse().ok()).collect()
}
