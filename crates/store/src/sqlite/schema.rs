//! The schema, migration by migration. A migration that was released is never edited.
//!
//! Times are integer microseconds since 1970 UTC, ids text, structures JSON text. Money is never stored: a bill is
//! computed from `usage_events`.

use rusqlite_migration::{M, Migrations};

/// How many migrations there are: the newest schema number.
pub const VERSION: i64 = 8;

/// Every migration, oldest first.
pub fn migrations() -> Migrations<'static> {
    Migrations::new(vec![
        M::up(FIRST),
        M::up(IMAGE_SSH),
        M::up(META),
        M::up(PARTS),
        M::up(BLOB_OWNERS),
        M::up(DISK),
        M::up(ADDRESSES),
        M::up(METADATA_OPTIONS),
    ])
}

const IMAGE_SSH: &str = "ALTER TABLE images ADD COLUMN ssh INTEGER CHECK (ssh IN (0, 1));";

/// Values about the database itself. `epoch` grows with every restore from a backup; `clock_high`
/// is the newest time of any commit.
const META: &str = "
CREATE TABLE meta (
    name  TEXT PRIMARY KEY,
    value INTEGER NOT NULL
) STRICT;
INSERT INTO meta VALUES ('epoch', 1);
INSERT INTO meta VALUES ('clock_high', max(
    (SELECT coalesce(max(at), 0) FROM usage_events),
    (SELECT coalesce(max(seen_at), 0) FROM proofs),
    (SELECT coalesce(max(last_report_at), 0) FROM hosts)));
";

/// A start may have parts. `segment` is the sequence of the event that opened the current part.
/// `continues` is set if nobody asked for the start. Bills up to `sealed` are final.
const PARTS: &str = "
ALTER TABLE instances ADD COLUMN continues INTEGER NOT NULL DEFAULT 0 CHECK (continues IN (0, 1));
ALTER TABLE instances ADD COLUMN segment INTEGER NOT NULL DEFAULT 0 CHECK (segment >= 0);
ALTER TABLE usage_events ADD COLUMN continues INTEGER NOT NULL DEFAULT 0 CHECK (continues IN (0, 1));
INSERT INTO meta VALUES ('sealed', 0);
";

const FIRST: &str = "
CREATE TABLE accounts (
    account_id TEXT PRIMARY KEY,
    name       TEXT NOT NULL UNIQUE,
    admin      INTEGER NOT NULL CHECK (admin IN (0, 1)),
    created_at INTEGER NOT NULL
) STRICT;

CREATE TABLE access_keys (
    access_key_id TEXT PRIMARY KEY,
    account_id    TEXT NOT NULL REFERENCES accounts,
    sealed_secret BLOB NOT NULL,
    created_at    INTEGER NOT NULL,
    active        INTEGER NOT NULL CHECK (active IN (0, 1))
) STRICT;

CREATE TABLE key_pairs (
    key_pair_id TEXT PRIMARY KEY,
    account_id  TEXT NOT NULL REFERENCES accounts,
    key_name    TEXT NOT NULL,
    fingerprint TEXT NOT NULL,
    public_key  TEXT NOT NULL,
    created_at  INTEGER NOT NULL,
    UNIQUE (account_id, key_name)
) STRICT;

CREATE TABLE blobs (
    blob_id    TEXT PRIMARY KEY,
    bytes      INTEGER NOT NULL CHECK (bytes >= 0),
    account_id TEXT NOT NULL REFERENCES accounts,
    created_at INTEGER NOT NULL
) STRICT;

