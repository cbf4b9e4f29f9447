//! Which threads stand where.

use crate::error::{Error, Result};
use std::fs;
use std::path::PathBuf;

/// KVM's helpers (`kvm-nx-lpage-recovery`) stand in their machine's cgroup and go with it. Field 4 of
/// `/proc/<pid>/stat` is the parent: kthreadd has number 2.
pub fn is_kernel_thread(pid: i32) -> bool {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    text.rsplit_once(')').and_then(|(_, rest)| rest.split_ascii_whitespace().nth(1)) == Some("2")
}

/// Thread ids of a process whose names are `vcpu` and a number.
pub fn vcpu_threads(pid: i32) -> Result<Vec<i32>> {
    let folder = PathBuf::from(format!("/proc/{pid}/task"));
    let mut threads = Vec::new();
    for entry in fs::read_dir(&folder).map_err(Error::file("list", &folder))?.flatten() {
        let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        let number = name
            .trim()
            .strip_prefix("vcpu")
            .is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()));
        if let (true, Some(thread)) = (number, entry.file_name().to_str().and_then(|text| text.parse().ok()))
        {
            threads.push(thread);
        }
    }
    Ok(threads)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vcpu_threads_are_told_by_their_names() {
        let threads: Vec<_> = ["vcpu0", "vcpu12", "vcpux", "device"]
            .iter()
            .map(|name| {
                let (ready, is_ready) = std::sync::mpsc::channel();
                let (hold, held) = std::sync::mpsc::channel::<()>();
                let thread = std::thread::Builder::new().name((*name).into());
                let thread = thread.spawn(move || {
                    ready.send(()).unwrap();
                    let _ = held.recv();
                });
                is_ready.recv().unwrap();
                (thread.unwrap(), hold)
            })
            .collect();
        let pid = i32::try_from(std::process::id()).unwrap();
        assert_eq!(vcpu_threads(pid).unwrap().len(), 2);
        for (thread, hold) in threads {
            drop(hold);
            thread.join().unwrap();
        }
    }
}
