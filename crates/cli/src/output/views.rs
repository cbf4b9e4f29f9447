//! Every response as a table.

use super::format::{age, mib, milli, millis, moment, price};
use super::table::{Table, Tone};
use roost_types::api::{
    Accounts, Bill, Hosts, Images, Instance, InstanceTiming, InstanceTypes, KeyPairs, StateChanges, Volumes,
};
use roost_types::{InstanceState, Micros};

fn or_dash(text: Option<&str>) -> String {
    text.filter(|text| !text.is_empty()).unwrap_or("-").to_owned()
}

fn tone(state: InstanceState) -> Tone {
    match state {
        InstanceState::Running => Tone::Good,
        InstanceState::Pending | InstanceState::Stopping | InstanceState::ShuttingDown => Tone::Busy,
        InstanceState::Stopped | InstanceState::Terminated => Tone::Plain,
    }
}

/// Instances.
pub fn instances(instances: &[Instance], accounts: bool, now: Micros) -> Table {
    let mut table =
        Table::new("No instances.").text("ID", 0).text("NAME", 0).text("STATE", 0).text("TYPE", 2);
    if accounts {
        table = table.text("ACCOUNT", 2);
    }
    table = table
        .text("IMAGE", 5)
        .text("PUBLIC-IP", 3)
        .text("PRIVATE-IP", 6)
        .number("USED(s)", 1)
        .number("BILLED(s)", 1)
        .number("AGE", 4);
    for instance in instances {
        let plain = |text: String| (text, Tone::Plain);
        let state = match instance.trouble {
            Some(_) => (format!("{} (!)", instance.state), Tone::Bad),
            None => (instance.state.to_string(), tone(instance.state)),
        };
        let first = [
            plain(instance.instance_id.to_string()),
            plain(or_dash(instance.tags.get("Name").map(String::as_str))),
            state,
            plain(instance.instance_type.clone()),
        ];
        let last = [
            plain(instance.image_name.clone()),
            plain(instance.public_ip.to_string()),
            plain(instance.private_ip.to_string()),
            plain(instance.used_seconds.to_string()),
            plain(instance.billed_seconds.to_string()),
            plain(age(instance.launched_at, now)),
        ];
        let [a, b, c, d] = first;
        let [e, f, g, h, i, j] = last;
        if accounts {
            table.toned([a, b, c, d, plain(instance.account_id.to_string()), e, f, g, h, i, j]);
        } else {
            table.toned([a, b, c, d, e, f, g, h, i, j]);
        }
    }
    table
}

