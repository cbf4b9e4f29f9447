//! Properties of placement, against brute force.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use proptest::prelude::*;
use roost_placement::{Host, PlacementError, Refusal, Wanted, place, refusal, unsupported};
use roost_types::agent::HostFacts;
use roost_types::{HostId, InstanceType};
use std::collections::BTreeMap;

fn host(number: u8, cpus: u32, memory_mib: u64) -> Host {
    Host {
        facts: HostFacts {
            host_id: HostId::from_random([number; 9]),
            hostname: format!("host-{number}"),
            zone: "home-1a".into(),
            cpus,
            cpu_milli: u64::from(cpus) * 1000,
            memory_mib,
            disk_gib: 100,
            max_vcpus: cpus,
            overhead_mib: 16,
            gpus: 0,
        },
        claimed_cpu_milli: 0,
        claimed_memory_mib: 0,
        claimed_disk_gib: 0,
        alive: true,
    }
}

fn kind(vcpus: u32, memory_mib: u64) -> InstanceType {
    InstanceType {
        name: "m5.test".into(),
        family: "m5".into(),
        category: "general".into(),
        vcpus,
        memory_mib,
        cpu_max_milli: vcpus * 1000,
        cpu_claim_milli: vcpus * 1000,
        credits_per_hour_milli: None,
        gpus: 0,
        instance_store_gb: 0,
    }
}

fn wanted(instance_type: &InstanceType) -> Wanted<'_> {
    Wanted { instance_type, volume_gib: 8, zone: None }
}

#[test]
fn instances_spread_over_hosts_by_relative_load() {
    let small = kind(1, 100);
    let hosts = [host(1, 4, 4000), host(2, 4, 4000), host(3, 8, 8000)];
    let chosen = place(&hosts, &wanted(&small), 4, 4).unwrap();
    let mut count = BTreeMap::new();
    chosen.iter().for_each(|id| *count.entry(id.clone()).or_insert(0) += 1);
    assert_eq!(count[&hosts[2].facts.host_id], 2, "the host of twice the size takes twice as many");
}

#[test]
fn too_large_even_for_an_empty_host_is_unsupported_with_the_reason() {
    let hosts = [host(1, 2, 4000)];
    let error = place(&hosts, &wanted(&kind(96, 100)), 1, 1).unwrap_err();
    assert!(matches!(error, PlacementError::Unsupported { .. }));
    let text = error.to_string();
    assert!(text.contains("at most 2 vCPUs") && text.contains("96 are needed"), "{text}");
    let mut gpu = kind(1, 100);
    gpu.gpus = 1;
    assert!(unsupported(&hosts, &wanted(&gpu)).unwrap().to_string().contains("has 0 GPUs"));
    // Exactly the host's memory does not fit: the monitor needs its own.
    let why = unsupported(&hosts, &wanted(&kind(1, 4000))).unwrap().to_string();
    assert!(why.contains("4016 MiB are needed"), "{why}");
    assert_eq!(unsupported(&hosts, &wanted(&kind(1, 3984))), None);
}

#[test]
fn a_disk_below_its_reserve_is_a_lack_of_capacity_not_of_support() {
    let mut full = host(1, 2, 4000);
    full.facts.disk_gib = 0;
    let hosts = [full];
    assert_eq!(unsupported(&hosts, &wanted(&kind(1, 100))), None);
    let error = place(&hosts, &wanted(&kind(1, 100)), 1, 1).unwrap_err();
    assert!(!matches!(error, PlacementError::Unsupported { .. }), "{error}");
    assert!(error.to_string().contains("disk"), "{error}");
}

#[test]
fn full_or_silent_hosts_are_a_lack_of_capacity_not_of_support() {
    let small = kind(1, 100);
    let mut full = host(1, 2, 4000);
    full.claimed_cpu_milli = 2000;
    let mut silent = host(2, 2, 4000);
    silent.alive = false;
    let error = place(&[full, silent], &wanted(&small), 1, 1).unwrap_err().to_string();
    assert!(error.contains("0 milli-CPUs free") && error.contains("not reported lately"), "{error}");
    let error = place(&[], &wanted(&small), 1, 1).unwrap_err().to_string();
    assert!(error.contains("no host has joined"), "{error}");
}

#[test]
fn tenants_are_told_reasons_and_counts_and_administrators_a_few_names() {
    let small = kind(1, 100);
    let hosts: Vec<_> = (0..250)
        .map(|n| {
            let mut host = host(n, 2, 4000);
            host.facts.hostname = format!("box-{n}");
            host.claimed_memory_mib = if n < 200 { 3950 } else { 0 };
            host.alive = n < 200;
            host
        })
        .collect();
    let error = place(&hosts, &wanted(&small), 1, 1).unwrap_err();
    let told = error.for_tenants();
    assert!(told.contains("too little memory free on 200 of 250 hosts"), "{told}");
    assert!(told.contains("no recent report on 50 of 250 hosts"), "{told}");
    assert!(!told.contains("box-") && !told.contains("MiB"), "{told}");
    let named = error.to_string();
    assert!(named.contains("host box-0 has 50 MiB free, 116 MiB are needed"), "{named}");
    assert!(named.contains("and 240 more hosts") && named.len() < 1500, "{named}");
}

