//! `RunInstances`: validate, place, accept.

use super::{ATTEMPTS, Answer, Caller, Engine, errors};
use base64::Engine as _;
use roost_placement::{PlacementError, Wanted};
use roost_store::{Claim, ImageRow, InstanceRow, Launch, Launched, NewInstance, ReservationRow, StoreError};
use roost_types::agent::TimedPart;
use roost_types::api::{MAX_LAUNCH_COUNT, MAX_USER_DATA, Reservation, RunInstances, Tags};
use roost_types::name::is_showable;
use roost_types::state::{DesiredState, Step};
use roost_types::{
    ApiError, ErrorCode, HostId, ImageId, InstanceId, InstanceType, InterfaceId, Micros, ReservationId,
    SubnetId, VolumeId, VpcId,
};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashMap};

/// Longest client token, as on EC2.
const MAX_TOKEN: usize = 64;
/// Most tags of a resource, as on EC2.
const MAX_TAGS: usize = 50;
/// Longest tag key and value in characters, as on EC2.
const MAX_TAG: (usize, usize) = (128, 256);
/// The tag that names an instance.
const NAME_TAG: &str = "Name";
/// Largest volume in GiB, as on EC2.
const MAX_VOLUME_GIB: u64 = 16 * 1024;

/// How long the parts of an acceptance took.
#[derive(Debug, Clone, Copy, Default)]
pub struct Stopwatch {
    store: Micros,
    placement: Micros,
}

impl Stopwatch {
    pub fn parts(self, whole: Micros) -> Vec<TimedPart> {
        let part = |part: &str, took: Micros| TimedPart {
            part: part.to_owned(),
            took_us: u64::try_from(took.0).unwrap_or(0),
        };
        let api = whole - self.store - self.placement;
        vec![part("api", api), part("placement", self.placement), part("store", self.store)]
    }

    pub fn store<T>(&mut self, engine: &Engine, run: impl FnOnce() -> T) -> T {
        let from = engine.clock.monotonic();
        let result = run();
        self.store = self.store + (engine.clock.monotonic() - from);
        result
    }

    pub fn placement<T>(&mut self, engine: &Engine, run: impl FnOnce() -> T) -> T {
        let from = engine.clock.monotonic();
        let result = run();
        self.placement = self.placement + (engine.clock.monotonic() - from);
        result
    }
}

fn wrong(message: impl Into<String>) -> ApiError {
    ApiError::new(ErrorCode::InvalidParameterValue, message)
}

fn missing(name: &str) -> ApiError {
    ApiError::new(ErrorCode::MissingParameter, format!("the parameter {name} is missing"))
}

/// What can be said of a request without looking anything up.
fn check_parameters(request: &RunInstances) -> Answer<()> {
    if request.image.is_empty() {
        return Err(missing("image"));
    }
    if request.instance_type.is_empty() {
        return Err(missing("instance_type"));
    }
    if request.image.starts_with(ImageId::PREFIX) {
        request.image.parse::<ImageId>()?;
    }
    for (name, count) in [("min_count", request.min_count), ("max_count", request.max_count)] {
        if !(1..=MAX_LAUNCH_COUNT).contains(&count) {
            return Err(wrong(format!("{name} is {count}: allowed is 1 to {MAX_LAUNCH_COUNT}")));
        }
    }
    if request.min_count > request.max_count {
        return Err(wrong(format!(
            "min_count is {} and max_count {}: min_count may not be above max_count",
            request.min_count, request.max_count
        )));
    }
    if let Some(data) = &request.user_data {
        let decoded = base64::engine::general_purpose::STANDARD
            .decode(data)
            .map_err(|error| wrong(format!("user_data is not base64 ({error})")))?;
        if decoded.len() > MAX_USER_DATA {
            let bytes = decoded.len();
            return Err(wrong(format!("user_data has {bytes} bytes: allowed are at most {MAX_USER_DATA}")));
        }
    }
    if let Some(gib) = request.volume_gib
        && !(1..=MAX_VOLUME_GIB).contains(&gib)
    {
        return Err(wrong(format!("volume_gib is {gib}: allowed is 1 to {MAX_VOLUME_GIB}")));
    }
    if let Some(token) = &request.client_token
        && !(1..=MAX_TOKEN).contains(&token.len())
    {
        return Err(wrong(format!("client_token has {} bytes: allowed is 1 to {MAX_TOKEN}", token.len())));
    }
    check_tags(&request.tags)
}

