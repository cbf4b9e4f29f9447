//! Accounts, access keys, key pairs, and the network that every account has from the start.

use super::codec::{Cursor, flag, text, time};
use super::{is_duplicate, is_missing};
use crate::error::StoreError;
use crate::rows::{AccessKeyRow, KeyPairRow, NewAccountRows, SubnetRow};
use roost_types::api::{Account, KeyPair};
use roost_types::{AccountId, SubnetId, VpcId};
use rusqlite::{Connection, OptionalExtension, Row, Transaction, params};
use std::net::Ipv4Addr;

/// The default VPC, as on EC2.
const VPC: (Ipv4Addr, u8) = (Ipv4Addr::new(172, 31, 0, 0), 16);
/// Prefix length of a default subnet.
const SUBNET_PREFIX: u8 = 20;
/// Subnets of that size in the VPC.
const SUBNETS: u32 = 16;

pub fn create(db: &Transaction<'_>, new: &NewAccountRows) -> Result<(), StoreError> {
    let account = &new.account;
    db.execute(
        "INSERT INTO accounts (account_id, name, admin, created_at) VALUES (?1, ?2, ?3, ?4)",
        params![text(&account.account_id), account.name, flag(account.admin), time(account.created_at)],
    )
    .map_err(|error| duplicate(error, "account", &account.name))?;
    add_key(db, &new.key)?;
    insert_vpc(db, &account.account_id, &new.vpc_id, &new.region)?;
    for (zone, subnet_id) in &new.subnets {
        insert_subnet(db, &account.account_id, &new.vpc_id, zone, subnet_id)?;
    }
    Ok(())
}

fn duplicate(error: rusqlite::Error, what: &'static str, value: &str) -> StoreError {
    if is_duplicate(&error) { StoreError::Duplicate { what, value: value.to_owned() } } else { error.into() }
}

fn account(cursor: &mut Cursor<'_>) -> Result<Account, rusqlite::Error> {
    Ok(Account {
        account_id: cursor.parse()?,
        name: cursor.raw()?,
        admin: cursor.raw()?,
        created_at: cursor.time()?,
    })
}

const ACCOUNT: &str = "SELECT account_id, name, admin, created_at FROM accounts";

pub fn all(db: &Connection) -> Result<Vec<Account>, StoreError> {
    let mut query = db.prepare_cached(&format!("{ACCOUNT} ORDER BY name"))?;
    let rows = query.query_map([], |row| account(&mut Cursor::new(row)))?;
    Ok(rows.collect::<Result<_, _>>()?)
}

pub fn one(db: &Connection, id: &AccountId) -> Result<Option<Account>, StoreError> {
    let mut query = db.prepare_cached(&format!("{ACCOUNT} WHERE account_id = ?1"))?;
    Ok(query.query_row([id.as_str()], |row| account(&mut Cursor::new(row))).optional()?)
}

pub fn key(db: &Connection, id: &str) -> Result<Option<(AccessKeyRow, Account)>, StoreError> {
    let mut query = db.prepare_cached(
        "SELECT k.access_key_id, k.account_id, k.sealed_secret, k.created_at, k.active,
                a.account_id, a.name, a.admin, a.created_at
         FROM access_keys k JOIN accounts a USING (account_id) WHERE k.access_key_id = ?1",
    )?;
    let read = |row: &Row<'_>| {
        let cursor = &mut Cursor::new(row);
        let key = AccessKeyRow {
            access_key_id: cursor.raw()?,
            account_id: cursor.parse()?,
            sealed_secret: cursor.raw()?,
            created_at: cursor.time()?,
            active: cursor.raw()?,
        };
        Ok((key, account(cursor)?))
    };
    Ok(query.query_row([id], read).optional()?)
}

pub fn add_key(db: &Transaction<'_>, key: &AccessKeyRow) -> Result<(), StoreError> {
    db.execute(
        "INSERT INTO access_keys (access_key_id, account_id, sealed_secret, created_at, active)
         VALUES (?1, ?2, ?3, ?4, ?5)",
        params![
            key.access_key_id,
            text(&key.account_id),
            key.sealed_secret,
            time(key.created_at),
            flag(key.active)
        ],
    )
    .map_err(|error| {
        if is_missing(&error) {
            StoreError::Missing { what: "account", value: key.account_id.to_string() }
        } else {
            duplicate(error, "access key", &key.access_key_id)
        }
    })?;
    Ok(())
}

fn insert_vpc(
    db: &Transaction<'_>,
    account: &AccountId,
    vpc: &VpcId,
    region: &str,
) -> Result<(), StoreError> {
    db.execute(
        "INSERT INTO vpcs (vpc_id, account_id, region, cidr, is_default) VALUES (?1, ?2, ?3, ?4, 1)",
        params![text(vpc), text(account), region, format!("{}/{}", VPC.0, VPC.1)],
    )
    .map_err(|error| duplicate(error, "VPC", vpc.as_str()))?;
    Ok(())
}

/// Adds the next free /20 of the VPC as the default subnet of a zone.
fn insert_subnet(
    db: &Transaction<'_>,
    account: &AccountId,
    vpc: &VpcId,
    zone: &str,
    subnet: &SubnetId,
) -> Result<(), StoreError> {
    let taken: u32 =
        db.query_row("SELECT count(*) FROM subnets WHERE vpc_id = ?1", [vpc.as_str()], |row| row.get(0))?;
    if taken >= SUBNETS {
        return Err(StoreError::NoAddress(format!("{}/{} for one more zone", VPC.0, VPC.1)));
    }
    let network = Ipv4Addr::from(u32::from(VPC.0) + (taken << (32 - SUBNET_PREFIX)));
    db.execute(
        "INSERT INTO subnets (subnet_id, vpc_id, account_id, zone, network, prefix_len, default_for_zone)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, 1)",
        params![text(subnet), text(vpc), text(account), zone, text(network), SUBNET_PREFIX],
    )
    .map_err(|error| duplicate(error, "default subnet of zone", zone))?;
    Ok(())
}

