//! What every [`Store`] must do, as plain functions over a factory of empty stores, so that each implementation is
//! held to the same words. A case panics where a store fails it.
//!
//! ```no_run
//! # fn empty() -> Box<dyn roost_store::Store> { unimplemented!() }
//! for (name, case) in roost_store::conformance::CASES {
//!     println!("{name}");
//!     case(&empty);
//! }
//! ```
#![allow(
    clippy::unwrap_used,
    clippy::missing_panics_doc,
    reason = "this is a test suite: it fails by panicking"
)]

use crate::rows::{
    AccessKeyRow, BlobRow, Change, Claim, ClaimChange, ImageRow, InstanceFilter, InstanceRecord, InstanceRow,
    Launch, Launched, NewAccountRows, NewInstance, Released, ReservationRow, Timing, UsageFilter,
};
use crate::{Store, StoreError};
use roost_types::agent::{HostFacts, HttpTokens, MetadataOptions};
use roost_types::api::{Account, Image};
use roost_types::metering::{Meter, UsageEvent, UsageKind};
use roost_types::state::{DesiredState, Step, VolumeState};
use roost_types::{
    AccountId, BlobId, HostId, ImageId, InstanceId, InstanceType, InterfaceId, Micros, ReservationId,
    SubnetId, VolumeId, VpcId,
};
use std::collections::BTreeMap;
use std::net::Ipv4Addr;

/// Makes an empty store.
pub type Factory<'a> = &'a dyn Fn() -> Box<dyn Store>;