#[test]
fn a_disk_is_full_by_the_sizes_of_the_volumes_on_it() {
    let small = kind(1, 100);
    let mut full = host(1, 4, 4000);
    full.claimed_disk_gib = 93;
    let error = place(&[full.clone()], &wanted(&small), 1, 1).unwrap_err();
    assert!(matches!(error, PlacementError::Insufficient { .. }), "{error}");
    assert!(error.to_string().contains("7 GiB of disk free for volumes, 8 GiB are needed"), "{error}");
    // An instance whose volume is on the host needs no more disk.
    assert_eq!(refusal(&full, &Wanted { volume_gib: 0, ..wanted(&small) }), None);
    let larger = Wanted { volume_gib: 101, ..wanted(&small) };
    assert!(matches!(place(&[full], &larger, 1, 1), Err(PlacementError::Unsupported { .. })));
}

#[test]
fn between_min_and_max_as_many_as_fit_are_placed() {
    let small = kind(1, 100);
    let hosts = [host(1, 2, 4000)];
    assert_eq!(place(&hosts, &wanted(&small), 1, 10).unwrap().len(), 2);
    assert!(matches!(
        place(&hosts, &wanted(&small), 3, 10),
        Err(PlacementError::Insufficient { room: 2, wanted: 3, .. })
    ));
}

#[test]
fn a_zone_that_is_named_is_kept() {
    let small = kind(1, 100);
    let hosts = [host(1, 2, 4000)];
    let elsewhere = Wanted { zone: Some("home-1b"), ..wanted(&small) };
    assert_eq!(refusal(&hosts[0], &elsewhere), Some(Refusal::Zone { has: "home-1a".into() }));
}

prop_compose! {
    fn any_host(number: u8)(
        cpus in 1_u32..8,
        memory in 0_u64..5000,
        cpu_claim in 0_u64..9000,
        memory_claim in 0_u64..6000,
        disk_claim in 0_u64..120,
        alive in any::<bool>(),
    ) -> Host {
        Host {
            claimed_cpu_milli: cpu_claim,
            claimed_memory_mib: memory_claim,
            claimed_disk_gib: disk_claim,
            alive,
            ..host(number, cpus, memory)
        }
    }
}

fn any_hosts() -> impl Strategy<Value = Vec<Host>> {
    (0_u8..5).prop_flat_map(|n| (0..n).map(any_host).collect::<Vec<_>>())
}

/// How many fit, counted one host at a time without looking at the code above.
fn brute_force(hosts: &[Host], kind: &InstanceType) -> u64 {
    let of_host = |host: &Host| {
        let mut count = 0;
        let fits = |n: u64| {
            host.alive
                && kind.vcpus <= host.facts.cpus
                && host.claimed_cpu_milli + n * u64::from(kind.vcpus) * 1000 <= host.facts.cpu_milli
                && host.claimed_memory_mib + n * (kind.memory_mib + 16) <= host.facts.memory_mib
                && host.claimed_disk_gib + n * 8 <= host.facts.disk_gib
        };
        while fits(count + 1) {
            count += 1;
        }
        count
    };
    hosts.iter().map(of_host).sum()
}

proptest! {
    #[test]
    fn never_over_capacity_never_a_no_where_there_is_room_and_the_order_of_hosts_does_not_matter(
        hosts in any_hosts(), vcpus in 1_u32..6, memory in 1_u64..3000, min in 1_usize..6, extra in 0_usize..6,
    ) {
        let kind = kind(vcpus, memory);
        let room = usize::try_from(brute_force(&hosts, &kind)).unwrap();
        let max = min + extra;
        let answer = place(&hosts, &wanted(&kind), min, max);
        let mut reversed = hosts.clone();
        reversed.reverse();
        prop_assert_eq!(&answer, &place(&reversed, &wanted(&kind), min, max));
        match answer {
            Ok(chosen) => {
                prop_assert_eq!(chosen.len(), room.min(max));
                for host in &hosts {
                    let here = chosen.iter().filter(|id| **id == host.facts.host_id).count() as u64;
                    if here > 0 {
                        prop_assert!(host.alive);
                        prop_assert!(
                            host.claimed_cpu_milli + here * u64::from(vcpus) * 1000 <= host.facts.cpu_milli);
                        prop_assert!(
                            host.claimed_memory_mib + here * (memory + 16) <= host.facts.memory_mib);
                        prop_assert!(host.claimed_disk_gib + here * 8 <= host.facts.disk_gib);
                    }
                }
            }
            Err(PlacementError::Insufficient { room: said, .. }) => {
                prop_assert!(room < min);
                prop_assert_eq!(said, room);
            }
            Err(PlacementError::Unsupported { .. }) => {
                let empty: Vec<_> = hosts.iter().cloned()
                    .map(|host| Host {
                        claimed_cpu_milli: 0,
                        claimed_memory_mib: 0,
                        claimed_disk_gib: 0,
                        alive: true,
                        ..host
                    })
                    .collect();
                prop_assert_eq!(brute_force(&empty, &kind), 0);
            }
        }
    }
}