fn check_tags(tags: &Tags) -> Answer<()> {
    if tags.len() > MAX_TAGS {
        return Err(wrong(format!("{} tags are given: allowed are at most {MAX_TAGS}", tags.len())));
    }
    for (key, value) in tags {
        let (longest_key, longest_value) = MAX_TAG;
        if key.is_empty() || key.chars().count() > longest_key {
            return Err(wrong(format!("tag key {key:?}: allowed are 1 to {longest_key} characters")));
        }
        if value.chars().count() > longest_value {
            return Err(wrong(format!(
                "the value of tag {key:?} is too long: allowed are {longest_value} characters"
            )));
        }
        for (what, text) in [("key", key), ("value", value)] {
            if !is_showable(text) {
                return Err(wrong(format!(
                    "the {what} of tag {key:?} has characters that no terminal shows ({text:?}): allowed are printable ones"
                )));
            }
        }
        if key == NAME_TAG && value.starts_with(InstanceId::PREFIX) {
            return Err(wrong(format!(
                "tag {NAME_TAG} is {value:?}: a name may not begin with {:?} as ids do",
                InstanceId::PREFIX
            )));
        }
        if key.starts_with("aws:") {
            return Err(wrong(format!("tag key {key:?}: keys that begin with \"aws:\" are reserved")));
        }
    }
    Ok(())
}

/// The result of a dry run that would have succeeded.
fn dry_run(count: usize) -> ApiError {
    let text = format!("the call would have launched {count} instances");
    ApiError::new(ErrorCode::DryRunOperation, text)
}

/// Hash of everything in a request that makes a difference to what is launched.
fn parameter_hash(request: &RunInstances) -> Answer<String> {
    let same = RunInstances { client_token: None, dry_run: false, ..request.clone() };
    let text = serde_json::to_vec(&same)
        .map_err(|error| ApiError::new(ErrorCode::InternalError, error.to_string()))?;
    Ok(Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Administrators see which hosts have how much room, tenants how many hosts lack which resource.
pub fn of_placement(error: &PlacementError, caller: &Caller) -> ApiError {
    let code = match error {
        PlacementError::Unsupported { .. } => ErrorCode::Unsupported,
        PlacementError::Insufficient { .. } => ErrorCode::InsufficientInstanceCapacity,
    };
    ApiError::new(code, if caller.admin { error.to_string() } else { error.for_tenants() })
}

/// Hardware address of an interface: local, unicast, and the same whenever it is asked for.
fn mac(interface: &InterfaceId) -> String {
    let digits = interface.digits();
    let pairs: Vec<_> = (0..5).filter_map(|pair| digits.get(2 * pair..2 * pair + 2)).collect();
    format!("06:{}", pairs.join(":"))
}

/// Everything that a launch refers to, found.
struct Found<'a> {
    caller: &'a Caller,
    request: &'a RunInstances,
    instance_type: InstanceType,
    image: ImageRow,
    public_keys: Vec<(String, String)>,
    volume_gib: u64,
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "a request is taken as it came off the wire, and is done with"
)]
impl Engine {
    /// The type of this name.
    pub(super) fn instance_type(&self, name: &str) -> Answer<&InstanceType> {
        self.catalogue.get(name).ok_or_else(|| {
            let family = name.split_once('.').map_or(name, |(family, _)| family);
            let near: Vec<_> = self.catalogue.family(family).map(|kind| kind.name.as_str()).collect();
            let hint = if near.is_empty() {
                "DescribeInstanceTypes lists those there are".to_owned()
            } else {
                format!("there are {}", near.join(", "))
            };
            wrong(format!("instance_type {name:?} is unknown: {hint}"))
        })
    }