/// One case: it panics where a store fails it.
pub type Case = fn(Factory<'_>);

/// Every case with its name.
pub const CASES: &[(&str, Case)] = &[
    ("an account comes with its key and its default network", accounts),
    ("names are unique and a refused account leaves nothing", duplicates),
    ("a file is its uploaders', and nobody's once no image of theirs needs it", blobs),
    ("an image needs its files, and a withdrawn one is found by nobody new", images),
    ("a launch writes everything or nothing", launches),
    ("claims never exceed a host", capacity),
    ("volumes never exceed a host's disk, and count until they are gone", disk),
    ("addresses are unique, one after the other, and rest before they come back", addresses),
    ("a client token is used once", tokens),
    ("a change of a row that was changed meanwhile is refused whole", stale),
    ("the usage log takes an event once and one open interval at most", usage),
    ("proofs and reports never go back", proofs),
    ("a lease excludes others until it is over", leases),
    ("what is due comes in order and rest is never due", due),
    ("each epoch is later than the one before", epochs),
];

/// Runs every case.
pub fn run_all(empty: Factory<'_>) {
    CASES.iter().for_each(|(_, case)| case(empty));
}

const NOW: Micros = Micros(1_700_000_000_000_000);
const REST: Micros = Micros::from_secs(300);

fn account_id(number: u8) -> AccountId {
    AccountId::from_random([number; 8])
}

fn instance_id(number: u8) -> InstanceId {
    InstanceId::from_random([number; 9])
}

fn host_id() -> HostId {
    HostId::from_random([1; 9])
}

fn new_account(number: u8, name: &str) -> NewAccountRows {
    let account_id = account_id(number);
    NewAccountRows {
        account: Account { account_id: account_id.clone(), name: name.into(), admin: false, created_at: NOW },
        key: AccessKeyRow {
            access_key_id: format!("AKIA{number}"),
            account_id,
            sealed_secret: vec![0, 1, 255],
            created_at: NOW,
            active: true,
        },
        vpc_id: VpcId::from_random([number; 9]),
        subnets: vec![
            ("a".into(), SubnetId::from_random([number; 9])),
            ("b".into(), SubnetId::from_random([number + 100; 9])),
        ],
        region: "r".into(),
    }
}

fn facts(cpu_milli: u64, memory_mib: u64) -> HostFacts {
    HostFacts {
        host_id: host_id(),
        hostname: "host".into(),
        zone: "a".into(),
        cpus: 4,
        cpu_milli,
        memory_mib,
        disk_gib: 100,
        max_vcpus: 4,
        overhead_mib: 16,
        gpus: 0,
    }
}

fn image(number: u8, name: &str, owner: &AccountId, public: bool) -> ImageRow {
    let blob = BlobId::from_sha256([9; 32]);
    ImageRow {
        image: Image {
            image_id: ImageId::from_random([number; 9]),
            owner: owner.clone(),
            name: name.into(),
            description: String::new(),
            public,
            min_volume_gib: 1,
            boot_args: "quiet".into(),
            default_user: "root".into(),
            ssh: number.is_multiple_of(2).then_some(public),
            created_at: NOW,
        },
        kernel: blob.clone(),
        initrd: None,
        root: blob,
        root_bytes: 5,
        deregistered_at: None,
    }
}

/// A store with two accounts, a public image and a host of 4 CPUs and 4096 MiB.
fn furnished(empty: Factory<'_>) -> Box<dyn Store> {
    let store = empty();
    store.create_account(&new_account(1, "one")).unwrap();
    store.create_account(&new_account(2, "two")).unwrap();
    let blob_id = BlobId::from_sha256([9; 32]);
    for account_id in [account_id(1), account_id(2)] {
        let blob_id = blob_id.clone();
        store.put_blob(&BlobRow { blob_id, bytes: 3, account_id, created_at: NOW }).unwrap();
    }
    store.register_image(&image(1, "tiny", &account_id(1), true)).unwrap();
    store.put_host(&facts(4000, 4096), NOW).unwrap();
    store
}

fn row(number: u8) -> InstanceRow {
    InstanceRow {
        instance_id: instance_id(number),
        account_id: account_id(1),
        owner: "one".into(),
        region: "r".into(),
        zone: "a".into(),
        reservation_id: ReservationId::from_random([number; 9]),
        launch_index: 0,
        launched_at: NOW,
        desired: DesiredState::Running,
        step: Step::Place,
        step_since: NOW,
        observed: None,
        state_reason: None,
        trouble: Some("trouble".into()),
        generation: 1,
        incarnation: 1,
        incarnation_at: NOW,
        reboots: 0,
        force: false,
        host_id: Some(host_id()),
        boot_id: None,
        open_since: None,
        running_since: None,
        segment: 0,
        continues: false,
        bill_until: None,
        tries: 0,
        not_before: NOW,
        deadline: Some(NOW),
        instance_type: InstanceType {
            name: "m5.large".into(),
            family: "m5".into(),
            category: "general".into(),
            vcpus: 1,
            memory_mib: 1000,
            cpu_max_milli: 1000,
            cpu_claim_milli: 1000,
            credits_per_hour_milli: None,
            gpus: 0,
            instance_store_gb: 0,
        },
        image_id: ImageId::from_random([1; 9]),
        image_name: "tiny".into(),
        default_user: "root".into(),
        key_name: None,
        public_keys: vec![("k".into(), "ssh-ed25519 A".into())],
        user_data: Some("AAAA".into()),
        tags: BTreeMap::from([("Name".into(), "ü\"'".into())]),
        metadata_options: MetadataOptions { http_tokens: HttpTokens::Required, ..Default::default() },
        client_token: None,
        timing: Timing { incarnation: 1, ..Timing::default() },
        terminated_at: None,
        revision: 1,
    }
}

fn launch_of(numbers: &[u8], token: Option<&str>) -> Launch {
    let reservation_id = ReservationId::from_random([numbers[0]; 9]);
    let instances = (0..)
        .zip(numbers)
        .map(|(launch_index, number)| NewInstance {
            row: InstanceRow { reservation_id: reservation_id.clone(), launch_index, ..row(*number) },
            claim: Claim { host_id: host_id(), cpu_milli: 1000, memory_mib: 1016 },
            interface_id: InterfaceId::from_random([*number; 9]),
            mac: "06:00:00:00:00:01".into(),
            ingress: vec![],
            subnet_id: SubnetId::from_random([1; 9]),
            volume_id: VolumeId::from_random([*number; 9]),
            volume_type: "gp3".into(),
            volume_gib: 8,
        })
        .collect();
    Launch {
        reservation: ReservationRow { reservation_id, account_id: account_id(1), created_at: NOW },
        token: token.map(|token| (token.to_owned(), "hash".to_owned())),
        instances,
        public_pool: (Ipv4Addr::new(100, 64, 0, 0), 24),
        address_rest: REST,
    }
}

fn accounts(empty: Factory<'_>) {
    let store = empty();
    let new = new_account(1, "one");
    store.create_account(&new).unwrap();
    assert_eq!(store.account(&account_id(1)).unwrap(), Some(new.account.clone()));
    assert_eq!(store.account(&account_id(2)).unwrap(), None);
    assert_eq!(store.access_key("AKIA1").unwrap(), Some((new.key.clone(), new.account)));
    assert_eq!(store.access_key("AKIA2").unwrap(), None);
    let fresh = (VpcId::from_random([50; 9]), SubnetId::from_random([50; 9]));
    let subnet = |zone: &str| store.default_subnet(&account_id(1), "r", zone, (&fresh.0, &fresh.1)).unwrap();
    assert_eq!(
        (subnet("a").subnet_id, subnet("a").network.to_string()),
        (new.subnets[0].1.clone(), "172.31.0.0".into())
    );
    assert_eq!(subnet("b").network.to_string(), "172.31.16.0");
    let made = subnet("c");
    assert_eq!(
        (made.subnet_id, made.network.to_string(), made.vpc_id),
        (fresh.1.clone(), "172.31.32.0".into(), new.vpc_id)
    );
    assert_eq!(subnet("c").subnet_id, fresh.1, "and only once");
}

fn duplicates(empty: Factory<'_>) {
    let store = furnished(empty);
    let again = new_account(3, "one");
    assert!(matches!(store.create_account(&again), Err(StoreError::Duplicate { what: "account", .. })));
    let mut same_key = new_account(3, "three");
    same_key.key.access_key_id = "AKIA1".into();
    assert!(matches!(store.create_account(&same_key), Err(StoreError::Duplicate { .. })));
    assert_eq!(store.accounts().unwrap().len(), 2);
    assert_eq!(store.account(&account_id(3)).unwrap(), None, "rolled back");
    let stray =
        AccessKeyRow { account_id: account_id(9), access_key_id: "X".into(), ..new_account(9, "x").key };
    assert!(matches!(store.add_access_key(&stray), Err(StoreError::Missing { .. })));
}

fn blobs(empty: Factory<'_>) {
    let store = furnished(empty);
    let (one, two) = (account_id(1), account_id(2));
    let shared = BlobId::from_sha256([9; 32]);
    let put = |id: &BlobId, account: &AccountId, created_at| {
        let row = BlobRow { blob_id: id.clone(), bytes: 5, account_id: account.clone(), created_at };
        store.put_blob(&row).unwrap();
    };
    let own = BlobId::from_sha256([8; 32]);
    put(&own, &two, NOW);
    assert!(store.owns_blob(&two, &own).unwrap() && !store.owns_blob(&one, &own).unwrap());
    assert_eq!((store.blob_bytes(&one).unwrap(), store.blob_bytes(&two).unwrap()), (3, 8));
    let mut stolen = image(2, "stolen", &one, false);
    stolen.root = own.clone();
    assert!(matches!(store.register_image(&stolen), Err(StoreError::Missing { .. })));

    let later = NOW + Micros(1);
    assert_eq!(store.release_blob(&one, &own, NOW).unwrap(), Released::Absent);
    assert_eq!(store.release_blob(&one, &shared, NOW).unwrap(), Released::Named);
    assert_eq!(store.release_blob(&two, &shared, NOW).unwrap(), Released::Done);
    assert!(store.blob(&shared).unwrap().is_some(), "its other owner has an image of it");
    assert_eq!(store.release_unnamed_blobs(NOW, NOW).unwrap(), 0, "uploaded just now");
    assert_eq!(store.release_unnamed_blobs(later, NOW).unwrap(), 1);
    assert_eq!(store.blob(&own).unwrap(), None);
    assert_eq!(store.blob_bytes(&two).unwrap(), 0);

    // An instance needs its image's files even after the image was withdrawn.
    store.launch(&launch_of(&[1], None)).unwrap();
    store.deregister_image(&ImageId::from_random([1; 9]), NOW).unwrap();
    assert_eq!(store.release_unnamed_blobs(later, NOW).unwrap(), 0);
    assert_eq!(store.release_blob(&one, &shared, NOW).unwrap(), Released::Named);
    let mut gone = Change::of(store.instance(&instance_id(1)).unwrap().unwrap().row);
    gone.row.terminated_at = Some(NOW);
    store.commit(&[gone], NOW).unwrap();
    assert_eq!(store.release_unnamed_blobs(later, NOW).unwrap(), 1);
    // Withdrawn images still name the blob, and a new upload restores it.
    put(&shared, &two, NOW);
    assert!(store.owns_blob(&two, &shared).unwrap() && !store.owns_blob(&one, &shared).unwrap());
}

fn images(empty: Factory<'_>) {
    let store = furnished(empty);
    let (one, two) = (account_id(1), account_id(2));
    let mut lost = image(2, "lost", &one, true);
    lost.kernel = BlobId::from_sha256([1; 32]);
    assert!(matches!(store.register_image(&lost), Err(StoreError::Missing { .. })));
    store.register_image(&image(3, "own", &two, false)).unwrap();
    store.register_image(&image(4, "tiny", &two, false)).unwrap();
    assert!(matches!(
        store.register_image(&image(5, "tiny", &two, false)),
        Err(StoreError::Duplicate { .. })
    ));
    let id = |number: u8| Some(ImageId::from_random([number; 9]));
    let find = |account, name: &str| store.find_image(account, name).unwrap().map(|row| row.image.image_id);
    assert_eq!(find(&two, "tiny"), id(4), "one's own before a public one");
    assert_eq!(find(&one, "tiny"), id(1));
    assert_eq!(find(&one, "own"), None, "another's private image is not there");
    assert_eq!(find(&one, id(1).unwrap().as_str()), id(1));
    assert_eq!(store.images(&one).unwrap().len(), 1);
    assert!(store.deregister_image(&id(4).unwrap(), NOW).unwrap());
    assert!(!store.deregister_image(&id(4).unwrap(), NOW).unwrap());
    assert_eq!(find(&two, "tiny"), id(1));
    assert_eq!(store.image(&id(4).unwrap()).unwrap().unwrap().deregistered_at, Some(NOW));
    store.register_image(&image(6, "tiny", &two, false)).unwrap();
}

fn launches(empty: Factory<'_>) {
    let store = furnished(empty);
    let Launched::New(records) = store.launch(&launch_of(&[1, 2], None)).unwrap() else { panic!("new") };
    assert_eq!(records.len(), 2);
    assert_eq!(records[0].row, launch_of(&[1], None).instances[0].row, "every column comes back as it was");
    assert_eq!(store.instance(&instance_id(1)).unwrap().unwrap(), records[0]);
    assert_eq!(records[0].volume.state, VolumeState::Creating);
    assert_eq!(records[0].interface.gateway.to_string(), "172.31.0.1");
    let mut lost = launch_of(&[3, 4], None);
    lost.instances[1].claim.host_id = HostId::from_random([77; 9]);
    assert!(matches!(store.launch(&lost), Err(StoreError::Missing { what: "host", .. })));
    assert_eq!(store.instance(&instance_id(3)).unwrap(), None, "nothing half made");
    assert_eq!(store.instances(&InstanceFilter::default()).unwrap().len(), 2);
    assert_eq!(store.volumes(&account_id(1)).unwrap().len(), 2);
    let of_two = InstanceFilter { account_id: Some(account_id(2)), ..InstanceFilter::default() };
    assert_eq!(store.instances(&of_two).unwrap(), vec![]);
    let reservation_id = Some(ReservationId::from_random([1; 9]));
    let launched = InstanceFilter { reservation_id, host_id: Some(host_id()), ..InstanceFilter::default() };
    assert_eq!(store.instances(&launched).unwrap(), records);
    store.check().unwrap();
}

fn capacity(empty: Factory<'_>) {
    let store = furnished(empty);
    assert!(matches!(store.launch(&launch_of(&[1, 2, 3, 4, 5], None)), Err(StoreError::NoRoom { .. })));
    assert_eq!(store.host(&host_id()).unwrap().unwrap().claims, 0);
    store.launch(&launch_of(&[1, 2, 3], None)).unwrap();
    let host = store.host(&host_id()).unwrap().unwrap();
    assert_eq!((host.claims, host.claimed_cpu_milli, host.claimed_memory_mib), (3, 3000, 3048));
    // Enough CPU, too little memory.
    store.put_host(&facts(8000, 3100), NOW).unwrap();
    assert!(matches!(store.launch(&launch_of(&[4], None)), Err(StoreError::NoRoom { .. })));
    let claim = Claim { host_id: host_id(), cpu_milli: 1000, memory_mib: 1016 };
    assert_eq!(store.claim(&instance_id(1)).unwrap(), Some(claim));
    let mut release = Change::of(store.instance(&instance_id(1)).unwrap().unwrap().row);
    release.row.step = Step::Rest;
    release.claim = ClaimChange::Release;
    store.commit(&[release], NOW).unwrap();
    assert_eq!(store.claim(&instance_id(1)).unwrap(), None);
    assert_eq!(store.hosts().unwrap()[0].claims, 2);
}

fn disk(empty: Factory<'_>) {
    let store = furnished(empty);
    store.put_host(&HostFacts { disk_gib: 20, ..facts(9000, 9000) }, NOW).unwrap();
    assert!(matches!(store.launch(&launch_of(&[1, 2, 3], None)), Err(StoreError::NoRoom { .. })));
    store.launch(&launch_of(&[1, 2], None)).unwrap();
    let claimed = || store.host(&host_id()).unwrap().unwrap().claimed_disk_gib;
    assert_eq!(claimed(), 16);
    let error = store.launch(&launch_of(&[3], None)).unwrap_err();
    assert!(error.to_string().contains("8 GiB of disk"), "{error}");
    assert_eq!(store.instance(&instance_id(3)).unwrap(), None, "nothing half made");
    let change = |step, volume| {
        let mut change = Change::of(store.instance(&instance_id(1)).unwrap().unwrap().row);
        change.row.step = step;
        change.claim = ClaimChange::Release;
        change.volume = volume;
        store.commit(&[change], NOW).unwrap();
    };
    change(Step::Rest, Some(VolumeState::InUse));
    assert_eq!(claimed(), 16, "a stopped instance keeps its volume");
    change(Step::Terminate, Some(VolumeState::Deleting));
    assert_eq!(claimed(), 16, "until it is removed");
    change(Step::Gone, Some(VolumeState::Deleted));
    assert_eq!(claimed(), 8);
    store.launch(&launch_of(&[3], None)).unwrap();
}

fn addresses(empty: Factory<'_>) {
    let store = furnished(empty);
    const BROADCAST: u32 = 0xac1f_0fff; // of 172.31.0.0/20
    store.put_host(&facts(9000, 9000), NOW).unwrap();
    let launch = |numbers: &[u8], now: Micros| {
        let pool = (Ipv4Addr::new(100, 64, 0, 0), 29);
        let mut launch = Launch { public_pool: pool, ..launch_of(numbers, None) };
        launch.reservation.created_at = now;
        store.launch(&launch)
    };
    // A pool of /29 has 8 addresses: 4 reserved, 3 to give, 1 broadcast.
    let Launched::New(records) = launch(&[1], NOW).unwrap() else { panic!("new") };
    let public = |records: &[InstanceRecord]| -> Vec<_> {
        records.iter().map(|record| record.interface.public_ip.to_string()).collect()
    };
    assert_eq!(public(&records), ["100.64.0.4"]);
    let first = u32::from(records[0].interface.private_ip);
    let private =
        |number: u8| u32::from(store.instance(&instance_id(number)).unwrap().unwrap().interface.private_ip);
    let release = |number: u8| {
        let mut gone = Change::of(store.instance(&instance_id(number)).unwrap().unwrap().row);
        gone.row.step = Step::Gone;
        gone.row.terminated_at = Some(NOW);
        gone.claim = ClaimChange::Release;
        gone.release_addresses = true;
        gone.volume = Some(VolumeState::Deleted);
        store.commit(&[gone], NOW).unwrap();
    };
    release(1);
    let old = store.instance(&instance_id(1)).unwrap().unwrap();
    assert_eq!((old.interface.released_at, old.volume.state), (Some(NOW), VolumeState::Deleted));
    // A released address is not the next one, nor any one while it rests.
    let Launched::New(records) = launch(&[2, 3], NOW + Micros(1)).unwrap() else { panic!("new") };
    assert_eq!(public(&records), ["100.64.0.5", "100.64.0.6"]);
    let after =
        |number: u32| if first + number > BROADCAST - 1 { first + number - 4091 } else { first + number };
    assert_eq!((private(2), private(3)), (after(1), after(2)));
    let error = launch(&[4], NOW + REST - Micros(1)).unwrap_err();
    assert!(matches!(error, StoreError::NoAddress(_)), "{error}");
    assert!(error.to_string().contains("1 were released a short time ago"), "{error}");
    let Launched::New(records) = launch(&[4], NOW + REST).unwrap() else { panic!("new") };
    assert_eq!((public(&records), private(4)), (vec!["100.64.0.4".to_owned()], after(3)));
    let error = launch(&[5], NOW + REST).unwrap_err();
    assert!(error.to_string().ends_with("100.64.0.0/29"), "{error}");
    assert_eq!(store.volumes(&account_id(1)).unwrap().len(), 3, "a deleted volume is not listed");
}

fn tokens(empty: Factory<'_>) {
    let store = furnished(empty);
    assert_eq!(store.client_token(&account_id(1), "t").unwrap(), None);
    store.launch(&launch_of(&[1], Some("t"))).unwrap();
    let known = ("hash".to_owned(), ReservationId::from_random([1; 9]));
    assert_eq!(store.client_token(&account_id(1), "t").unwrap(), Some(known.clone()));
    assert_eq!(store.client_token(&account_id(2), "t").unwrap(), None);
    let again = store.launch(&launch_of(&[2], Some("t"))).unwrap();
    assert_eq!(again, Launched::Repeated { parameter_hash: known.0, reservation_id: known.1 });
    assert_eq!(store.instance(&instance_id(2)).unwrap(), None);
}

fn stale(empty: Factory<'_>) {
    let store = furnished(empty);
    let Launched::New(records) = store.launch(&launch_of(&[1, 2], None)).unwrap() else { panic!("new") };
    let mut first = Change::of(records[0].row.clone());
    first.row.generation = 2;
    first.row.trouble = None;
    store.commit(std::slice::from_ref(&first), NOW).unwrap();
    let read = store.instance(&instance_id(1)).unwrap().unwrap().row;
    assert_eq!((read.generation, read.trouble, read.revision), (2, None, 2));
    let mut second = Change::of(records[1].row.clone());
    second.row.generation = 9;
    let refused = store.commit(&[second, first], NOW);
    assert!(matches!(refused, Err(StoreError::Stale(id)) if id == instance_id(1)));
    assert_eq!(store.instance(&instance_id(2)).unwrap().unwrap().row.generation, 1, "all or none");
}

fn event(incarnation: u64, kind: UsageKind, seconds: i64) -> UsageEvent {
    UsageEvent {
        account: account_id(1),
        resource: instance_id(1).to_string(),
        meter: Meter::InstanceSeconds,
        incarnation,
        sequence: u64::from(kind == UsageKind::Close),
        kind,
        at: NOW + Micros::from_secs(seconds),
        sku: "m5.large".into(),
        quantity: 1,
        continues: false,
    }
}

fn usage(empty: Factory<'_>) {
    let store = furnished(empty);
    store.launch(&launch_of(&[1], None)).unwrap();
    let append = |events: Vec<UsageEvent>| {
        let mut change = Change::of(store.instance(&instance_id(1)).unwrap().unwrap().row);
        change.usage = events;
        store.commit(&[change], NOW)
    };
    let open = event(1, UsageKind::Open, 10);
    assert!(append(vec![event(1, UsageKind::Close, 20)]).is_err(), "an end of nothing");
    append(vec![open.clone()]).unwrap();
    append(vec![open.clone()]).unwrap();
    assert!(append(vec![event(1, UsageKind::Open, 11)]).is_err(), "the same key with another time");
    assert!(append(vec![event(2, UsageKind::Open, 11)]).is_err(), "a second open interval");
    assert!(append(vec![event(1, UsageKind::Close, 9)]).is_err(), "an end before its beginning");
    let close = event(1, UsageKind::Close, 20);
    append(vec![close.clone()]).unwrap();
    append(vec![close.clone()]).unwrap();
    let (next, end) = (event(2, UsageKind::Open, 20), event(2, UsageKind::Close, 20));
    append(vec![next.clone(), end.clone()]).unwrap();
    let all = vec![open, close, next, end];
    assert_eq!(store.usage_events(&UsageFilter::default()).unwrap(), all);
    let of = |account: u8, resource: &str| {
        let filter = UsageFilter { account_id: Some(account_id(account)), resource: Some(resource.into()) };
        store.usage_events(&filter).unwrap().len()
    };
    assert_eq!((of(1, instance_id(1).as_str()), of(2, instance_id(1).as_str()), of(1, "i-other")), (4, 0, 0));
}

fn proofs(empty: Factory<'_>) {
    let store = furnished(empty);
    let later = NOW + Micros::SECOND;
    let id = instance_id(1);
    store.host_reported(&host_id(), "boot", later, &[(id.clone(), later)]).unwrap();
    store.host_reported(&host_id(), "boot", NOW, &[(id.clone(), NOW)]).unwrap();
    assert_eq!(store.proofs().unwrap(), BTreeMap::from([(id.to_string(), later)]));
    let host = store.host(&host_id()).unwrap().unwrap();
    assert_eq!((host.last_report_at, host.boot_id.as_deref()), (later, Some("boot")));
    store.put_host(&facts(1, 1), NOW).unwrap();
    let host = store.host(&host_id()).unwrap().unwrap();
    assert_eq!((host.last_report_at, host.registered_at, host.facts.cpu_milli), (later, NOW, 1));
    let stray = HostId::from_random([5; 9]);
    assert!(matches!(store.host_reported(&stray, "b", NOW, &[]), Err(StoreError::Missing { .. })));
}

fn leases(empty: Factory<'_>) {
    let store = furnished(empty);
    store.launch(&launch_of(&[1], None)).unwrap();
    let (id, second) = (instance_id(1), Micros::SECOND);
    let until = NOW + second;
    let record = store.lease(&id, "first", NOW, until).unwrap().expect("it is free");
    assert_eq!(store.lease(&id, "second", NOW, until).unwrap(), None);
    assert_eq!(store.due(NOW, 9).unwrap(), vec![], "what is leased is not due");
    assert!(store.lease(&id, "second", until + second, until + second).unwrap().is_some(), "it is over");
    let mut change = Change::of(record.row);
    change.release_lease = true;
    store.commit(&[change], NOW).unwrap();
    assert!(store.lease(&id, "third", NOW, until).unwrap().is_some(), "it was given back");
    assert_eq!(store.lease(&instance_id(9), "x", NOW, until).unwrap(), None);
}

fn due(empty: Factory<'_>) {
    let store = furnished(empty);
    let Launched::New(records) = store.launch(&launch_of(&[1, 2, 3], None)).unwrap() else { panic!("new") };
    assert_eq!(store.next_due().unwrap(), Some(NOW));
    let edit = |number: usize, step: Step, wait: i64| {
        let mut change = Change::of(records[number].row.clone());
        change.row.step = step;
        change.row.not_before = NOW + Micros::from_secs(wait);
        store.commit(&[change], NOW).unwrap();
    };
    edit(0, Step::Launch, 20);
    edit(1, Step::Stop, 10);
    edit(2, Step::Rest, 0);
    let at = |seconds: i64| store.due(NOW + Micros::from_secs(seconds), 9).unwrap();
    assert_eq!(at(5), vec![]);
    assert_eq!(store.next_due().unwrap(), Some(NOW + Micros::from_secs(10)));
    assert_eq!(at(15), vec![instance_id(2)]);
    assert_eq!(at(25), vec![instance_id(2), instance_id(1)]);
    assert_eq!(store.due(NOW + Micros::from_secs(25), 1).unwrap().len(), 1);
}

fn epochs(empty: Factory<'_>) {
    let store = empty();
    assert_eq!(store.epoch().unwrap(), 1);
    assert_eq!(store.begin_epoch(7).unwrap(), 7);
    assert_eq!(store.begin_epoch(7).unwrap(), 8);
    assert_eq!(store.begin_epoch(0).unwrap(), 9);
    assert_eq!(store.epoch().unwrap(), 9);
}
