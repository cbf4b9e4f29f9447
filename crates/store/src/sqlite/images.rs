//! Images and the files they are made of.

use super::codec::{Cursor, flag, int, maybe, text, time};
use super::{is_duplicate, is_missing};
use crate::error::StoreError;
use crate::rows::{BlobRow, ImageRow, Released};
use roost_types::api::Image;
use roost_types::{AccountId, BlobId, ImageId, Micros};
use rusqlite::{Connection, OptionalExtension, Row, Transaction, params};

pub fn put_blob(db: &Transaction<'_>, row: &BlobRow) -> Result<(), StoreError> {
    db.execute(
        "INSERT INTO blobs (blob_id, bytes, account_id, created_at) VALUES (?1, ?2, ?3, ?4)
         ON CONFLICT (blob_id) DO UPDATE SET removed_at = NULL",
        params![text(&row.blob_id), int(row.bytes), text(&row.account_id), time(row.created_at)],
    )?;
    db.execute(
        "INSERT INTO blob_owners (blob_id, account_id, created_at) VALUES (?1, ?2, ?3)
         ON CONFLICT (blob_id, account_id) DO UPDATE SET created_at = excluded.created_at",
        params![text(&row.blob_id), text(&row.account_id), time(row.created_at)],
    )?;
    Ok(())
}

pub fn owns_blob(db: &Connection, account: &AccountId, id: &BlobId) -> Result<bool, StoreError> {
    let mut query = db.prepare_cached(
        "SELECT count(*) FROM blob_owners JOIN blobs USING (blob_id)
         WHERE blob_id = ?1 AND blob_owners.account_id = ?2 AND removed_at IS NULL",
    )?;
    Ok(query.query_row([id.as_str(), account.as_str()], |row| row.get::<_, i64>(0))? > 0)
}

pub fn blob_bytes(db: &Connection, account: &AccountId) -> Result<u64, StoreError> {
    let mut query = db.prepare_cached(
        "SELECT coalesce(sum(bytes), 0) FROM blob_owners JOIN blobs USING (blob_id)
         WHERE blob_owners.account_id = ?1 AND removed_at IS NULL",
    )?;
    Ok(query.query_row([account.as_str()], |row| Cursor::new(row).count())?)
}

/// SQL condition: an image of the reference's owner that is registered or has instances names the
/// blob.
const NAMED: &str = "EXISTS (SELECT 1 FROM images WHERE images.account_id = blob_owners.account_id
    AND blob_owners.blob_id IN (kernel, initrd, root)
    AND (deregistered_at IS NULL OR EXISTS (SELECT 1 FROM instances
         WHERE instances.image_id = images.image_id AND instances.terminated_at IS NULL)))";

pub fn release_blob(
    db: &Transaction<'_>,
    account: &AccountId,
    id: &BlobId,
    at: Micros,
) -> Result<Released, StoreError> {
    if !owns_blob(db, account, id)? {
        return Ok(Released::Absent);
    }
    let removed = db.execute(
        &format!("DELETE FROM blob_owners WHERE blob_id = ?1 AND account_id = ?2 AND NOT {NAMED}"),
        [id.as_str(), account.as_str()],
    )?;
    if removed == 0 {
        return Ok(Released::Named);
    }
    remove_ownerless(db, at)?;
    Ok(Released::Done)
}

pub fn release_unnamed_blobs(db: &Transaction<'_>, before: Micros, at: Micros) -> Result<u64, StoreError> {
    let query = format!("DELETE FROM blob_owners WHERE created_at < ?1 AND NOT {NAMED}");
    db.execute(&query, [time(before)])?;
    remove_ownerless(db, at)
}

fn remove_ownerless(db: &Transaction<'_>, at: Micros) -> Result<u64, StoreError> {
    let removed = db.execute(
        "UPDATE blobs SET removed_at = ?1 WHERE removed_at IS NULL
         AND NOT EXISTS (SELECT 1 FROM blob_owners WHERE blob_owners.blob_id = blobs.blob_id)",
        [time(at)],
    )?;
    Ok(removed as u64)
}

pub fn blob(db: &Connection, id: &BlobId) -> Result<Option<BlobRow>, StoreError> {
    let read = |row: &Row<'_>| {
        let cursor = &mut Cursor::new(row);
        Ok(BlobRow {
            blob_id: cursor.parse()?,
            bytes: cursor.count()?,
            account_id: cursor.parse()?,
            created_at: cursor.time()?,
        })
    };
    let mut query = db.prepare_cached(
        "SELECT blob_id, bytes, account_id, created_at FROM blobs WHERE blob_id = ?1 AND removed_at IS NULL",
    )?;
    Ok(query.query_row([id.as_str()], read).optional()?)
}

