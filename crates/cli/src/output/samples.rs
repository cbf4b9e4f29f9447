//! Responses to draw in tests.

use roost_types::agent::{HostFacts, TimedPart};
use roost_types::api::*;
use roost_types::{Currency, InstanceState, InstanceType, Micros, Money, Step, state::VolumeState};

/// The time of every sample.
pub const NOW: Micros = Micros(1_795_176_000_000_000);

fn ago(seconds: i64) -> Micros {
    NOW - Micros::from_secs(seconds)
}

/// A running instance.
pub fn instance() -> Instance {
    Instance {
        instance_id: "i-0a1b2c3d4e5f60718".parse().unwrap(),
        account_id: "123456789012".parse().unwrap(),
        reservation_id: "r-0a1b2c3d4e5f60718".parse().unwrap(),
        launch_index: 0,
        state: InstanceState::Running,
        step: Step::Run,
        state_reason: None,
        trouble: None,
        instance_type: "t3.micro".into(),
        vcpus: 2,
        memory_mib: 1024,
        image_id: "ami-0a1b2c3d4e5f60718".parse().unwrap(),
        image_name: "debian-12".into(),
        default_user: "admin".into(),
        key_name: Some("home".into()),
        host_id: Some("h-0a1b2c3d4e5f60718".parse().unwrap()),
        region: "home-1".into(),
        zone: "home-1a".into(),
        vpc_id: "vpc-0a1b2c3d4e5f60718".parse().unwrap(),
        subnet_id: "subnet-0a1b2c3d4e5f60718".parse().unwrap(),
        interface_id: "eni-0a1b2c3d4e5f60718".parse().unwrap(),
        private_ip: [172, 31, 0, 10].into(),
        public_ip: [100, 64, 0, 5].into(),
        root_volume_id: "vol-0a1b2c3d4e5f60718".parse().unwrap(),
        root_volume_gib: 8,
        tags: [("Name".to_owned(), "web".to_owned()), ("team".to_owned(), "a".to_owned())].into(),
        metadata_options: Default::default(),
        launched_at: ago(200),
        running_since: Some(ago(190)),
        incarnation: 1,
        generation: 1,
        guest_ready: true,
        ssh_host_key: Some(
            "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIEDkUaVuEhsBX0XW1jzDBwTBz9R9nuzfZ4UH0u8YcQ4k".into(),
        ),
        user_data_not_run: None,
        used_seconds: 190,
        billed_seconds: 190,
    }
}

/// A running, a stopped and a troubled instance.
pub fn instances() -> Vec<Instance> {
    let stopped = Instance {
        instance_id: "i-0b1b2c3d4e5f60718".parse().unwrap(),
        state: InstanceState::Stopped,
        step: Step::Rest,
        tags: Tags::new(),
        used_seconds: 20,
        billed_seconds: 60,
        launched_at: ago(90_000),
        ..instance()
    };
    let pending = Instance {
        instance_id: "i-0c1b2c3d4e5f60718".parse().unwrap(),
        state: InstanceState::Pending,
        step: Step::Launch,
        instance_type: "home1.small".into(),
        tags: [("Name".to_owned(), "bad\u{1b}]0;x\u{7}".to_owned())].into(),
        trouble: Some("no space left on device".into()),
        used_seconds: 0,
        billed_seconds: 0,
        launched_at: ago(4),
        ..instance()
    };
    vec![instance(), stopped, pending]
}

/// A start in parts.
pub fn timing() -> InstanceTiming {
    let part = |part: &str, took_us| TimedPart { part: part.into(), took_us };
    InstanceTiming {
        instance_id: instance().instance_id,
        incarnation: 1,
        parts: vec![part("api", 1234), part("agent.network", 45_678), part("guest", 1_234_567)],
    }
}

/// One change.
pub fn changes() -> StateChanges {
    let (previous, current) = (InstanceState::Running, InstanceState::Stopping);
    StateChanges { changes: vec![StateChange { instance_id: instance().instance_id, previous, current }] }
}

/// Two accounts.
pub fn accounts() -> Accounts {
    let account = |id: &str, name: &str, admin| Account {
        account_id: id.parse().unwrap(),
        name: name.into(),
        admin,
        created_at: ago(86_400),
    };
    Accounts {
        accounts: vec![account("123456789012", "admin", true), account("210987654321", "alice", false)],
    }
}