pub fn find_subnet(
    db: &Connection,
    account: &AccountId,
    region: &str,
    zone: &str,
) -> Result<Option<SubnetRow>, StoreError> {
    let mut query = db.prepare_cached(
        "SELECT s.subnet_id, s.vpc_id, s.account_id, s.zone, s.network, s.prefix_len, s.default_for_zone
         FROM subnets s JOIN vpcs v USING (vpc_id)
         WHERE v.account_id = ?1 AND v.region = ?2 AND v.is_default = 1 AND s.zone = ?3
           AND s.default_for_zone = 1",
    )?;
    Ok(query.query_row(params![account.as_str(), region, zone], subnet).optional()?)
}

fn subnet(row: &Row<'_>) -> Result<SubnetRow, rusqlite::Error> {
    let cursor = &mut Cursor::new(row);
    Ok(SubnetRow {
        subnet_id: cursor.parse()?,
        vpc_id: cursor.parse()?,
        account_id: cursor.parse()?,
        zone: cursor.raw()?,
        network: cursor.parse()?,
        prefix_len: cursor.count()?,
        default_for_zone: cursor.raw()?,
    })
}

pub fn subnet_by_id(db: &Connection, id: &SubnetId) -> Result<Option<SubnetRow>, StoreError> {
    let mut query = db.prepare_cached(
        "SELECT subnet_id, vpc_id, account_id, zone, network, prefix_len, default_for_zone
         FROM subnets WHERE subnet_id = ?1",
    )?;
    Ok(query.query_row([id.as_str()], subnet).optional()?)
}

pub fn default_subnet(
    db: &Transaction<'_>,
    account: &AccountId,
    region: &str,
    zone: &str,
    (fresh_vpc, fresh_subnet): (&VpcId, &SubnetId),
) -> Result<SubnetRow, StoreError> {
    if let Some(row) = find_subnet(db, account, region, zone)? {
        return Ok(row);
    }
    let vpc: Option<String> = db
        .query_row(
            "SELECT vpc_id FROM vpcs WHERE account_id = ?1 AND region = ?2 AND is_default = 1",
            params![account.as_str(), region],
            |row| row.get(0),
        )
        .optional()?;
    let vpc = match vpc.map(|id| id.parse::<VpcId>()) {
        Some(Ok(vpc)) => vpc,
        Some(Err(error)) => {
            return Err(StoreError::Unreadable { what: "vpcs.vpc_id".into(), detail: error.to_string() });
        }
        None => {
            insert_vpc(db, account, fresh_vpc, region)?;
            fresh_vpc.clone()
        }
    };
    insert_subnet(db, account, &vpc, zone, fresh_subnet)?;
    find_subnet(db, account, region, zone)?
        .ok_or_else(|| StoreError::Missing { what: "subnet", value: fresh_subnet.to_string() })
}

pub fn create_key_pair(db: &Transaction<'_>, row: &KeyPairRow) -> Result<(), StoreError> {
    let pair = &row.key_pair;
    db.execute(
        "INSERT INTO key_pairs (key_pair_id, account_id, key_name, fingerprint, public_key, created_at)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        params![
            text(&pair.key_pair_id),
            text(&row.account_id),
            pair.key_name,
            pair.fingerprint,
            pair.public_key,
            time(pair.created_at)
        ],
    )
    .map_err(|error| duplicate(error, "key pair", &pair.key_name))?;
    Ok(())
}

const KEY_PAIR: &str =
    "SELECT account_id, key_pair_id, key_name, fingerprint, public_key, created_at FROM key_pairs";

fn pair(row: &Row<'_>) -> Result<KeyPairRow, rusqlite::Error> {
    let cursor = &mut Cursor::new(row);
    Ok(KeyPairRow {
        account_id: cursor.parse()?,
        key_pair: KeyPair {
            key_pair_id: cursor.parse()?,
            key_name: cursor.raw()?,
            fingerprint: cursor.raw()?,
            public_key: cursor.raw()?,
            created_at: cursor.time()?,
        },
    })
}

pub fn key_pairs(db: &Connection, account: &AccountId) -> Result<Vec<KeyPairRow>, StoreError> {
    let mut query = db.prepare_cached(&format!("{KEY_PAIR} WHERE account_id = ?1 ORDER BY key_name"))?;
    let rows = query.query_map([account.as_str()], pair)?;
    Ok(rows.collect::<Result<_, _>>()?)
}

pub fn key_pair(db: &Connection, account: &AccountId, name: &str) -> Result<Option<KeyPairRow>, StoreError> {
    let mut query = db.prepare_cached(&format!("{KEY_PAIR} WHERE account_id = ?1 AND key_name = ?2"))?;
    Ok(query.query_row(params![account.as_str(), name], pair).optional()?)
}

pub fn delete_key_pair(db: &Transaction<'_>, account: &AccountId, name: &str) -> Result<bool, StoreError> {
    let gone = db.execute(
        "DELETE FROM key_pairs WHERE account_id = ?1 AND key_name = ?2",
        params![account.as_str(), name],
    )?;
    Ok(gone > 0)
}

/// Address `number` of a block.
pub fn address(network: Ipv4Addr, number: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(network).saturating_add(number))
}