/// All about one instance, a line each.
pub fn instance(instance: &Instance, now: Micros) -> String {
    let mut lines: Vec<(&str, String)> = vec![
        ("id", instance.instance_id.to_string()),
        ("name", or_dash(instance.tags.get("Name").map(String::as_str))),
        ("state", format!("{} (step {})", instance.state, instance.step)),
    ];
    if let Some(reason) = &instance.state_reason {
        lines.push(("reason", format!("{} ({})", reason.message, reason.code)));
    }
    if let Some(trouble) = &instance.trouble {
        lines.push(("trouble", format!("{trouble} (being tried again)")));
    }
    let guest = match (&instance.ssh_host_key, instance.guest_ready) {
        (Some(key), true) => format!("ready, {key}"),
        (Some(key), false) => format!("not ready, {key}"),
        (None, true) => "ready".to_owned(),
        (None, false) => "not ready".to_owned(),
    };
    lines.push(("guest", guest));
    if let Some(form) = instance.user_data_not_run {
        lines.push(("user data", format!("not run: {}", form.why_not_run())));
    }
    lines.extend([
        (
            "type",
            format!("{}, {} vCPU, {}", instance.instance_type, instance.vcpus, mib(instance.memory_mib)),
        ),
        ("image", format!("{} ({})", instance.image_name, instance.image_id)),
        ("login", format!("{}, key pair {}", instance.default_user, or_dash(instance.key_name.as_deref()))),
        ("public ip", instance.public_ip.to_string()),
        (
            "private ip",
            format!("{} ({}, {})", instance.private_ip, instance.interface_id, instance.subnet_id),
        ),
        ("network", instance.vpc_id.to_string()),
        ("volume", format!("{}, {} GiB", instance.root_volume_id, instance.root_volume_gib)),
        ("account", instance.account_id.to_string()),
        (
            "place",
            format!(
                "{}, {}, host {}",
                instance.region,
                instance.zone,
                or_dash(instance.host_id.as_ref().map(roost_types::HostId::as_str))
            ),
        ),
        ("launched", format!("{} ({} ago)", moment(instance.launched_at), age(instance.launched_at, now))),
        ("running since", or_dash(instance.running_since.map(moment).as_deref())),
        ("launch", format!("{}, number {}", instance.reservation_id, instance.launch_index)),
        ("starts", format!("{} (generation {})", instance.incarnation, instance.generation)),
        ("used", format!("{} s", instance.used_seconds)),
        ("billed", format!("{} s", instance.billed_seconds)),
    ]);
    let tags: Vec<String> = instance.tags.iter().map(|(key, value)| format!("{key}={value}")).collect();
    if !tags.is_empty() {
        lines.push(("tags", tags.join(", ")));
    }
    // Every value is made harmless on its own: a line end in one must not begin another.
    lines.into_iter().map(|(name, value)| format!("{name:<14}{}\n", crate::harmless::text(&value))).collect()
}

/// The parts of a start.
pub fn timing(timing: &InstanceTiming) -> Table {
    let mut table = Table::new("No start has been timed yet.").text("PART", 0).number("TOOK(ms)", 0);
    for part in &timing.parts {
        table.row([part.part.clone(), millis(part.took_us)]);
    }
    table
}

/// Changes of state.
pub fn changes(changes: &StateChanges) -> Table {
    let mut table = Table::new("Nothing changed.").text("ID", 0).text("WAS", 0).text("IS", 0);
    for change in &changes.changes {
        table.toned([
            (change.instance_id.to_string(), Tone::Plain),
            (change.previous.to_string(), Tone::Plain),
            (change.current.to_string(), tone(change.current)),
        ]);
    }
    table
}

/// Accounts.
pub fn accounts(accounts: &Accounts, now: Micros) -> Table {
    let mut table =
        Table::new("No accounts.").text("ACCOUNT", 0).text("NAME", 0).text("ADMIN", 1).number("AGE", 2);
    for account in &accounts.accounts {
        table.row([
            account.account_id.to_string(),
            account.name.clone(),
            if account.admin { "yes" } else { "no" }.to_owned(),
            age(account.created_at, now),
        ]);
    }
    table
}

/// Key pairs.
pub fn key_pairs(pairs: &KeyPairs, now: Micros) -> Table {
    let mut table = Table::new("No key pairs. `roost key create NAME` makes one.")
        .text("NAME", 0)
        .text("ID", 1)
        .text("FINGERPRINT", 2)
        .number("AGE", 3);
    for pair in &pairs.key_pairs {
        table.row([
            pair.key_name.clone(),
            pair.key_pair_id.to_string(),
            pair.fingerprint.clone(),
            age(pair.created_at, now),
        ]);
    }
    table
}

/// Images.
pub fn images(images: &Images, now: Micros) -> Table {
    let mut table = Table::new("No images. `roost image import DIR` adds one.")
        .text("ID", 0)
        .text("NAME", 0)
        .number("MIN-GIB", 1)
        .text("LOGIN", 3)
        .text("SSH", 3)
        .text("PUBLIC", 4)
        .text("OWNER", 5)
        .number("AGE", 2)
        .text("DESCRIPTION", 6);
    for image in &images.images {
        table.row([
            image.image_id.to_string(),
            image.name.clone(),
            image.min_volume_gib.to_string(),
            image.default_user.clone(),
            match image.ssh {
                Some(true) => "yes",
                Some(false) => "no",
                None => "-",
            }
            .to_owned(),
            if image.public { "yes" } else { "no" }.to_owned(),
            image.owner.to_string(),
            age(image.created_at, now),
            image.description.clone(),
        ]);
    }
    table
}

