//! What the metadata service says: a tree of texts as EC2's instance metadata has it, built once per `ensure`.

use roost_types::agent::{Ensure, InstanceSpec, MetadataOptions};
use std::collections::BTreeMap;

/// Versions that EC2 has had and clients ask for; all give the same tree here.
pub const VERSIONS: [&str; 4] = ["1.0", "2009-04-04", "2021-03-23", "latest"];

/// The tree: full paths without a leading slash, such as `meta-data/local-ipv4`, to their text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tree {
    leaves: BTreeMap<String, Vec<u8>>,
    options: MetadataOptions,
}

/// What a path names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// A text.
    Text(Vec<u8>),
    /// A JSON text.
    Json(Vec<u8>),
    /// Nothing.
    Nothing,
}

impl Tree {
    /// The tree of an instance. `user_data` is base64 in the spec; what does not decode is served as it came.
    pub fn new(ensure: &Ensure) -> Self {
        let mut tree = Self::default();
        let InstanceSpec { metadata, interface, image, account, .. } = &ensure.spec;
        tree.options = metadata.options;
        let id = ensure.instance_id.as_str();
        let private = interface.private_ip.to_string();
        let public = interface.public_ip.to_string();
        for (path, text) in [
            ("ami-id", image.image_id.as_str()),
            ("ami-launch-index", &metadata.launch_index.to_string()),
            ("ami-manifest-path", "(unknown)"),
            ("hostname", &metadata.hostname),
            ("instance-action", "none"),
            ("instance-id", id),
            ("instance-life-cycle", "on-demand"),
            ("instance-type", &metadata.instance_type),
            ("local-hostname", &metadata.hostname),
            ("local-ipv4", &private),
            ("mac", &interface.mac),
            ("placement/availability-zone", &metadata.zone),
            ("placement/region", &metadata.region),
            ("profile", "default-hvm"),
            ("public-ipv4", &public),
            ("reservation-id", metadata.reservation_id.as_str()),
            ("security-groups", "default"),
            ("services/domain", "amazonaws.com"),
            ("services/partition", "aws"),
        ] {
            tree.put(&format!("meta-data/{path}"), text);
        }
        tree.interface(ensure);
        for (number, (_, line)) in metadata.public_keys.iter().enumerate() {
            tree.put(&format!("meta-data/public-keys/{number}/openssh-key"), &format!("{line}\n"));
        }
        for (key, value) in metadata.tags.iter().filter(|(key, _)| fits_a_path(key)) {
            tree.put(&format!("meta-data/tags/instance/{key}"), value);
        }
        if let Some(data) = &metadata.user_data {
            use base64::Engine;
            let bytes = base64::engine::general_purpose::STANDARD.decode(data);
            tree.leaves.insert("user-data".into(), bytes.unwrap_or_else(|_| data.clone().into_bytes()));
        }
        let document = serde_json::json!({
            "accountId": account.as_str(),
            "architecture": "x86_64",
            "availabilityZone": metadata.zone,
            "imageId": image.image_id.as_str(),
            "instanceId": id,
            "instanceType": metadata.instance_type,
            "privateIp": private,
            "region": metadata.region,
            "version": "2017-09-30",
        });
        tree.put("dynamic/instance-identity/document", &format!("{document:#}"));
        // The names of keys appear in the listing only: `0=name`.
        let listing = metadata.public_keys.iter().enumerate().map(|(n, (name, _))| format!("{n}={name}"));
        tree.leaves.insert(KEY_LISTING.into(), listing.collect::<Vec<_>>().join("\n").into_bytes());
        tree
    }

    fn interface(&mut self, ensure: &Ensure) {
        let interface = &ensure.spec.interface;
        let base = format!("meta-data/network/interfaces/macs/{}", interface.mac);
        let subnet = ipnet::Ipv4Net::new(interface.private_ip, interface.prefix_len)
            .map_or_else(|_| String::new(), |net| net.trunc().to_string());
        for (path, text) in [
            ("device-number", "0"),
            ("interface-id", interface.interface_id.as_str()),
            ("local-hostname", &ensure.spec.metadata.hostname),
            ("local-ipv4s", &interface.private_ip.to_string()),
            ("mac", &interface.mac),
            ("owner-id", ensure.spec.account.as_str()),
            ("public-ipv4s", &interface.public_ip.to_string()),
            ("security-groups", "default"),
            ("subnet-ipv4-cidr-block", &subnet),
        ] {
            self.put(&format!("{base}/{path}"), text);
        }
        self.put(
            &format!("{base}/ipv4-associations/{}", interface.public_ip),
            &interface.private_ip.to_string(),
        );
    }

    fn put(&mut self, path: &str, text: &str) {
        self.leaves.insert(path.to_owned(), text.as_bytes().to_vec());
    }

    /// The instance's metadata options.
    pub const fn options(&self) -> MetadataOptions {
        self.options
    }

    /// Looks up a request path such as `/latest/meta-data/`.
    pub fn get(&self, path: &str) -> Found {
        let path = path.trim_start_matches('/');
        let (version, rest) = path.split_once('/').unwrap_or((path, ""));
        if version.is_empty() {
            return Found::Text(VERSIONS.join("\n").into_bytes());
        }
        if version != "latest" && version != "1.0" && !is_date(version) {
            return Found::Nothing;
        }
        let rest = rest.trim_end_matches('/');
        if rest == "meta-data/public-keys" {
            return match self.leaves.get(KEY_LISTING) {
                Some(text) if !text.is_empty() => Found::Text(text.clone()),
                _ => Found::Nothing,
            };
        }
        if let Some(text) = self.leaves.get(rest).filter(|_| rest != KEY_LISTING) {
            return if rest.starts_with("dynamic/") {
                Found::Json(text.clone())
            } else {
                Found::Text(text.clone())
            };
        }
        self.list(rest)
    }