const COLUMNS: &str =
    "image_id, account_id, name, description, public, min_volume_gib, boot_args, default_user,
    ssh, created_at, kernel, initrd, root, root_bytes, deregistered_at";

fn image(row: &Row<'_>) -> Result<ImageRow, rusqlite::Error> {
    let cursor = &mut Cursor::new(row);
    Ok(ImageRow {
        image: Image {
            image_id: cursor.parse()?,
            owner: cursor.parse()?,
            name: cursor.raw()?,
            description: cursor.raw()?,
            public: cursor.raw()?,
            min_volume_gib: cursor.count()?,
            boot_args: cursor.raw()?,
            default_user: cursor.raw()?,
            ssh: cursor.raw()?,
            created_at: cursor.time()?,
        },
        kernel: cursor.parse()?,
        initrd: cursor.maybe_parse()?,
        root: cursor.parse()?,
        root_bytes: cursor.count()?,
        deregistered_at: cursor.maybe_time()?,
    })
}

pub fn register(db: &Transaction<'_>, row: &ImageRow) -> Result<(), StoreError> {
    let image = &row.image;
    for id in [Some(&row.kernel), row.initrd.as_ref(), Some(&row.root)].into_iter().flatten() {
        if !owns_blob(db, &image.owner, id)? {
            return Err(StoreError::Missing { what: "uploaded file", value: id.to_string() });
        }
    }
    db.execute(
        &format!(
            "INSERT INTO images ({COLUMNS}) VALUES (?1,?2,?3,?4,?5,?6,?7,?8,?9,?10,?11,?12,?13,?14,?15)"
        ),
        params![
            text(&image.image_id),
            text(&image.owner),
            image.name,
            image.description,
            flag(image.public),
            int(image.min_volume_gib),
            image.boot_args,
            image.default_user,
            maybe(image.ssh, flag),
            time(image.created_at),
            text(&row.kernel),
            maybe(row.initrd.as_ref(), text),
            text(&row.root),
            int(row.root_bytes),
            maybe(row.deregistered_at, time),
        ],
    )
    .map_err(|error| {
        if is_duplicate(&error) {
            StoreError::Duplicate { what: "image", value: image.name.clone() }
        } else if is_missing(&error) {
            StoreError::Missing { what: "account", value: image.owner.to_string() }
        } else {
            error.into()
        }
    })?;
    Ok(())
}

pub fn visible(db: &Connection, account: &AccountId) -> Result<Vec<ImageRow>, StoreError> {
    let mut query = db.prepare_cached(&format!(
        "SELECT {COLUMNS} FROM images
         WHERE deregistered_at IS NULL AND (public = 1 OR account_id = ?1) ORDER BY name, image_id"
    ))?;
    let rows = query.query_map([account.as_str()], image)?;
    Ok(rows.collect::<Result<_, _>>()?)
}

pub fn find(db: &Connection, account: &AccountId, id_or_name: &str) -> Result<Option<ImageRow>, StoreError> {
    let mut query = db.prepare_cached(&format!(
        "SELECT {COLUMNS} FROM images
         WHERE deregistered_at IS NULL AND (public = 1 OR account_id = ?1) AND (image_id = ?2 OR name = ?2)
         ORDER BY image_id = ?2 DESC, account_id = ?1 DESC, created_at DESC, image_id LIMIT 1"
    ))?;
    Ok(query.query_row(params![account.as_str(), id_or_name], image).optional()?)
}

pub fn one(db: &Connection, id: &ImageId) -> Result<Option<ImageRow>, StoreError> {
    let mut query = db.prepare_cached(&format!("SELECT {COLUMNS} FROM images WHERE image_id = ?1"))?;
    Ok(query.query_row([id.as_str()], image).optional()?)
}

pub fn deregister(db: &Transaction<'_>, id: &ImageId, at: Micros) -> Result<bool, StoreError> {
    let changed = db.execute(
        "UPDATE images SET deregistered_at = ?2 WHERE image_id = ?1 AND deregistered_at IS NULL",
        params![id.as_str(), time(at)],
    )?;
    Ok(changed > 0)
}
