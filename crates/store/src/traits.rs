//! The trait.

use crate::error::StoreError;
use crate::rows::{
    AccessKeyRow, BlobRow, Change, Claim, HostRow, ImageRow, InstanceFilter, InstanceRecord, KeyPairRow,
    Launch, Launched, NewAccountRows, Released, SubnetRow, UsageFilter, VolumeRow,
};
use roost_types::agent::HostFacts;
use roost_types::api::Account;
use roost_types::metering::{Proofs, UsageEvent};
use roost_types::{AccountId, BlobId, HostId, ImageId, InstanceId, Micros, SubnetId, VpcId};

/// The controller's memory. Every method is one transaction: after an error nothing was written, after a success
/// everything is durable. Calls block; call them from a thread that may.
pub trait Store: Send + Sync {
    // Accounts and keys -------------------------------------------------------------------------------------

    /// Makes an account, its first access key, its default VPC and subnets.
    ///
    /// # Errors
    /// `Duplicate` if the id, the name or the key exists.
    fn create_account(&self, new: &NewAccountRows) -> Result<(), StoreError>;
    /// Every account, by name.
    fn accounts(&self) -> Result<Vec<Account>, StoreError>;
    /// One account.
    fn account(&self, id: &AccountId) -> Result<Option<Account>, StoreError>;
    /// An access key with its account.
    fn access_key(&self, access_key_id: &str) -> Result<Option<(AccessKeyRow, Account)>, StoreError>;
    /// Adds another access key.
    ///
    /// # Errors
    /// `Duplicate` if it exists, `Missing` if the account does not.
    fn add_access_key(&self, key: &AccessKeyRow) -> Result<(), StoreError>;
    /// The default subnet of an account in a zone; made with these ids if there is none.
    fn default_subnet(
        &self,
        account: &AccountId,
        region: &str,
        zone: &str,
        fresh: (&VpcId, &SubnetId),
    ) -> Result<SubnetRow, StoreError>;

    // Key pairs ---------------------------------------------------------------------------------------------

    /// Keeps a key pair.
    ///
    /// # Errors
    /// `Duplicate` if the account has one of that name.
    fn create_key_pair(&self, row: &KeyPairRow) -> Result<(), StoreError>;
    /// Every key pair of an account, by name.
    fn key_pairs(&self, account: &AccountId) -> Result<Vec<KeyPairRow>, StoreError>;
    /// One key pair.
    fn key_pair(&self, account: &AccountId, name: &str) -> Result<Option<KeyPairRow>, StoreError>;
    /// Forgets a key pair; whether there was one.
    fn delete_key_pair(&self, account: &AccountId, name: &str) -> Result<bool, StoreError>;

    // Images and blobs --------------------------------------------------------------------------------------

    /// Records an uploaded file for the account; several accounts may have the same file.
    fn put_blob(&self, row: &BlobRow) -> Result<(), StoreError>;
    /// Returns an uploaded file of any account; the row names its first uploader.
    fn blob(&self, id: &BlobId) -> Result<Option<BlobRow>, StoreError>;
    /// Returns true if the account itself uploaded the file.
    fn owns_blob(&self, account: &AccountId, id: &BlobId) -> Result<bool, StoreError>;
    /// The sum of the sizes of an account's files.
    fn blob_bytes(&self, account: &AccountId) -> Result<u64, StoreError>;
    /// Gives up an account's file, unless an image of the account needs it. `blob` no longer finds
    /// a file that no account has.
    fn release_blob(&self, account: &AccountId, id: &BlobId, at: Micros) -> Result<Released, StoreError>;
    /// Gives up every account's unneeded files from before a moment. Returns how many files no
    /// account has any more.
    fn release_unnamed_blobs(&self, before: Micros, at: Micros) -> Result<u64, StoreError>;
    /// Registers an image.
    ///
    /// # Errors
    /// `Duplicate` if the account has a registered one of that name; `Missing` if a blob is not the
    /// account's.
    fn register_image(&self, row: &ImageRow) -> Result<(), StoreError>;
    /// Registered images that an account may launch (its own and public ones), by name.
    fn images(&self, account: &AccountId) -> Result<Vec<ImageRow>, StoreError>;
    /// A registered image that an account may launch, by id or by name; its own one before a public one.
    fn find_image(&self, account: &AccountId, id_or_name: &str) -> Result<Option<ImageRow>, StoreError>;
    /// An image by id, whoever owns it, withdrawn or not.
    fn image(&self, id: &ImageId) -> Result<Option<ImageRow>, StoreError>;
    /// Withdraws an image; whether it was registered.
    fn deregister_image(&self, id: &ImageId, at: Micros) -> Result<bool, StoreError>;

    // Hosts -------------------------------------------------------------------------------------------------