/// Instance types.
pub fn types(types: &InstanceTypes) -> Table {
    let mut table = Table::new("No such instance types.")
        .text("TYPE", 0)
        .number("VCPU", 0)
        .number("MEMORY", 0)
        .number("CPU", 2)
        .number("PER-HOUR", 0)
        .text("CURRENCY", 1)
        .text("RUNS HERE", 0);
    for priced in &types.instance_types {
        let kind = &priced.instance_type;
        let cpu = match kind.credits_per_hour_milli {
            Some(_) => {
                format!("{} of {}", milli(kind.cpu_claim_milli.into()), milli(kind.cpu_max_milli.into()))
            }
            None => milli(kind.cpu_max_milli.into()),
        };
        let here = match &priced.unsupported {
            None => ("yes".to_owned(), Tone::Good),
            Some(why) => (format!("no: {why}"), Tone::Bad),
        };
        let plain = |text: String| (text, Tone::Plain);
        table.toned([
            plain(kind.name.clone()),
            plain(kind.vcpus.to_string()),
            plain(mib(kind.memory_mib)),
            plain(cpu),
            plain(priced.price_per_hour.map_or_else(|| "-".to_owned(), price)),
            plain(types.currency.to_string()),
            here,
        ]);
    }
    table
}

/// Hosts.
pub fn hosts(hosts: &Hosts, now: Micros) -> Table {
    let mut table = Table::new("No hosts. An agent makes one: docs/operate.md.")
        .text("HOST", 0)
        .text("NAME", 0)
        .text("STATE", 0)
        .text("ZONE", 3)
        .number("INSTANCES", 1)
        .number("CPU", 1)
        .number("MEMORY(MiB)", 1)
        .number("DISK(GiB)", 2)
        .number("REPORTED", 2);
    for host in &hosts.hosts {
        let plain = |text: String| (text, Tone::Plain);
        let state = if host.alive { ("alive", Tone::Good) } else { ("silent", Tone::Bad) };
        table.toned([
            plain(host.facts.host_id.to_string()),
            plain(host.facts.hostname.clone()),
            (state.0.to_owned(), state.1),
            plain(host.facts.zone.clone()),
            plain(host.instances.to_string()),
            plain(format!("{}/{}", milli(host.claimed_cpu_milli), milli(host.facts.cpu_milli))),
            plain(format!("{}/{}", host.claimed_memory_mib, host.facts.memory_mib)),
            plain(format!("{}/{}", host.claimed_disk_gib, host.facts.disk_gib)),
            plain(format!("{} ago", age(host.last_report_at, now))),
        ]);
        for sentence in &host.trouble {
            table.note(format!("{}: {sentence}", host.facts.hostname));
        }
        for orphan in &host.orphans {
            let id = &orphan.instance_id;
            table.note(format!(
                "{}: {id} ({}, {}, of account {}) is here, and the database does not know it: nobody is billed. \
                 `roost hosts --end-orphan {id}` removes it and its disk",
                host.facts.hostname, orphan.instance_type, orphan.state, orphan.account
            ));
        }
    }
    for sentence in &hosts.trouble {
        table.note(format!("controller: {sentence}"));
    }
    table
}

/// Volumes.
pub fn volumes(volumes: &Volumes, now: Micros) -> Table {
    let mut table = Table::new("No volumes.")
        .text("VOLUME", 0)
        .text("STATE", 0)
        .number("GIB", 0)
        .text("INSTANCE", 1)
        .number("AGE", 2);
    for volume in &volumes.volumes {
        table.row([
            volume.volume_id.to_string(),
            volume.state.to_string(),
            volume.size_gib.to_string(),
            or_dash(volume.instance_id.as_ref().map(roost_types::InstanceId::as_str)),
            age(volume.created_at, now),
        ]);
    }
    table
}