CREATE TABLE images (
    image_id        TEXT PRIMARY KEY,
    account_id      TEXT NOT NULL REFERENCES accounts,
    name            TEXT NOT NULL,
    description     TEXT NOT NULL,
    public          INTEGER NOT NULL CHECK (public IN (0, 1)),
    min_volume_gib  INTEGER NOT NULL CHECK (min_volume_gib > 0),
    boot_args       TEXT NOT NULL,
    default_user    TEXT NOT NULL,
    kernel          TEXT NOT NULL REFERENCES blobs,
    initrd          TEXT REFERENCES blobs,
    root            TEXT NOT NULL REFERENCES blobs,
    root_bytes      INTEGER NOT NULL CHECK (root_bytes >= 0),
    created_at      INTEGER NOT NULL,
    deregistered_at INTEGER
) STRICT;
CREATE UNIQUE INDEX image_names ON images (account_id, name) WHERE deregistered_at IS NULL;

CREATE TABLE hosts (
    host_id        TEXT PRIMARY KEY,
    hostname       TEXT NOT NULL,
    zone           TEXT NOT NULL,
    cpu_milli      INTEGER NOT NULL CHECK (cpu_milli >= 0),
    memory_mib     INTEGER NOT NULL CHECK (memory_mib >= 0),
    facts          TEXT NOT NULL,
    registered_at  INTEGER NOT NULL,
    last_report_at INTEGER NOT NULL,
    boot_id        TEXT
) STRICT;

CREATE TABLE reservations (
    reservation_id TEXT PRIMARY KEY,
    account_id     TEXT NOT NULL REFERENCES accounts,
    created_at     INTEGER NOT NULL
) STRICT;

CREATE TABLE client_tokens (
    account_id     TEXT NOT NULL REFERENCES accounts,
    token          TEXT NOT NULL,
    parameter_hash TEXT NOT NULL,
    reservation_id TEXT NOT NULL REFERENCES reservations,
    created_at     INTEGER NOT NULL,
    PRIMARY KEY (account_id, token)
) STRICT;

CREATE TABLE vpcs (
    vpc_id     TEXT PRIMARY KEY,
    account_id TEXT NOT NULL REFERENCES accounts,
    region     TEXT NOT NULL,
    cidr       TEXT NOT NULL,
    is_default INTEGER NOT NULL CHECK (is_default IN (0, 1))
) STRICT;
CREATE UNIQUE INDEX one_default_vpc ON vpcs (account_id, region) WHERE is_default = 1;

CREATE TABLE subnets (
    subnet_id        TEXT PRIMARY KEY,
    vpc_id           TEXT NOT NULL REFERENCES vpcs,
    account_id       TEXT NOT NULL REFERENCES accounts,
    zone             TEXT NOT NULL,
    network          TEXT NOT NULL,
    prefix_len       INTEGER NOT NULL CHECK (prefix_len BETWEEN 16 AND 28),
    default_for_zone INTEGER NOT NULL CHECK (default_for_zone IN (0, 1)),
    UNIQUE (vpc_id, network)
) STRICT;
CREATE UNIQUE INDEX one_default_subnet ON subnets (vpc_id, zone) WHERE default_for_zone = 1;