    /// Notes a host or what has changed about it; keeps its first registration and its claims.
    fn put_host(&self, facts: &HostFacts, at: Micros) -> Result<(), StoreError>;
    /// Notes a report: its time (which never goes back), its boot, and how long instances were seen running.
    ///
    /// # Errors
    /// `Missing` if the host is unknown.
    fn host_reported(
        &self,
        host: &HostId,
        boot_id: &str,
        at: Micros,
        proofs: &[(InstanceId, Micros)],
    ) -> Result<(), StoreError>;
    /// Every host, by name, with the sums of its claims.
    fn hosts(&self) -> Result<Vec<HostRow>, StoreError>;
    /// One host.
    fn host(&self, id: &HostId) -> Result<Option<HostRow>, StoreError>;

    // Instances ---------------------------------------------------------------------------------------------

    /// Accepts a launch: reservation, client token, instances, claims, interfaces with their addresses, volumes.
    ///
    /// # Errors
    /// `NoRoom` if a claim does not fit, `NoAddress` if a pool is empty, `Missing` if a host or subnet is.
    fn launch(&self, launch: &Launch) -> Result<Launched, StoreError>;
    /// What a client token was used for: parameter hash and reservation.
    fn client_token(
        &self,
        account: &AccountId,
        token: &str,
    ) -> Result<Option<(String, roost_types::ReservationId)>, StoreError>;
    /// One instance, whoever owns it.
    fn instance(&self, id: &InstanceId) -> Result<Option<InstanceRecord>, StoreError>;
    /// Instances, oldest first, then by launch index.
    fn instances(&self, filter: &InstanceFilter) -> Result<Vec<InstanceRecord>, StoreError>;
    /// As `instances`, without rows that cannot be read; those are returned by id and fault.
    #[expect(clippy::type_complexity, reason = "a list, and what is missing from it")]
    fn readable_instances(
        &self,
        filter: &InstanceFilter,
    ) -> Result<(Vec<InstanceRecord>, Vec<(InstanceId, StoreError)>), StoreError>;

    /// Writes changes of instances, all or none.
    ///
    /// # Errors
    /// `Stale` if a row was written since it was read, `NoRoom` if a claim does not fit, `Usage` if an event
    /// contradicts the log.
    fn commit(&self, changes: &[Change], now: Micros) -> Result<(), StoreError>;
    /// Takes the lease of an instance until a time, if nobody holds it at `now`.
    fn lease(
        &self,
        id: &InstanceId,
        owner: &str,
        now: Micros,
        until: Micros,
    ) -> Result<Option<InstanceRecord>, StoreError>;
    /// Instances that have something to do at `now` and that nobody has leased, longest due first.
    fn due(&self, now: Micros, limit: u32) -> Result<Vec<InstanceId>, StoreError>;
    /// When the next instance will have something to do.
    fn next_due(&self) -> Result<Option<Micros>, StoreError>;
    /// What an instance holds of its host.
    fn claim(&self, id: &InstanceId) -> Result<Option<Claim>, StoreError>;
    /// Volumes of an account that are not deleted, oldest first.
    fn volumes(&self, account: &AccountId) -> Result<Vec<VolumeRow>, StoreError>;

    // Usage -------------------------------------------------------------------------------------------------

    /// The usage log, in the order it was written.
    fn usage_events(&self, filter: &UsageFilter) -> Result<Vec<UsageEvent>, StoreError>;
    /// Until when each instance was last durably seen running.
    fn proofs(&self) -> Result<Proofs, StoreError>;

    // Care --------------------------------------------------------------------------------------------------

    /// End of the newest sealed month.
    fn sealed(&self) -> Result<Micros, StoreError>;

    /// Makes bills up to `until` final. The value never decreases.
    fn seal(&self, until: Micros) -> Result<(), StoreError>;

    /// Newest time of any commit: a clock behind it is wrong.
    fn clock_high(&self) -> Result<Micros, StoreError>;

    /// Reads everything and checks that nothing contradicts itself.
    ///
    /// # Errors
    /// `Corrupt` with what was found.
    fn check(&self) -> Result<(), StoreError>;
    /// Epoch of the store: 1 at first, larger after each restore from a backup. Agents may be ahead
    /// of the rows in what they learnt in another epoch.
    fn epoch(&self) -> Result<i64, StoreError>;

    /// Begins a new epoch, at least this one, and returns it.
    fn begin_epoch(&self, at_least: i64) -> Result<i64, StoreError>;

    /// Writes a consistent copy of the store to a new or empty file. Writers continue meanwhile.
    ///
    /// # Errors
    /// `Unusable` if the file is not empty or cannot be written.
    fn backup(&self, to: &std::path::Path) -> Result<(), StoreError>;
}