    /// Launches instances. Answers when they are accepted, not when they run.
    ///
    /// # Errors
    /// EC2's, in EC2's order: parameters, then what they refer to, then capacity.
    pub fn run_instances(&self, caller: &Caller, request: RunInstances) -> Answer<Reservation> {
        let began = self.clock.monotonic();
        let mut watch = Stopwatch::default();
        check_parameters(&request)?;
        let hash = parameter_hash(&request)?;
        if let Some(token) = &request.client_token {
            let used = watch.store(self, || self.store.client_token(&caller.account_id, token));
            if let Some((first, reservation)) = used.map_err(errors::of_store)? {
                let repeated = self.repeated(token, &hash, &first, reservation)?;
                if request.dry_run {
                    return Err(dry_run(0));
                }
                return Ok(repeated);
            }
        }
        let found = self.find(caller, &request, &mut watch)?;
        for _ in 0..ATTEMPTS {
            let now = self.clock.now();
            let hosts = watch.store(self, || self.placeable())?;
            let wanted =
                Wanted { instance_type: &found.instance_type, volume_gib: found.volume_gib, zone: None };
            let (min, max) = (request.min_count as usize, request.max_count as usize);
            let chosen = watch
                .placement(self, || roost_placement::place(&hosts, &wanted, min, max))
                .map_err(|error| of_placement(&error, caller))?;
            if request.dry_run {
                return Err(dry_run(chosen.len()));
            }
            let zones: HashMap<_, _> = hosts.iter().map(|host| (&host.facts.host_id, &host.facts)).collect();
            let claims = chosen.iter().filter_map(|host| {
                let facts = zones.get(host)?;
                let claim = Claim {
                    host_id: host.clone(),
                    cpu_milli: wanted.cpu_milli(),
                    memory_mib: wanted.memory_mib(facts),
                };
                Some((claim, facts.zone.clone()))
            });
            let launch = watch.store(self, || self.compose(&found, claims.collect(), &hash, now))?;
            let written = watch.store(self, || {
                let _points = roost_halt::around("controller.launch");
                self.store.launch(&launch)
            });
            match written {
                Ok(Launched::New(records)) => {
                    let parts = watch.parts(self.clock.monotonic() - began);
                    let mut memory = self.remember();
                    for record in &records {
                        memory.timings.insert(record.row.instance_id.clone(), (1, parts.clone()));
                    }
                    drop(memory);
                    self.announce();
                    let reservation_id = launch.reservation.reservation_id;
                    return Ok(Reservation { reservation_id, instances: self.show(&records, now)? });
                }
                Ok(Launched::Repeated { parameter_hash, reservation_id }) => {
                    let token = request.client_token.as_deref().unwrap_or_default();
                    return self.repeated(token, &hash, &parameter_hash, reservation_id);
                }
                // Somebody else took the room between our look and our claim: look again.
                Err(StoreError::NoRoom { .. }) => {}
                Err(error) => return Err(errors::of_store(error)),
            }
        }
        Err(ApiError::new(
            ErrorCode::InsufficientInstanceCapacity,
            "others took the capacity each time it was found: try again",
        ))
    }

    /// The answer to a call whose client token was used before.
    fn repeated(&self, token: &str, hash: &str, first: &str, id: ReservationId) -> Answer<Reservation> {
        if hash != first {
            return Err(ApiError::new(
                ErrorCode::IdempotentParameterMismatch,
                format!("client_token {token:?} was used before with other parameters: use a new token"),
            ));
        }
        let now = self.clock.now();
        let filter = roost_store::InstanceFilter {
            reservation_id: Some(id.clone()),
            gone_since: Some(Micros(i64::MIN)),
            ..Default::default()
        };
        let records = self.store.instances(&filter).map_err(errors::of_store)?;
        Ok(Reservation { reservation_id: id, instances: self.show(&records, now)? })
    }

