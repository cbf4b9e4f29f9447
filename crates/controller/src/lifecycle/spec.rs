//! From rows to what a host must make of them. Pure, and made of nothing but rows that do not change under one
//! generation: the same generation is the same spec, byte for byte.

use super::draft::wanted_at;
use roost_store::{ImageRow, InstanceRecord};
use roost_types::InstanceId;
use roost_types::agent::{
    CpuSpec, Desired, Ensure, ImageSpec, InstanceSpec, InterfaceSpec, MetadataSpec, VolumeSpec,
};
use roost_types::state::VolumeState;
use std::net::Ipv4Addr;

/// EC2's private host name of an address.
pub fn hostname(address: Ipv4Addr) -> String {
    let [a, b, c, d] = address.octets();
    format!("ip-{a}-{b}-{c}-{d}")
}

/// The spec of one instance.
pub fn ensure(record: &InstanceRecord, image: &ImageRow) -> Ensure {
    let InstanceRecord { row, interface, volume } = record;
    let kind = &row.instance_type;
    // cpu.weight is 100 for one claimed CPU: under contention everybody gets the share that was claimed.
    let weight = (kind.cpu_claim_milli / 10).clamp(1, 10_000);
    let spec = InstanceSpec {
        account: row.account_id.clone(),
        desired: wanted_at(row.step),
        incarnation: row.incarnation,
        reboots: row.reboots,
        force: row.force,
        cpu: CpuSpec {
            family: kind.family.clone(),
            vcpus: kind.vcpus,
            max_milli: kind.cpu_max_milli,
            weight,
            credits_per_hour_milli: kind.credits_per_hour_milli,
        },
        memory_mib: kind.memory_mib,
        image: ImageSpec {
            image_id: row.image_id.clone(),
            kernel: image.kernel.clone(),
            initrd: image.initrd.clone(),
            root: image.root.clone(),
            boot_args: image.image.boot_args.clone(),
            root_bytes: Some(image.root_bytes),
        },
        root_volume: VolumeSpec {
            volume_id: volume.volume_id.clone(),
            size_gib: volume.size_gib,
            delete_on_termination: volume.delete_on_termination,
        },
        interface: InterfaceSpec {
            interface_id: interface.interface_id.clone(),
            mac: interface.mac.clone(),
            private_ip: interface.private_ip,
            prefix_len: interface.prefix_len,
            gateway: interface.gateway,
            public_ip: interface.public_ip,
            ingress: interface.ingress.clone(),
        },
        metadata: MetadataSpec {
            reservation_id: row.reservation_id.clone(),
            launch_index: row.launch_index,
            hostname: hostname(interface.private_ip),
            instance_type: kind.name.clone(),
            region: row.region.clone(),
            zone: row.zone.clone(),
            public_keys: row.public_keys.clone(),
            user_data: row.user_data.clone(),
            tags: row.tags.clone(),
            options: row.metadata_options,
        },
    };
    Ensure {
        instance_id: row.instance_id.clone(),
        generation: row.generation,
        spec,
        volume_made: volume.state != VolumeState::Creating,
    }
}

/// Version of a host's desired state: a hash of every instance's id and generation and of the ended
/// ids. A restart of the controller does not change it.
pub fn version(instances: &[Ensure], end: &[InstanceId]) -> u64 {
    // FNV-1a, 64 bits.
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut eat = |bytes: &[u8]| {
        for byte in bytes {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    };
    for ensure in instances {
        eat(ensure.instance_id.as_str().as_bytes());
        eat(&ensure.generation.to_le_bytes());
    }
    end.iter().for_each(|id| eat(id.as_str().as_bytes()));
    hash
}

/// What a host must look like.
pub fn desired(mut instances: Vec<Ensure>, end: Vec<InstanceId>) -> Desired {
    instances.sort_by(|a, b| a.instance_id.cmp(&b.instance_id));
    Desired { version: version(&instances, &end), instances, end }
}
