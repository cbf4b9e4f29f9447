//! User ids of monitors: one per monitor, used by nothing else on the host.

use std::fs;

/// Default of the first id. systemd's `UIDS-GIDS.md` lists 0x7000_0000 to 0x7fff_ffff as unused.
/// `useradd` allocates ranges for user namespaces from 100,000 on; their owner may kill every
/// process with an id in the range.
pub const FIRST: u32 = 0x7000_0000;
/// Number of ids: more than the instances of any host.
const COUNT: u64 = 1 << 16;
/// Files that allocate ids for user namespaces (subuid(5)).
const HANDED_OUT: [&str; 2] = ["/etc/subuid", "/etc/subgid"];

/// Returns the sentence about a subordinate range that overlaps the monitors' ids, if there is one.
pub fn trouble(first: u32) -> Option<String> {
    HANDED_OUT.iter().find_map(|path| overlap(first, path, &fs::read_to_string(path).ok()?))
}

fn overlap(first: u32, path: &str, text: &str) -> Option<String> {
    let (from, to) = (u64::from(first), u64::from(first) + COUNT);
    let line = text.lines().find(|line| {
        let mut fields = line.split(':').skip(1).map(|field| field.trim().parse::<u64>().ok());
        let (Some(Some(start)), Some(Some(count))) = (fields.next(), fields.next()) else { return false };
        start < to && start.saturating_add(count) > from
    })?;
    let owner = line.split(':').next().unwrap_or_default();
    Some(format!(
        "monitors have the user ids {from} to {}, which {path} gives to {owner:?} ({line:?}), who can end them: \
         start the agent with another --uid-base, best {FIRST}",
        to - 1
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_that_somebody_may_use_in_namespaces_is_named_with_its_owner() {
        let text = "alice:100000:65536\nbob:165536:65536\n# no entry\nbroken:x:y\n";
        assert_eq!(overlap(FIRST, "/etc/subuid", text), None);
        for (first, owner) in [(100_000, "alice"), (40_000, "alice"), (165_535, "alice"), (200_000, "bob")] {
            let why = overlap(first, "/etc/subuid", text).unwrap();
            assert!(why.contains(&format!("{owner:?}")) && why.contains("--uid-base"), "{first}: {why}");
        }
        assert_eq!(overlap(34_464, "/etc/subuid", text), None, "ends where alice's range begins");
        assert_eq!(overlap(231_072, "/etc/subuid", text), None, "begins where bob's range ends");
        // Every range that `useradd` allocates (SUB_UID_MIN to SUB_UID_MAX of login.defs(5)), and
        // LXD's.
        assert_eq!(overlap(FIRST, "/etc/subuid", "any:100000:600000001\nroot:1000000:1000000000"), None);
        assert!(overlap(FIRST, "/etc/subgid", "all:0:4294967295").unwrap().contains("/etc/subgid"));
    }
}