CREATE TABLE instances (
    instance_id    TEXT PRIMARY KEY,
    account_id     TEXT NOT NULL REFERENCES accounts,
    owner          TEXT NOT NULL,
    region         TEXT NOT NULL,
    zone           TEXT NOT NULL,
    reservation_id TEXT NOT NULL REFERENCES reservations,
    launch_index   INTEGER NOT NULL CHECK (launch_index >= 0),
    launched_at    INTEGER NOT NULL,
    desired        TEXT NOT NULL,
    step           TEXT NOT NULL,
    state          TEXT NOT NULL,
    step_since     INTEGER NOT NULL,
    observed       TEXT,
    state_reason   TEXT,
    trouble        TEXT,
    generation     INTEGER NOT NULL CHECK (generation >= 1),
    incarnation    INTEGER NOT NULL CHECK (incarnation >= 1),
    incarnation_at INTEGER NOT NULL,
    reboots        INTEGER NOT NULL CHECK (reboots >= 0),
    force          INTEGER NOT NULL CHECK (force IN (0, 1)),
    host_id        TEXT REFERENCES hosts,
    boot_id        TEXT,
    open_since     INTEGER,
    running_since  INTEGER,
    bill_until     INTEGER,
    tries          INTEGER NOT NULL CHECK (tries >= 0),
    not_before     INTEGER NOT NULL,
    deadline       INTEGER,
    type_name      TEXT NOT NULL,
    type_spec      TEXT NOT NULL,
    image_id       TEXT NOT NULL REFERENCES images,
    image_name     TEXT NOT NULL,
    default_user   TEXT NOT NULL,
    key_name       TEXT,
    public_keys    TEXT NOT NULL,
    user_data      TEXT,
    tags           TEXT NOT NULL,
    client_token   TEXT,
    timing         TEXT NOT NULL,
    terminated_at  INTEGER,
    revision       INTEGER NOT NULL CHECK (revision >= 1),
    lease          INTEGER NOT NULL DEFAULT 0,
    lease_owner    TEXT,
    UNIQUE (reservation_id, launch_index)
) STRICT;
CREATE INDEX instances_by_account ON instances (account_id, launched_at);
CREATE INDEX instances_by_host ON instances (host_id) WHERE terminated_at IS NULL;
CREATE INDEX instances_due ON instances (not_before) WHERE terminated_at IS NULL;

CREATE TABLE claims (
    instance_id TEXT PRIMARY KEY REFERENCES instances,
    host_id     TEXT NOT NULL REFERENCES hosts,
    cpu_milli   INTEGER NOT NULL CHECK (cpu_milli > 0),
    memory_mib  INTEGER NOT NULL CHECK (memory_mib > 0)
) STRICT;
CREATE INDEX claims_by_host ON claims (host_id);

CREATE TABLE interfaces (
    interface_id TEXT PRIMARY KEY,
    account_id   TEXT NOT NULL REFERENCES accounts,
    vpc_id       TEXT NOT NULL REFERENCES vpcs,
    subnet_id    TEXT NOT NULL REFERENCES subnets,
    instance_id  TEXT NOT NULL UNIQUE REFERENCES instances,
    mac          TEXT NOT NULL,
    private_ip   TEXT NOT NULL,
    prefix_len   INTEGER NOT NULL,
    gateway      TEXT NOT NULL,
    public_ip    TEXT NOT NULL,
    ingress      TEXT NOT NULL,
    released_at  INTEGER
) STRICT;
CREATE UNIQUE INDEX private_addresses ON interfaces (subnet_id, private_ip) WHERE released_at IS NULL;
CREATE UNIQUE INDEX public_addresses ON interfaces (public_ip) WHERE released_at IS NULL;

CREATE TABLE volumes (
    volume_id             TEXT PRIMARY KEY,
    account_id            TEXT NOT NULL REFERENCES accounts,
    zone                  TEXT NOT NULL,
    host_id               TEXT REFERENCES hosts,
    instance_id           TEXT UNIQUE REFERENCES instances,
    state                 TEXT NOT NULL,
    volume_type           TEXT NOT NULL,
    size_gib              INTEGER NOT NULL CHECK (size_gib > 0),
    delete_on_termination INTEGER NOT NULL CHECK (delete_on_termination IN (0, 1)),
    created_at            INTEGER NOT NULL
) STRICT;
CREATE INDEX volumes_by_account ON volumes (account_id, created_at);

CREATE TABLE usage_events (
    number      INTEGER PRIMARY KEY,
    account_id  TEXT NOT NULL REFERENCES accounts,
    resource    TEXT NOT NULL,
    meter       TEXT NOT NULL,
    incarnation INTEGER NOT NULL CHECK (incarnation >= 1),
    sequence    INTEGER NOT NULL CHECK (sequence >= 0),
    kind        TEXT NOT NULL CHECK (kind IN ('open', 'close')),
    at          INTEGER NOT NULL,
    sku         TEXT NOT NULL,
    quantity    INTEGER NOT NULL CHECK (quantity >= 0),
    is_open     INTEGER NOT NULL CHECK (is_open IN (0, 1)),
    UNIQUE (resource, meter, incarnation, sequence)
) STRICT;
CREATE UNIQUE INDEX one_open_interval ON usage_events (resource, meter) WHERE is_open = 1;
CREATE INDEX usage_by_account ON usage_events (account_id);

