//! Accepting a launch: everything that it takes, or nothing.

use super::codec::{Cursor, flag, int, json, text, time};
use super::{accounts, hosts, instances, is_duplicate, is_missing};
use crate::error::StoreError;
use crate::rows::{Launch, Launched, NewInstance, SubnetRow};
use roost_types::state::VolumeState;
use roost_types::{AccountId, Micros, ReservationId, SubnetId};
use rusqlite::types::Value;
use rusqlite::{Connection, OptionalExtension, Transaction, params, params_from_iter};
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
    let free_since = Micros(reservation.created_at.0.saturating_sub(new.address_rest.0));
    let (network, prefix) = new.public_pool;
    let mut public = Block::new(network, prefix, Held::public(db, free_since)?, 0);
    let mut subnets: BTreeMap<SubnetId, (SubnetRow, Block)> = BTreeMap::new();
    let mut records = Vec::with_capacity(new.instances.len());
    for one in &new.instances {
        if !subnets.contains_key(&one.subnet_id) {
            let open = open_subnet(db, &one.subnet_id, free_since)?;
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

fn open_subnet(
    db: &Transaction<'_>,
    id: &SubnetId,
    free_since: Micros,
) -> Result<(SubnetRow, Block), StoreError> {
    let subnet = accounts::subnet_by_id(db, id)?
        .ok_or_else(|| StoreError::Missing { what: "subnet", value: id.to_string() })?;
    let held = Held::private(db, id, free_since)?;
    let block = Block::new(subnet.network, subnet.prefix_len, held, beginning(id));
    Ok((subnet, block))
}

/// Offset of a subnet's first address, by FNV-1a: the first instances of two accounts with the same
/// block get different addresses.
fn beginning(subnet: &SubnetId) -> u32 {
    subnet.as_str().bytes().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

/// Addresses that must not be assigned.
struct Held {
    /// Assigned addresses.
    used: BTreeSet<Ipv4Addr>,
    /// Addresses released recently: packets for the last holder may still arrive.
    resting: BTreeSet<Ipv4Addr>,
    /// The address assigned last.
    newest: Option<Ipv4Addr>,
}

impl Held {
    fn public(db: &Transaction<'_>, free_since: Micros) -> Result<Self, StoreError> {
        Ok(Self {
            used: addresses(db, "SELECT public_ip FROM interfaces WHERE released_at IS NULL", [])?,
            resting: addresses(
                db,
                "SELECT public_ip FROM interfaces WHERE released_at > ?1",
                [time(free_since)],
            )?,
            newest: addresses(db, "SELECT public_ip FROM interfaces ORDER BY rowid DESC LIMIT 1", [])?
                .pop_last(),
        })
    }

    fn private(db: &Transaction<'_>, subnet: &SubnetId, free_since: Micros) -> Result<Self, StoreError> {
        Ok(Self {
            used: addresses(
                db,
                "SELECT private_ip FROM interfaces WHERE released_at IS NULL AND subnet_id = ?1",
                [text(subnet)],
            )?,
            resting: addresses(
                db,
                "SELECT private_ip FROM interfaces WHERE released_at > ?1 AND subnet_id = ?2",
                [time(free_since), text(subnet)],
            )?,
            newest: addresses(
                db,
                "SELECT private_ip FROM interfaces WHERE subnet_id = ?1 ORDER BY rowid DESC LIMIT 1",
                [text(subnet)],
            )?
            .pop_last(),
        })
    }
}

fn addresses<const N: usize>(
    db: &Transaction<'_>,
    query: &str,
    arguments: [Value; N],
) -> Result<BTreeSet<Ipv4Addr>, StoreError> {
    let mut query = db.prepare_cached(query)?;
    let rows = query.query_map(params_from_iter(arguments), |row| Cursor::new(row).parse())?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// A block of addresses, assigned in turn: the one after the newest first.
struct Block {
    network: Ipv4Addr,
    prefix: u8,
    held: Held,
    /// How many addresses can be assigned.
    size: u32,
    /// Offset of the next candidate from the first assignable address.
    next: u32,
    tried: u32,
}

impl Block {
    /// `beginning`, taken modulo the size, is the first candidate of a block without assignments.
    fn new(network: Ipv4Addr, prefix: u8, held: Held, beginning: u32) -> Self {
        // The last address is the broadcast.
        let last = (1_u32 << (32 - u32::from(prefix.clamp(1, 32)))) - 1;
        let size = last.saturating_sub(RESERVED);
        let after = |newest: Ipv4Addr| {
            let number = u32::from(newest).checked_sub(u32::from(network).saturating_add(RESERVED))?;
            (number < size).then_some(number + 1)
        };
        let next = held.newest.and_then(after).unwrap_or(beginning).checked_rem(size).unwrap_or(0);
        Self { network, prefix, held, size, next, tried: 0 }
    }

    fn take(&mut self) -> Result<Ipv4Addr, StoreError> {
        while self.tried < self.size {
            let address = accounts::address(self.network, RESERVED + self.next);
            self.next = (self.next + 1) % self.size;
            self.tried += 1;
            if !self.held.used.contains(&address) && !self.held.resting.contains(&address) {
                return Ok(address);
            }
        }
        let pool = format!("{}/{}", self.network, self.prefix);
        let resting = self.held.resting.difference(&self.held.used).count();
        Err(StoreError::NoAddress(if resting == 0 {
            pool
        } else {
            format!(
                "{pool}, where {resting} were released a short time ago and rest: try again in some minutes"
            )
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accounts_that_have_one_instance_each_do_not_have_the_same_private_address() {
        let network = Ipv4Addr::new(172, 31, 0, 0);
        let first = |number: u8| {
            let id = SubnetId::from_random([number; 9]);
            let held = Held { used: BTreeSet::new(), resting: BTreeSet::new(), newest: None };
            Block::new(network, 20, held, beginning(&id)).take().unwrap()
        };
        let firsts: BTreeSet<_> = (0..20).map(first).collect();
        assert!(firsts.len() > 18, "{firsts:?}");
        let (low, high) = (Ipv4Addr::new(172, 31, 0, 4), Ipv4Addr::new(172, 31, 15, 254));
        assert!(firsts.iter().all(|address| (low..=high).contains(address)), "{firsts:?}");
    }

    #[test]
    fn the_smallest_blocks_have_no_address_and_do_not_panic() {
        for prefix in 29..=32 {
            let held = Held { used: BTreeSet::new(), resting: BTreeSet::new(), newest: None };
            let mut block = Block::new(Ipv4Addr::new(10, 0, 0, 0), prefix, held, 77);
            let given = std::iter::from_fn(|| block.take().ok()).count();
            assert_eq!(given, if prefix == 29 { 3 } else { 0 }, "/{prefix}");
        }
    }
}