/// A bill: its lines and their sum, every amount to the nano-unit, so that adding up what is shown gives the total.
pub fn bill(bill: &Bill) -> Table {
    let mut table = Table::new("")
        .text("FOR", 0)
        .text("METER", 3)
        .text("TYPE", 2)
        .number("USED", 1)
        .number("BILLED", 1)
        .number("AMOUNT", 0)
        .text("CURRENCY", 0);
    for line in &bill.lines {
        table.row([
            line.group.clone(),
            line.meter.clone(),
            or_dash(Some(&line.sku)),
            line.used.to_string(),
            line.billed.to_string(),
            line.amount.to_decimal(),
            bill.currency.to_string(),
        ]);
    }
    let nothing = String::new;
    table.row([
        "TOTAL".to_owned(),
        nothing(),
        nothing(),
        nothing(),
        nothing(),
        bill.total.to_decimal(),
        bill.currency.to_string(),
    ]);
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::samples;

    fn shown(table: Table) -> String {
        table.render_within(None, false).0
    }

    #[test]
    fn instances_as_a_table() {
        insta::assert_snapshot!(shown(instances(&samples::instances(), false, samples::NOW)));
        insta::assert_snapshot!(shown(instances(&samples::instances(), true, samples::NOW)));
        insta::assert_snapshot!(
            instances(&samples::instances(), false, samples::NOW).render_within(Some(80), false).0
        );
        insta::assert_snapshot!(shown(instances(&[], false, samples::NOW)));
    }

    #[test]
    fn one_instance_in_full() {
        insta::assert_snapshot!(instance(&samples::instance(), samples::NOW));
    }

    #[test]
    fn user_data_that_was_not_run_is_named_with_the_way_out() {
        let mut told = samples::instance();
        told.user_data_not_run = Some(roost_types::UserDataForm::CloudConfig);
        let shown = instance(&told, samples::NOW);
        let line = shown.lines().find(|line| line.starts_with("user data")).unwrap();
        assert!(
            line.ends_with("not run: cloud-config needs an image with cloud-init, such as debian-12"),
            "{line}"
        );
    }

    #[test]
    fn a_tag_cannot_forge_a_line_of_the_description() {
        let mut forged = samples::instance();
        forged.tags.insert("x".into(), "y\nstate         terminated".into());
        let shown = instance(&forged, samples::NOW);
        assert_eq!(shown.lines().filter(|line| line.starts_with("state ")).count(), 1, "{shown}");
    }

    #[test]
    fn the_other_lists_as_tables() {
        insta::assert_snapshot!(shown(timing(&samples::timing())));
        insta::assert_snapshot!(shown(changes(&samples::changes())));
        insta::assert_snapshot!(shown(accounts(&samples::accounts(), samples::NOW)));
        insta::assert_snapshot!(shown(key_pairs(&samples::key_pairs(), samples::NOW)));
        insta::assert_snapshot!(shown(images(&samples::images(), samples::NOW)));
        insta::assert_snapshot!(shown(types(&samples::types())));
        insta::assert_snapshot!(shown(hosts(&samples::hosts(), samples::NOW)));
        insta::assert_snapshot!(shown(volumes(&samples::volumes(), samples::NOW)));
    }

    #[test]
    fn a_bill_shows_amounts_that_add_up_to_its_total() {
        let bill_shown = shown(bill(&samples::bill()));
        let amounts: Vec<f64> = bill_shown
            .lines()
            .skip(1)
            .map(|line| line.split_whitespace().rev().nth(1).unwrap().parse().unwrap())
            .collect();
        let (total, lines) = amounts.split_last().unwrap();
        assert!((lines.iter().sum::<f64>() - total).abs() < 1e-12, "{bill_shown}");
        insta::assert_snapshot!(bill_shown);
    }
}