CREATE TABLE proofs (
    resource TEXT PRIMARY KEY,
    seen_at  INTEGER NOT NULL
) STRICT;
";

/// An uploaded file belongs to the accounts that uploaded it. Accounts with an image of the file
/// get it too: before this schema, the file's name was enough. `removed_at` keeps the row for
/// withdrawn images, which still name it.
const BLOB_OWNERS: &str = "
CREATE TABLE blob_owners (
    blob_id    TEXT NOT NULL REFERENCES blobs,
    account_id TEXT NOT NULL REFERENCES accounts,
    created_at INTEGER NOT NULL,
    PRIMARY KEY (blob_id, account_id)
) STRICT;
CREATE INDEX blob_owners_by_account ON blob_owners (account_id);
ALTER TABLE blobs ADD COLUMN removed_at INTEGER;
CREATE INDEX instances_by_image ON instances (image_id) WHERE terminated_at IS NULL;

INSERT INTO blob_owners SELECT blob_id, account_id, created_at FROM blobs;
INSERT OR IGNORE INTO blob_owners SELECT kernel, account_id, created_at FROM images;
INSERT OR IGNORE INTO blob_owners SELECT initrd, account_id, created_at FROM images WHERE initrd IS NOT NULL;
INSERT OR IGNORE INTO blob_owners SELECT root, account_id, created_at FROM images;
";

/// The claim on a host's disk is the size of its volumes, those of stopped instances included.
const DISK: &str = "
ALTER TABLE hosts ADD COLUMN disk_gib INTEGER NOT NULL DEFAULT 0 CHECK (disk_gib >= 0);
UPDATE hosts SET disk_gib = json_extract(facts, '$.disk_gib');
CREATE INDEX volumes_by_host ON volumes (host_id, size_gib) WHERE state <> 'deleted';
";

/// Columns for the newest address of a subnet, and for addresses at rest.
const ADDRESSES: &str = "
CREATE INDEX interfaces_by_subnet ON interfaces (subnet_id);
CREATE INDEX interfaces_released ON interfaces (released_at) WHERE released_at IS NOT NULL;
";

/// An instance without options has the defaults of a launch.
const METADATA_OPTIONS: &str =
    "ALTER TABLE instances ADD COLUMN metadata_options TEXT NOT NULL DEFAULT '{}';";

#[cfg(test)]
mod tests {
    use super::*;
    use rusqlite::Connection;

    #[test]
    fn an_older_databases_files_belong_to_who_uploaded_them_and_to_who_has_images_of_them() {
        let mut db = Connection::open_in_memory().unwrap();
        migrations().to_version(&mut db, 1).unwrap();
        db.execute_batch(
            "INSERT INTO accounts VALUES ('one', 'one', 1, 0), ('two', 'two', 0, 0);
             INSERT INTO blobs VALUES ('k', 1, 'one', 5), ('r', 1, 'one', 5);
             INSERT INTO images VALUES ('ami', 'two', 'n', '', 0, 1, '', 'root', 'k', NULL, 'k', 1, 6, NULL);",
        )
        .unwrap();
        migrations().to_latest(&mut db).unwrap();
        let mut query =
            db.prepare("SELECT blob_id || ' ' || account_id FROM blob_owners ORDER BY 1").unwrap();
        let owners: Vec<String> =
            query.query_map([], |row| row.get(0)).unwrap().map(Result::unwrap).collect();
        assert_eq!(owners, ["k one", "k two", "r one"]);
    }
}
