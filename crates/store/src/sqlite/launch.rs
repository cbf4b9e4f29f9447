//! Accepting a launch: everything that it takes, or nothing.

use super::codec::{Cursor, flag, int, json, text, time};
use super::{accounts, hosts, instances, is_duplicate, is_missing};
use crate::error::StoreError;
use crate::rows::{Launch, Launched, NewInstance, SubnetRow};
use roost_types::state::VolumeState;
use roost_types::{AccountId, ReservationId, SubnetId};
use rusqlite::{Connection, OptionalExtension, Transaction, params};
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

/// Addresses at the beginning of every block that nobody gets: the network, the router, and two for services, as
/// on EC2.
const RESERVED: u32 = 4;

pub fn token(
    db: &Connection,
    account: &AccountId,
    token: &str,
) -> Result<Option<(String, ReservationId)>, StoreError> {
    let mut query = db.prepare_cached(
        "SELECT parameter_hash, reservation_id FROM client_tokens WHERE account_id = ?1 AND token = ?2",
    )?;
    let read = |row: &rusqlite::Row<'_>| {
        let cursor = &mut Cursor::new(row);
        Ok((cursor.raw()?, cursor.parse()?))
    };
    Ok(query.query_row(params![account.as_str(), token], read).optional()?)
}

pub fn launch(db: &Transaction<'_>, new: &Launch) -> Result<Launched, StoreError> {
    let reservation = &new.reservation;
    if let Some((client_token, _)) = &new.token
        && let Some((parameter_hash, reservation_id)) = token(db, &reservation.account_id, client_token)?
    {
        return Ok(Launched::Repeated { parameter_hash, reservation_id });
    }
    db.execute(
        "INSERT INTO reservations (reservation_id, account_id, created_at) VALUES (?1, ?2, ?3)",
        params![
            text(&reservation.reservation_id),
            text(&reservation.account_id),
            time(reservation.created_at)
        ],
    )
    .map_err(|error| {
        if is_missing(&error) {
            StoreError::Missing { what: "account", value: reservation.account_id.to_string() }
        } else if is_duplicate(&error) {
            StoreError::Duplicate { what: "reservation", value: reservation.reservation_id.to_string() }
        } else {
            error.into()
        }
    })?;
    if let Some((client_token, parameter_hash)) = &new.token {
        db.execute(
            "INSERT INTO client_tokens (account_id, token, parameter_hash, reservation_id, created_at)
             VALUES (?1, ?2, ?3, ?4, ?5)",
            params![
                text(&reservation.account_id),
                client_token,
                parameter_hash,
                text(&reservation.reservation_id),
                time(reservation.created_at)
            ],
        )?;
    }
    let (network, prefix) = new.public_pool;
    let taken = taken(db, "SELECT public_ip FROM interfaces WHERE released_at IS NULL", None)?;
    let mut public = Block::new(network, prefix, taken);
    let mut subnets: BTreeMap<SubnetId, (SubnetRow, Block)> = BTreeMap::new();
    let mut records = Vec::with_capacity(new.instances.len());
    for one in &new.instances {
        if !subnets.contains_key(&one.subnet_id) {
            let open = open_subnet(db, &one.subnet_id)?;
            subnets.insert(one.subnet_id.clone(), open);
        }
        let Some((subnet, private)) = subnets.get_mut(&one.subnet_id) else {
            return Err(StoreError::Missing { what: "subnet", value: one.subnet_id.to_string() });
        };
        write_instance(db, one, subnet, private.take()?, public.take()?)?;
        let record = instances::one(db, &one.row.instance_id)?.ok_or_else(|| StoreError::Missing {
            what: "instance",
            value: one.row.instance_id.to_string(),
        })?;
        records.push(record);
    }
    Ok(Launched::New(records))
}

fn write_instance(
    db: &Transaction<'_>,
    one: &NewInstance,
    subnet: &SubnetRow,
    private_ip: Ipv4Addr,
    public_ip: Ipv4Addr,
) -> Result<(), StoreError> {
    let row = &one.row;
    instances::insert(db, row)?;
    hosts::take(db, &row.instance_id, &one.claim)?;
    db.prepare_cached(
        "INSERT INTO interfaces (interface_id, account_id, vpc_id, subnet_id, instance_id, mac, private_ip,
             prefix_len, gateway, public_ip, ingress)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)",
    )?
    .execute(params![
        text(&one.interface_id),
        text(&row.account_id),
        text(&subnet.vpc_id),
        text(&subnet.subnet_id),
        text(&row.instance_id),
        one.mac,
        text(private_ip),
        subnet.prefix_len,
        text(accounts::address(subnet.network, 1)),
        text(public_ip),
        json(&one.ingress)?,
    ])?;
    hosts::has_disk(db, &one.claim.host_id, one.volume_gib)?;
    db.prepare_cached(
        "INSERT INTO volumes (volume_id, account_id, zone, host_id, instance_id, state, volume_type, size_gib,
             delete_on_termination, created_at)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)",
    )?
    .execute(params![
        text(&one.volume_id),
        text(&row.account_id),
        row.zone,
        text(&one.claim.host_id),
        text(&row.instance_id),
        text(VolumeState::Creating),
        one.volume_type,
        int(one.volume_gib),
        flag(true),
        time(row.launched_at),
    ])?;
    Ok(())
}

fn open_subnet(db: &Transaction<'_>, id: &SubnetId) -> Result<(SubnetRow, Block), StoreError> {
    let subnet = accounts::subnet_by_id(db, id)?
        .ok_or_else(|| StoreError::Missing { what: "subnet", value: id.to_string() })?;
    let taken = taken(
        db,
        "SELECT private_ip FROM interfaces WHERE released_at IS NULL AND subnet_id = ?1",
        Some(id.as_str()),
    )?;
    let block = Block::new(subnet.network, subnet.prefix_len, taken);
    Ok((subnet, block))
}

fn taken(db: &Transaction<'_>, query: &str, id: Option<&str>) -> Result<BTreeSet<Ipv4Addr>, StoreError> {
    let mut query = db.prepare_cached(query)?;
    let rows = query.query_map(rusqlite::params_from_iter(id), |row| Cursor::new(row).parse())?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// A block of addresses, given out lowest first.
struct Block {
    network: Ipv4Addr,
    prefix: u8,
    taken: BTreeSet<Ipv4Addr>,
    next: u32,
}

impl Block {
    fn new(network: Ipv4Addr, prefix: u8, taken: BTreeSet<Ipv4Addr>) -> Self {
        Self { network, prefix, taken, next: RESERVED }
    }

    fn take(&mut self) -> Result<Ipv4Addr, StoreError> {
        // The last address is the broadcast.
        let last = (1_u32 << (32 - u32::from(self.prefix.clamp(1, 32)))) - 1;
        while self.next < last {
            let address = accounts::address(self.network, self.next);
            self.next += 1;
            if !self.taken.contains(&address) {
                return Ok(address);
            }
        }
        Err(StoreError::NoAddress(format!("{}/{}", self.network, self.prefix)))
    }
}