/// One key pair.
pub fn key_pairs() -> KeyPairs {
    KeyPairs {
        key_pairs: vec![KeyPair {
            key_pair_id: "key-0a1b2c3d4e5f60718".parse().unwrap(),
            key_name: "home".into(),
            fingerprint: "SHA256:2KnY0Sg3h0vVRCYVYlSBfUXyNT8PfG5CcWQ9OQdwTDs".into(),
            public_key: "ssh-ed25519 AAAA".into(),
            created_at: ago(30),
        }],
    }
}

/// One image.
pub fn images() -> Images {
    Images {
        images: vec![Image {
            image_id: "ami-0a1b2c3d4e5f60718".parse().unwrap(),
            owner: "123456789012".parse().unwrap(),
            name: "debian-12".into(),
            description: "Debian 12, minimal".into(),
            public: true,
            min_volume_gib: 2,
            boot_args: "console=ttyS0".into(),
            default_user: "admin".into(),
            ssh: Some(true),
            created_at: ago(3600),
        }],
    }
}

/// A burstable type, a plain one, and one that cannot run.
pub fn types() -> InstanceTypes {
    let kind = |name: &str, vcpus: u32, memory_mib, claim, credits| InstanceType {
        name: name.into(),
        family: name.split('.').next().unwrap().into(),
        category: "general".into(),
        vcpus,
        memory_mib,
        cpu_max_milli: vcpus * 1000,
        cpu_claim_milli: claim,
        credits_per_hour_milli: credits,
        gpus: 0,
        instance_store_gb: 0,
    };
    let priced = |instance_type, nanos, unsupported: Option<&str>| PricedType {
        instance_type,
        price_per_hour: Some(Money(nanos)),
        unsupported: unsupported.map(str::to_owned),
    };
    InstanceTypes {
        instance_types: vec![
            priced(kind("t3.nano", 2, 512, 100, Some(6000)), 5_200_000, None),
            priced(kind("m5.large", 2, 8192, 2000, None), 96_000_000, None),
            priced(
                kind("m5.24xlarge", 96, 393_216, 96_000, None),
                4_608_000_000,
                Some("needs 96 vCPUs, at most 32"),
            ),
        ],
        currency: Currency::USD,
    }
}

/// One live host with a trouble, and one silent host.
pub fn hosts() -> Hosts {
    let host = |id: &str, name: &str, alive, seconds| HostView {
        facts: HostFacts {
            host_id: id.parse().unwrap(),
            hostname: name.into(),
            zone: "home-1a".into(),
            cpus: 4,
            cpu_milli: 4000,
            memory_mib: 7000,
            disk_gib: 100,
            max_vcpus: 32,
            overhead_mib: 16,
            gpus: 0,
        },
        claimed_cpu_milli: 500,
        claimed_memory_mib: 2080,
        claimed_disk_gib: 16,
        instances: 2,
        last_report_at: ago(seconds),
        alive,
        trouble: vec![],
        orphans: vec![],
    };
    let box_ = HostView {
        trouble: vec!["the firewall's table was removed and is there again".into()],
        ..host("h-0a1b2c3d4e5f60718", "box", true, 2)
    };
    Hosts { hosts: vec![box_, host("h-0b1b2c3d4e5f60718", "nuc", false, 400)], trouble: Vec::new() }
}

/// One volume.
pub fn volumes() -> Volumes {
    Volumes {
        volumes: vec![Volume {
            volume_id: "vol-0a1b2c3d4e5f60718".parse().unwrap(),
            state: VolumeState::InUse,
            size_gib: 8,
            instance_id: Some(instance().instance_id),
            created_at: ago(200),
        }],
    }
}

/// A bill of an instance and its volume.
pub fn bill() -> Bill {
    let line = |group: &str, meter: &str, sku: &str, used, billed, amount| BillLine {
        group: group.into(),
        meter: meter.into(),
        sku: sku.into(),
        used,
        billed,
        amount: Money(amount),
    };
    Bill {
        since: ago(3600),
        until: NOW,
        currency: Currency::USD,
        lines: vec![
            line("i-0a1b2c3d4e5f60718", "instance-seconds", "t3.micro", 20, 60, 173_333),
            line("vol-0a1b2c3d4e5f60718", "volume-gib-seconds", "gp3", 1600, 1600, 49_383),
        ],
        total: Money(222_716),
    }
}