    fn find<'a>(
        &self,
        caller: &'a Caller,
        request: &'a RunInstances,
        watch: &mut Stopwatch,
    ) -> Answer<Found<'a>> {
        let instance_type = self.instance_type(&request.instance_type)?.clone();
        let account = &caller.account_id;
        let image = watch
            .store(self, || self.store.find_image(account, &request.image))
            .map_err(errors::of_store)?
            .ok_or_else(|| {
                let text = format!("image {:?} does not exist", request.image);
                ApiError::new(ErrorCode::InvalidAmiIdNotFound, text)
            })?;
        let mut public_keys = Vec::new();
        if let Some(name) = &request.key_name {
            let key = watch
                .store(self, || self.store.key_pair(account, name))
                .map_err(errors::of_store)?
                .ok_or_else(|| {
                    let text = format!("key pair {name:?} does not exist");
                    ApiError::new(ErrorCode::InvalidKeyPairNotFound, text)
                })?;
            public_keys.push((name.clone(), key.key_pair.public_key));
        }
        let least = image.image.min_volume_gib;
        let volume_gib = request.volume_gib.unwrap_or(least);
        if volume_gib < least {
            return Err(wrong(format!(
                "volume_gib is {volume_gib}: image {} needs at least {least}",
                image.image.name
            )));
        }
        Ok(Found { caller, request, instance_type, image, public_keys, volume_gib })
    }

    fn compose(
        &self,
        found: &Found<'_>,
        claims: Vec<(Claim, String)>,
        hash: &str,
        now: Micros,
    ) -> Answer<Launch> {
        let account_id = &found.caller.account_id;
        let reservation_id = ReservationId::from_random(self.random_bytes());
        let mut subnets: BTreeMap<String, SubnetId> = BTreeMap::new();
        let mut instances = Vec::with_capacity(claims.len());
        for (index, (claim, zone)) in (0_u32..).zip(claims) {
            if !subnets.contains_key(&zone) {
                let fresh =
                    (VpcId::from_random(self.random_bytes()), SubnetId::from_random(self.random_bytes()));
                let subnet = self
                    .store
                    .default_subnet(account_id, &self.settings.region, &zone, (&fresh.0, &fresh.1))
                    .map_err(errors::of_store)?;
                subnets.insert(zone.clone(), subnet.subnet_id);
            }
            let Some(subnet_id) = subnets.get(&zone).cloned() else { continue };
            let host = claim.host_id.clone();
            let row = self.new_row(found, &reservation_id, index, (host, zone), now);
            let interface_id = InterfaceId::from_random(self.random_bytes());
            instances.push(NewInstance {
                row,
                claim,
                mac: mac(&interface_id),
                interface_id,
                ingress: self.settings.ingress.clone(),
                subnet_id,
                volume_id: VolumeId::from_random(self.random_bytes()),
                volume_type: self.settings.volume_type.clone(),
                volume_gib: found.volume_gib,
            });
        }
        let pool = self.settings.public_pool;
        Ok(Launch {
            reservation: ReservationRow { reservation_id, account_id: account_id.clone(), created_at: now },
            token: found.request.client_token.clone().map(|token| (token, hash.to_owned())),
            instances,
            public_pool: (pool.network(), pool.prefix_len()),
            address_rest: self.settings.address_rest,
        })
    }

    fn new_row(
        &self,
        found: &Found<'_>,
        reservation_id: &ReservationId,
        launch_index: u32,
        (host, zone): (HostId, String),
        now: Micros,
    ) -> InstanceRow {
        let image = &found.image.image;
        InstanceRow {
            instance_id: InstanceId::from_random(self.random_bytes()),
            account_id: found.caller.account_id.clone(),
            owner: found.caller.account_name.clone(),
            region: self.settings.region.clone(),
            zone,
            reservation_id: reservation_id.clone(),
            launch_index,
            launched_at: now,
            desired: DesiredState::Running,
            step: Step::Place,
            step_since: now,
            observed: None,
            state_reason: None,
            trouble: None,
            generation: 1,
            incarnation: 1,
            incarnation_at: now,
            reboots: 0,
            force: false,
            host_id: Some(host),
            boot_id: None,
            open_since: None,
            running_since: None,
            segment: 0,
            continues: false,
            bill_until: None,
            tries: 0,
            not_before: now,
            deadline: Some(now + self.settings.place_deadline),
            instance_type: found.instance_type.clone(),
            image_id: image.image_id.clone(),
            image_name: image.name.clone(),
            default_user: image.default_user.clone(),
            key_name: found.request.key_name.clone(),
            public_keys: found.public_keys.clone(),
            user_data: found.request.user_data.clone(),
            tags: found.request.tags.clone(),
            metadata_options: found.request.metadata_options.unwrap_or_default(),
            client_token: found.request.client_token.clone(),
            timing: roost_store::Timing { incarnation: 1, ..Default::default() },
            terminated_at: None,
            revision: 1,
        }
    }
}