    /// Entries of a folder, folders with a slash at the end, as EC2 lists them.
    fn list(&self, folder: &str) -> Found {
        let prefix = if folder.is_empty() { String::new() } else { format!("{folder}/") };
        let mut entries: Vec<String> = Vec::new();
        for path in self.leaves.keys().filter(|path| *path != KEY_LISTING) {
            let Some(rest) = path.strip_prefix(&prefix) else { continue };
            let entry = match rest.split_once('/') {
                Some((name, _)) => format!("{name}/"),
                None => rest.to_owned(),
            };
            if entries.last() != Some(&entry) {
                entries.push(entry);
            }
        }
        // The top level and its folders are named without slashes in EC2's listing of a version.
        if folder.is_empty() {
            entries.iter_mut().for_each(|entry| *entry = entry.trim_end_matches('/').to_owned());
        }
        if entries.is_empty() { Found::Nothing } else { Found::Text(entries.join("\n").into_bytes()) }
    }
}

/// A key that no request path can reach, as those are trimmed.
const KEY_LISTING: &str = "/public-keys";

/// EC2 allows only such keys in metadata.
fn fits_a_path(key: &str) -> bool {
    !key.is_empty()
        && key != "."
        && key != ".."
        && !key.contains('/')
        && !key.chars().any(char::is_whitespace)
}

fn is_date(text: &str) -> bool {
    let bytes = text.as_bytes();
    bytes.len() == 10
        && bytes
            .iter()
            .enumerate()
            .all(|(at, byte)| if matches!(at, 4 | 7) { *byte == b'-' } else { byte.is_ascii_digit() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::ensure;

    fn text(tree: &Tree, path: &str) -> String {
        match tree.get(path) {
            Found::Text(text) | Found::Json(text) => String::from_utf8(text).unwrap(),
            Found::Nothing => panic!("{path} is not there"),
        }
    }

    #[test]
    fn the_paths_of_ec2_are_there_under_every_version() {
        let tree = Tree::new(&ensure(1));
        assert_eq!(text(&tree, "/latest/meta-data/instance-id"), "i-05050505050505050");
        assert_eq!(text(&tree, "/2021-03-23/meta-data/local-ipv4"), "172.31.0.5");
        assert_eq!(text(&tree, "/1.0/meta-data/public-ipv4"), "100.64.0.5");
        assert_eq!(text(&tree, "/latest/meta-data/public-keys/"), "0=mine");
        assert_eq!(text(&tree, "/latest/meta-data/public-keys/0"), "openssh-key");
        assert_eq!(text(&tree, "/latest/meta-data/public-keys/0/openssh-key"), "ssh-ed25519 AAAA mine\n");
        assert_eq!(text(&tree, "/latest/meta-data/tags/instance/Name"), "web");
        assert_eq!(text(&tree, "/latest/meta-data/placement/availability-zone"), "home-1a");
        let mac = "/latest/meta-data/network/interfaces/macs/06:00:0a:00:00:05/";
        assert_eq!(text(&tree, &format!("{mac}subnet-ipv4-cidr-block")), "172.31.0.0/20");
        let document: serde_json::Value =
            serde_json::from_str(&text(&tree, "/latest/dynamic/instance-identity/document")).unwrap();
        assert_eq!(document["instanceType"], "t3.nano");
    }

    #[test]
    fn folders_are_listed() {
        let tree = Tree::new(&ensure(1));
        assert_eq!(text(&tree, "/latest/"), "dynamic\nmeta-data");
        let listing = text(&tree, "/latest/meta-data/");
        assert!(listing.contains("\nplacement/\n") && listing.contains("\ninstance-id\n"), "{listing}");
        assert_eq!(text(&tree, "/latest/meta-data/tags/"), "instance/");
        assert!(text(&tree, "/").ends_with("latest"));
    }

    #[test]
    fn user_data_is_decoded_and_absent_without_any() {
        let mut given = ensure(1);
        assert_eq!(Tree::new(&given).get("/latest/user-data"), Found::Nothing);
        given.spec.metadata.user_data = Some("IyEvYmluL3No".into());
        assert_eq!(text(&Tree::new(&given), "/latest/user-data"), "#!/bin/sh");
        assert!(text(&Tree::new(&given), "/latest").contains("user-data"));
    }

    #[test]
    fn what_is_not_there_is_not_found_and_no_key_escapes_its_folder() {
        let mut given = ensure(1);
        given.spec.metadata.tags.insert("../../user-data".into(), "x".into());
        given.spec.metadata.public_keys.clear();
        let tree = Tree::new(&given);
        for path in [
            "/latest/meta-data/nope",
            "/yesterday/",
            "/2021-3-23/",
            "/latest//public-keys",
            "/latest/meta-data/public-keys/",
        ] {
            assert_eq!(tree.get(path), Found::Nothing, "{path}");
        }
        assert_eq!(text(&tree, "/latest/meta-data/tags/instance"), "Name");
    }
}
