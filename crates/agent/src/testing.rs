//! Values that tests build on.

use roost_types::agent::{
    CpuSpec, Ensure, ImageSpec, IngressRule, InstanceSpec, InterfaceSpec, MetadataSpec, Protocol, VolumeSpec,
};
use roost_types::ids::{BlobId, ImageId, InstanceId, InterfaceId, ReservationId, VolumeId};
use roost_types::state::DesiredState;

/// The `ensure` of a small running instance, made from `seed` alone apart from its generation.
pub fn ensure_of(seed: u8, generation: u64) -> Ensure {
    let random = [seed; 9];
    Ensure {
        instance_id: InstanceId::from_random(random),
        generation,
        spec: InstanceSpec {
            account: roost_types::ids::AccountId::from_random([seed; 8]),
            desired: DesiredState::Running,
            incarnation: 1,
            reboots: 0,
            force: false,
            cpu: CpuSpec {
                family: "t3".into(),
                vcpus: 1,
                max_milli: 500,
                weight: 100,
                credits_per_hour_milli: None,
            },
            memory_mib: 128,
            image: ImageSpec {
                image_id: ImageId::from_random(random),
                kernel: BlobId::from_sha256([1; 32]),
                initrd: None,
                root: BlobId::from_sha256([2; 32]),
                boot_args: "console=ttyS0".into(),
                root_bytes: None,
            },
            root_volume: VolumeSpec {
                volume_id: VolumeId::from_random(random),
                size_gib: 1,
                delete_on_termination: true,
            },
            interface: InterfaceSpec {
                interface_id: InterfaceId::from_random(random),
                mac: format!("06:00:0a:00:00:{seed:02x}"),
                private_ip: std::net::Ipv4Addr::new(172, 31, 0, seed),
                prefix_len: 20,
                gateway: std::net::Ipv4Addr::new(172, 31, 0, 1),
                public_ip: std::net::Ipv4Addr::new(100, 64, 0, seed),
                // A literal that parses.
                ingress: "0.0.0.0/0"
                    .parse()
                    .map(|source| {
                        vec![IngressRule { protocol: Protocol::Tcp, from_port: 22, to_port: 22, source }]
                    })
                    .unwrap_or_default(),
            },
            metadata: MetadataSpec {
                reservation_id: ReservationId::from_random(random),
                launch_index: 0,
                hostname: format!("ip-172-31-0-{seed}"),
                instance_type: "t3.nano".into(),
                region: "home-1".into(),
                zone: "home-1a".into(),
                public_keys: vec![("mine".into(), "ssh-ed25519 AAAA mine".into())],
                user_data: None,
                tags: [("Name".to_owned(), "web".to_owned())].into(),
                options: Default::default(),
            },
        },
        volume_made: false,
    }
}

/// [`ensure_of`] seed 5.
pub fn ensure(generation: u64) -> Ensure {
    ensure_of(5, generation)
}
