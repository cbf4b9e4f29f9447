-- A database of schema 1 as a controller of version 0.1.0 wrote it: three instances of one account, of which one was
-- stopped and one terminated, and one of another. `sqlite3 FILE .dump`; never edited.
PRAGMA foreign_keys = OFF;
PRAGMA user_version = 1;
BEGIN TRANSACTION;
CREATE TABLE access_keys (
    access_key_id TEXT PRIMARY KEY,
    account_id    TEXT NOT NULL REFERENCES accounts,
    sealed_secret BLOB NOT NULL,
    created_at    INTEGER NOT NULL,
    active        INTEGER NOT NULL CHECK (active IN (0, 1))
) STRICT;
INSERT INTO "access_keys" VALUES('AKIAalice','535459550305',X'01',1700000000000000,1);
INSERT INTO "access_keys" VALUES('AKIAbob','100006451042',X'01',1700000000000000,1);
INSERT INTO "access_keys" VALUES('AKIAroot','101953460082',X'01',1700000000000000,1);
CREATE TABLE accounts (
    account_id TEXT PRIMARY KEY,
    name       TEXT NOT NULL UNIQUE,
    admin      INTEGER NOT NULL CHECK (admin IN (0, 1)),
    created_at INTEGER NOT NULL
) STRICT;
INSERT INTO "accounts" VALUES('535459550305','alice',0,1700000000000000);
INSERT INTO "accounts" VALUES('100006451042','bob',0,1700000000000000);
INSERT INTO "accounts" VALUES('101953460082','root',1,1700000000000000);
CREATE TABLE blobs (
    blob_id    TEXT PRIMARY KEY,
    bytes      INTEGER NOT NULL CHECK (bytes >= 0),
    account_id TEXT NOT NULL REFERENCES accounts,
    created_at INTEGER NOT NULL
) STRICT;
INSERT INTO "blobs" VALUES('0707070707070707070707070707070707070707070707070707070707070707',1,'101953460082',1700000000000000);
CREATE TABLE claims (
    instance_id TEXT PRIMARY KEY REFERENCES instances,
    host_id     TEXT NOT NULL REFERENCES hosts,
    cpu_milli   INTEGER NOT NULL CHECK (cpu_milli > 0),
    memory_mib  INTEGER NOT NULL CHECK (memory_mib > 0)
) STRICT;
INSERT INTO "claims" VALUES('i-8a06815932354e976','h-01010101010101010',250,528);
INSERT INTO "claims" VALUES('i-6840874e3bd8da5d4','h-01010101010101010',250,528);
CREATE TABLE client_tokens (
    account_id     TEXT NOT NULL REFERENCES accounts,
    token          TEXT NOT NULL,
    parameter_hash TEXT NOT NULL,
    reservation_id TEXT NOT NULL REFERENCES reservations,
    created_at     INTEGER NOT NULL,
    PRIMARY KEY (account_id, token)
) STRICT;
INSERT INTO "client_tokens" VALUES('535459550305','token-1','aa2acaed66e60a399faaf93969a5303e7d24ea7e036552afe02935f8ebc20995','r-c725e8b7950aca060',1700000001000000);
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
INSERT INTO "hosts" VALUES('h-01010101010101010','sim-1','home-1a',8000,16384,'{"host_id":"h-01010101010101010","hostname":"sim-1","zone":"home-1a","cpus":8,"cpu_milli":8000,"memory_mib":16384,"disk_gib":1000,"max_vcpus":8,"overhead_mib":16,"gpus":0}',1700000001000000,1700000071000000,'boot-1');
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
INSERT INTO "images" VALUES('ami-441a43eff27540bc8','101953460082','tiny','',1,1,'console=ttyS0','root','0707070707070707070707070707070707070707070707070707070707070707',NULL,'0707070707070707070707070707070707070707070707070707070707070707',1,1700000000000000,NULL);
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
INSERT INTO "instances" VALUES('i-8a06815932354e976','535459550305','alice','home-1','home-1a','r-c725e8b7950aca060',0,1700000001000000,'running','run','running',1700000004000000,'{"state":"running","generation":1,"incarnation":1,"boot_id":"boot-1","since":1700000004000000,"run_began":1700000004000000,"run_ended":null,"last_seen":null,"reason":null,"refused":null,"trouble":null,"guest_ready":true,"guest_ready_at":1700000007000000,"ssh_host_key":null}',NULL,NULL,1,1,1700000001000000,0,0,'h-01010101010101010','boot-1',1700000004000000,1700000004000000,NULL,0,9223372036854775807,NULL,'home1.small','{"name":"home1.small","family":"home1","category":"general","vcpus":1,"memory_mib":512,"cpu_max_milli":1000,"cpu_claim_milli":250,"gpus":0,"instance_store_gb":0}','ami-441a43eff27540bc8','tiny','root','alice-key','[["alice-key","ssh-ed25519 AAAA alice"]]','IyEvYmluL3NoCg==','{"Name":"web ü \"''"}','token-1','{"incarnation":1,"controller":[{"part":"api","took_us":0},{"part":"placement","took_us":0},{"part":"store","took_us":0}],"host":[{"part":"agent.prepare","took_us":1}],"guest":{"part":"guest","took_us":3000000}}',NULL,4,0,NULL);
INSERT INTO "instances" VALUES('i-a81822beed0f0e2c0','535459550305','alice','home-1','home-1a','r-c725e8b7950aca060',1,1700000001000000,'stopped','rest','stopped',1700000077000000,'{"state":"stopped","generation":2,"incarnation":1,"boot_id":"boot-1","since":1700000077000000,"run_began":1700000004000000,"run_ended":1700000077000000,"last_seen":1700000075000000,"reason":null,"refused":null,"trouble":null,"guest_ready":false,"guest_ready_at":1700000007000000,"ssh_host_key":null}','{"code":"Client.UserInitiatedShutdown","message":"Stopped at its owner''s request."}',NULL,2,1,1700000001000000,0,0,'h-01010101010101010','boot-1',NULL,1700000004000000,1700000074000000,0,9223372036854775807,NULL,'home1.small','{"name":"home1.small","family":"home1","category":"general","vcpus":1,"memory_mib":512,"cpu_max_milli":1000,"cpu_claim_milli":250,"gpus":0,"instance_store_gb":0}','ami-441a43eff27540bc8','tiny','root','alice-key','[["alice-key","ssh-ed25519 AAAA alice"]]','IyEvYmluL3NoCg==','{"Name":"web ü \"''"}','token-1','{"incarnation":1,"controller":[{"part":"api","took_us":0},{"part":"placement","took_us":0},{"part":"store","took_us":0}],"host":[{"part":"agent.prepare","took_us":1}],"guest":{"part":"guest","took_us":3000000}}',NULL,7,0,NULL);
INSERT INTO "instances" VALUES('i-ecdecce3a6576ace1','535459550305','alice','home-1','home-1a','r-c725e8b7950aca060',2,1700000001000000,'terminated','gone','terminated',1700000079000000,'{"state":"absent","generation":2,"incarnation":1,"boot_id":"boot-1","since":1700000079000000,"run_began":1700000004000000,"run_ended":1700000078000000,"last_seen":1700000078000000,"reason":null,"refused":null,"trouble":null,"guest_ready":false,"guest_ready_at":1700000007000000,"ssh_host_key":null}','{"code":"Client.UserInitiatedShutdown","message":"Terminated at its owner''s request."}',NULL,2,1,1700000001000000,0,0,'h-01010101010101010','boot-1',NULL,1700000004000000,1700000077000000,0,9223372036854775807,NULL,'home1.small','{"name":"home1.small","family":"home1","category":"general","vcpus":1,"memory_mib":512,"cpu_max_milli":1000,"cpu_claim_milli":250,"gpus":0,"instance_store_gb":0}','ami-441a43eff27540bc8','tiny','root','alice-key','[["alice-key","ssh-ed25519 AAAA alice"]]','IyEvYmluL3NoCg==','{"Name":"web ü \"''"}','token-1','{"incarnation":1,"controller":[{"part":"api","took_us":0},{"part":"placement","took_us":0},{"part":"store","took_us":0}],"host":[{"part":"agent.prepare","took_us":1}],"guest":{"part":"guest","took_us":3000000}}',1700000079000000,7,0,NULL);
INSERT INTO "instances" VALUES('i-6840874e3bd8da5d4','100006451042','bob','home-1','home-1a','r-d64ac08cf8f3e9f70',0,1700000001000000,'running','run','running',1700000004000000,'{"state":"running","generation":1,"incarnation":1,"boot_id":"boot-1","since":1700000004000000,"run_began":1700000004000000,"run_ended":null,"last_seen":null,"reason":null,"refused":null,"trouble":null,"guest_ready":true,"guest_ready_at":1700000007000000,"ssh_host_key":null}',NULL,NULL,1,1,1700000001000000,0,0,'h-01010101010101010','boot-1',1700000004000000,1700000004000000,NULL,0,9223372036854775807,NULL,'home1.small','{"name":"home1.small","family":"home1","category":"general","vcpus":1,"memory_mib":512,"cpu_max_milli":1000,"cpu_claim_milli":250,"gpus":0,"instance_store_gb":0}','ami-441a43eff27540bc8','tiny','root',NULL,'[]',NULL,'{}',NULL,'{"incarnation":1,"controller":[{"part":"api","took_us":0},{"part":"placement","took_us":0},{"part":"store","took_us":0}],"host":[{"part":"agent.prepare","took_us":1}],"guest":{"part":"guest","took_us":3000000}}',NULL,4,0,NULL);
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
INSERT INTO "interfaces" VALUES('eni-70cf0188ab497bbbc','535459550305','vpc-c15c0289ec2d0a91c','subnet-ed8f01dbe4140b1dc','i-8a06815932354e976','06:70:cf:01:88:ab','172.31.1.184',20,'172.31.0.1','100.64.0.4','[{"protocol":"tcp","from_port":22,"to_port":22,"source":"0.0.0.0/0"},{"protocol":"icmp","from_port":0,"to_port":0,"source":"0.0.0.0/0"}]',NULL);
INSERT INTO "interfaces" VALUES('eni-5bb0aadf25b85c4d1','535459550305','vpc-c15c0289ec2d0a91c','subnet-ed8f01dbe4140b1dc','i-a81822beed0f0e2c0','06:5b:b0:aa:df:25','172.31.1.185',20,'172.31.0.1','100.64.0.5','[{"protocol":"tcp","from_port":22,"to_port":22,"source":"0.0.0.0/0"},{"protocol":"icmp","from_port":0,"to_port":0,"source":"0.0.0.0/0"}]',NULL);
INSERT INTO "interfaces" VALUES('eni-49c93ba96e848e119','535459550305','vpc-c15c0289ec2d0a91c','subnet-ed8f01dbe4140b1dc','i-ecdecce3a6576ace1','06:49:c9:3b:a9:6e','172.31.1.186',20,'172.31.0.1','100.64.0.6','[{"protocol":"tcp","from_port":22,"to_port":22,"source":"0.0.0.0/0"},{"protocol":"icmp","from_port":0,"to_port":0,"source":"0.0.0.0/0"}]',1700000079000000);
INSERT INTO "interfaces" VALUES('eni-766f2060f4845ec87','100006451042','vpc-d70d3259e4e1cb633','subnet-646070befe52afaec','i-6840874e3bd8da5d4','06:76:6f:20:60:f4','172.31.5.138',20,'172.31.0.1','100.64.0.7','[{"protocol":"tcp","from_port":22,"to_port":22,"source":"0.0.0.0/0"},{"protocol":"icmp","from_port":0,"to_port":0,"source":"0.0.0.0/0"}]',NULL);
CREATE TABLE key_pairs (
    key_pair_id TEXT PRIMARY KEY,
    account_id  TEXT NOT NULL REFERENCES accounts,
    key_name    TEXT NOT NULL,
    fingerprint TEXT NOT NULL,
    public_key  TEXT NOT NULL,
    created_at  INTEGER NOT NULL,
    UNIQUE (account_id, key_name)
) STRICT;
INSERT INTO "key_pairs" VALUES('key-5ac389a30c3b03630','535459550305','alice-key','SHA256:x','ssh-ed25519 AAAA alice',1700000000000000);
INSERT INTO "key_pairs" VALUES('key-9d3080237d64f5500','100006451042','bob-key','SHA256:x','ssh-ed25519 AAAA bob',1700000000000000);
INSERT INTO "key_pairs" VALUES('key-6373e32ef07584803','101953460082','root-key','SHA256:x','ssh-ed25519 AAAA root',1700000000000000);
CREATE TABLE proofs (
    resource TEXT PRIMARY KEY,
    seen_at  INTEGER NOT NULL
) STRICT;
INSERT INTO "proofs" VALUES('i-8a06815932354e976',1700000071000000);
INSERT INTO "proofs" VALUES('i-a81822beed0f0e2c0',1700000074000000);
INSERT INTO "proofs" VALUES('i-ecdecce3a6576ace1',1700000077000000);
INSERT INTO "proofs" VALUES('i-6840874e3bd8da5d4',1700000071000000);
CREATE TABLE reservations (
    reservation_id TEXT PRIMARY KEY,
    account_id     TEXT NOT NULL REFERENCES accounts,
    created_at     INTEGER NOT NULL
) STRICT;
INSERT INTO "reservations" VALUES('r-c725e8b7950aca060','535459550305',1700000001000000);
INSERT INTO "reservations" VALUES('r-d64ac08cf8f3e9f70','100006451042',1700000001000000);
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
INSERT INTO "subnets" VALUES('subnet-ed8f01dbe4140b1dc','vpc-c15c0289ec2d0a91c','535459550305','home-1a','172.31.0.0',20,1);
INSERT INTO "subnets" VALUES('subnet-646070befe52afaec','vpc-d70d3259e4e1cb633','100006451042','home-1a','172.31.0.0',20,1);
INSERT INTO "subnets" VALUES('subnet-0550f5ab07935b870','vpc-ff8aadf8b737cac43','101953460082','home-1a','172.31.0.0',20,1);
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
INSERT INTO "usage_events" VALUES(1,'535459550305','i-8a06815932354e976','instance-seconds',1,0,'open',1700000004000000,'home1.small',1,1);
INSERT INTO "usage_events" VALUES(2,'535459550305','vol-eaea9f87779659d70','volume-gib-seconds',1,0,'open',1700000004000000,'gp3',1,1);
INSERT INTO "usage_events" VALUES(3,'535459550305','i-a81822beed0f0e2c0','instance-seconds',1,0,'open',1700000004000000,'home1.small',1,0);
INSERT INTO "usage_events" VALUES(4,'535459550305','vol-07a98d7c0556abc7b','volume-gib-seconds',1,0,'open',1700000004000000,'gp3',1,1);
INSERT INTO "usage_events" VALUES(5,'535459550305','i-ecdecce3a6576ace1','instance-seconds',1,0,'open',1700000004000000,'home1.small',1,0);
INSERT INTO "usage_events" VALUES(6,'535459550305','vol-88ef4feb90ec69ba5','volume-gib-seconds',1,0,'open',1700000004000000,'gp3',1,0);
INSERT INTO "usage_events" VALUES(7,'100006451042','i-6840874e3bd8da5d4','instance-seconds',1,0,'open',1700000004000000,'home1.small',1,1);
INSERT INTO "usage_events" VALUES(8,'100006451042','vol-1c339f34b251136e4','volume-gib-seconds',1,0,'open',1700000004000000,'gp3',1,1);
INSERT INTO "usage_events" VALUES(9,'535459550305','i-a81822beed0f0e2c0','instance-seconds',1,1,'close',1700000074000000,'home1.small',1,0);
INSERT INTO "usage_events" VALUES(10,'535459550305','vol-88ef4feb90ec69ba5','volume-gib-seconds',1,1,'close',1700000077000000,'gp3',1,0);
INSERT INTO "usage_events" VALUES(11,'535459550305','i-ecdecce3a6576ace1','instance-seconds',1,1,'close',1700000077000000,'home1.small',1,0);
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
INSERT INTO "volumes" VALUES('vol-eaea9f87779659d70','535459550305','home-1a','h-01010101010101010','i-8a06815932354e976','in-use','gp3',1,1,1700000001000000);
INSERT INTO "volumes" VALUES('vol-07a98d7c0556abc7b','535459550305','home-1a','h-01010101010101010','i-a81822beed0f0e2c0','in-use','gp3',1,1,1700000001000000);
INSERT INTO "volumes" VALUES('vol-88ef4feb90ec69ba5','535459550305','home-1a','h-01010101010101010','i-ecdecce3a6576ace1','deleted','gp3',1,1,1700000001000000);
INSERT INTO "volumes" VALUES('vol-1c339f34b251136e4','100006451042','home-1a','h-01010101010101010','i-6840874e3bd8da5d4','in-use','gp3',1,1,1700000001000000);
CREATE TABLE vpcs (
    vpc_id     TEXT PRIMARY KEY,
    account_id TEXT NOT NULL REFERENCES accounts,
    region     TEXT NOT NULL,
    cidr       TEXT NOT NULL,
    is_default INTEGER NOT NULL CHECK (is_default IN (0, 1))
) STRICT;
INSERT INTO "vpcs" VALUES('vpc-c15c0289ec2d0a91c','535459550305','home-1','172.31.0.0/16',1);
INSERT INTO "vpcs" VALUES('vpc-d70d3259e4e1cb633','100006451042','home-1','172.31.0.0/16',1);
INSERT INTO "vpcs" VALUES('vpc-ff8aadf8b737cac43','101953460082','home-1','172.31.0.0/16',1);
CREATE UNIQUE INDEX image_names ON images (account_id, name) WHERE deregistered_at IS NULL;
CREATE UNIQUE INDEX one_default_vpc ON vpcs (account_id, region) WHERE is_default = 1;
CREATE UNIQUE INDEX one_default_subnet ON subnets (vpc_id, zone) WHERE default_for_zone = 1;
CREATE INDEX instances_by_account ON instances (account_id, launched_at);
CREATE INDEX instances_by_host ON instances (host_id) WHERE terminated_at IS NULL;
CREATE INDEX instances_due ON instances (not_before) WHERE terminated_at IS NULL;
CREATE INDEX claims_by_host ON claims (host_id);
CREATE UNIQUE INDEX private_addresses ON interfaces (subnet_id, private_ip) WHERE released_at IS NULL;
CREATE UNIQUE INDEX public_addresses ON interfaces (public_ip) WHERE released_at IS NULL;
CREATE INDEX volumes_by_account ON volumes (account_id, created_at);
CREATE UNIQUE INDEX one_open_interval ON usage_events (resource, meter) WHERE is_open = 1;
CREATE INDEX usage_by_account ON usage_events (account_id);
COMMIT;
