//! `backup` and `restore`: a controller's whole state in one file.
//!
//! ```text
//! FILE (0600, tar): backup.json      format, program, schema, moment
//!                   roost.db         a copy of one moment; a controller may run meanwhile
//!                   blobs/SHA256 …   uploaded files that were there when they were read
//!                   ca.pem …         every file of the state directory
//!                   SHA256SUMS       of all before it, for `sha256sum -c`; last, so that a file cut short shows
//! ```
//! `restore` accepts only an intact file and an empty directory, and writes `controller.json` last.
//! It raises [`Store::epoch`]. Nothing reads the epoch yet: a host that is ahead of a row is known
//! by its incarnation.

use crate::config::{BLOBS, DATABASE, FILES, StartError, StateDir, file_error};
use crate::engine::{Clock, SystemClock};
use roost_store::{SqliteStore, Store};
use roost_types::{BlobId, Micros};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

/// The format of the file.
const FORMAT: u32 = 1;
const ABOUT: &str = "backup.json";
const SUMS: &str = "SHA256SUMS";
/// Where `restore` assembles the files, in the state directory.
const STAGE: &str = ".restore";
/// Most bytes of a file of the backup that is read into memory.
const MOST_TEXT: u64 = 64 << 20;

/// Metadata of a backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    /// The format, 1.
    pub format: u32,
    /// Version of the program that wrote it.
    pub program: String,
    /// Schema of the database in it.
    pub schema: i64,
    /// When the backup began, in microseconds since 1970 UTC. Every earlier commit is in it.
    pub made_at: Micros,
}

/// Result of a backup or a restore.
#[derive(Debug, Clone)]
pub struct Summary {
    /// Metadata of the backup.
    pub about: About,
    /// Size of the database in bytes.
    pub database_bytes: u64,
    /// Uploaded files.
    pub blobs: usize,
    /// Size of all files in bytes.
    pub bytes: u64,
    /// How long it took.
    pub took: Duration,
}

/// A file or folder that is removed on drop unless it is kept.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        // A renamed path no longer exists under this name.
        if self.0.is_dir() {
            let _ = std::fs::remove_dir_all(&self.0);
        } else {
            let _ = std::fs::remove_file(&self.0);
        }
    }
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// Creates a file that only its owner may read. A leftover of an earlier attempt is replaced.
fn fresh(path: &Path) -> Result<File, StartError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(file_error(path)(error)),
        _ => {}
    }
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(file_error(path))
}

fn sync_folder(of: &Path) -> Result<(), StartError> {
    let folder = of.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(file_error(folder))
}

/// Hashes and counts the bytes that are read through it.
struct Hashing<R> {
    inner: R,
    hash: Sha256,
    bytes: u64,
}

impl<R: Read> Hashing<R> {
    fn new(inner: R) -> Self {
        Self { inner, hash: Sha256::new(), bytes: 0 }
    }

    fn sum(self) -> String {
        hex::encode(self.hash.finalize())
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        let read = buffer.get(..count).unwrap_or_default();
        self.hash.update(read);
        self.bytes += count as u64;
        Ok(count)
    }
}

/// The archive being written, and the checksums of its members.
struct Archive {
    path: PathBuf,
    tar: tar::Builder<BufWriter<File>>,
    sums: BTreeMap<String, String>,
    bytes: u64,
    made_at: Micros,
}

impl Archive {
    fn add(&mut self, name: &str, size: u64, from: impl Read) -> Result<(), StartError> {
        let mut header = tar::Header::new_gnu();
        header.set_size(size);
        header.set_mode(0o600);
        header.set_mtime(u64::try_from(self.made_at.floor_secs()).unwrap_or(0));
        let mut reader = Hashing::new(from.take(size));
        self.tar.append_data(&mut header, name, &mut reader).map_err(file_error(&self.path))?;
        if reader.bytes != size {
            let detail = format!("it became shorter while it was read: {} of {size} bytes", reader.bytes);
            return Err(StartError::Unusable { path: PathBuf::from(name), detail });
        }
        self.bytes += size;
        self.sums.insert(name.to_owned(), reader.sum());
        Ok(())
    }

    fn add_file(&mut self, name: &str, path: &Path) -> Result<u64, StartError> {
        let file = File::open(path).map_err(file_error(path))?;
        let size = file.metadata().map_err(file_error(path))?.len();
        self.add(name, size, file)?;
        Ok(size)
    }
}

/// Writes the whole state of the controller on `state` to a new file. The controller may run
/// meanwhile, and is not delayed.
///
/// # Errors
/// [`StartError`]: the file exists, the directory is incomplete, the database is damaged, or the
/// disk is full.
pub fn backup(state: &StateDir, to: &Path) -> Result<Summary, StartError> {
    let began = Instant::now();
    let made_at = SystemClock::new().now();
    state.made()?;
    if to.exists() {
        let text = format!("{} exists already: a backup never replaces a file, name a new one", to.display());
        return Err(StartError::Value(text));
    }
    let copy = Scratch(beside(to, ".partial-db"));
    // SQLite takes the mode of the empty file.
    fresh(&copy.0)?;
    let schema = SqliteStore::copy(&state.database(), &copy.0, || ())?;
    SqliteStore::verify(&copy.0)?;
    let partial = Scratch(beside(to, ".partial"));
    let file = BufWriter::with_capacity(1 << 20, fresh(&partial.0)?);
    let mut archive = Archive {
        path: partial.0.clone(),
        tar: tar::Builder::new(file),
        sums: BTreeMap::new(),
        bytes: 0,
        made_at,
    };
    let about = About { format: FORMAT, program: env!("CARGO_PKG_VERSION").to_owned(), schema, made_at };
    let text = serde_json::to_vec(&about).map_err(|error| StartError::Other(error.to_string()))?;
    archive.add(ABOUT, text.len() as u64, text.as_slice())?;
    let database_bytes = archive.add_file(DATABASE, &copy.0)?;
    // Blobs follow the database: a file exists before a row names it.
    let mut blobs = 0;
    for name in blob_names(&state.path(BLOBS))? {
        let path = state.path(BLOBS).join(&name);
        let file = match File::open(&path) {
            // No image needs this blob any more.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            file => file.map_err(file_error(&path))?,
        };
        let size = file.metadata().map_err(file_error(&path))?.len();
        archive.add(&format!("{BLOBS}/{name}"), size, file)?;
        blobs += 1;
    }
    for (name, _) in FILES {
        if state.path(name).exists() {
            archive.add_file(name, &state.path(name))?;
        }
    }
    let sums: String = archive.sums.iter().map(|(name, sum)| format!("{sum}  {name}\n")).collect();
    archive.add(SUMS, sums.len() as u64, sums.as_bytes())?;
    let bytes = archive.bytes;
    let say = file_error(&partial.0);
    let file =
        archive.tar.into_inner().and_then(|file| file.into_inner().map_err(io::IntoInnerError::into_error));
    file.and_then(|file| file.sync_all()).map_err(&say)?;
    // Fails if the file was created meanwhile. A file system without hard links has only the check
    // above.
    match std::fs::hard_link(&partial.0, to) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Err(file_error(to)(error)),
        Err(_) => std::fs::rename(&partial.0, to).map_err(file_error(to))?,
    }
    sync_folder(to)?;
    Ok(Summary { about, database_bytes, blobs, bytes, took: began.elapsed() })
}

/// Names of complete uploaded files.
fn blob_names(folder: &Path) -> Result<Vec<String>, StartError> {
    let entries = match std::fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(file_error(folder))?,
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry.map_err(file_error(folder))?.file_name();
        if let Some(name) = name.to_str().filter(|name| name.parse::<BlobId>().is_ok()) {
            names.push(name.to_owned());
        }
    }
    names.sort();
    Ok(names)
}

/// Restores a backup into an empty state directory. The files belong to the directory's owner.
///
/// # Errors
/// [`StartError`]: the directory is not empty, the file is no backup or is damaged, or the disk is
/// full. The directory is as empty then as before.
pub fn restore(state: &StateDir, from: &Path) -> Result<Summary, StartError> {
    let began = Instant::now();
    let unusable = |detail: String| StartError::Unusable { path: from.to_owned(), detail };
    let file = File::open(from).map_err(file_error(from))?;
    state.create()?;
    let _held = state.lock()?;
    is_empty(state)?;
    let stage = Scratch(state.path(STAGE));
    if stage.0.exists() {
        std::fs::remove_dir_all(&stage.0).map_err(file_error(&stage.0))?;
    }
    let blobs = stage.0.join(BLOBS);
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&blobs);
    made.map_err(file_error(&blobs))?;

    let (about, bytes) = unpack(from, file, &stage.0)?;
    let lacks: Vec<_> = FILES
        .map(|(name, _)| name)
        .into_iter()
        // `init` makes this file again.
        .filter(|name| *name != "admin.json")
        .chain([DATABASE])
        .filter(|name| !stage.0.join(name).exists())
        .collect();
    if !lacks.is_empty() {
        return Err(unusable(format!("{} is not in it: take an older backup", lacks.join(", "))));
    }
    let database = stage.0.join(DATABASE);
    let store = SqliteStore::open(&database)?;
    store.check()?;
    // An increment alone is not enough: the same backup may be restored twice.
    store.begin_epoch(SystemClock::new().now().floor_secs())?;
    drop(store);
    let database_bytes = std::fs::metadata(&database).map_err(file_error(&database))?.len();
    let count = blob_names(&blobs)?.len();
    settle(state, &stage.0)?;
    Ok(Summary { about, database_bytes, blobs: count, bytes, took: began.elapsed() })
}

fn is_empty(state: &StateDir) -> Result<(), StartError> {
    let dir = state.dir();
    let entries = std::fs::read_dir(dir).map_err(file_error(dir))?;
    for entry in entries {
        let name = entry.map_err(file_error(dir))?.file_name();
        if name != "lock" && name != STAGE {
            let (dir, name) = (dir.display(), name.display());
            return Err(StartError::Value(format!(
                "{dir} is not empty ({name} is there), and a restore replaces nothing: move {dir} away first"
            )));
        }
    }
    Ok(())
}

/// Unpacks a backup into a folder and verifies every byte.
fn unpack(from: &Path, file: File, into: &Path) -> Result<(About, u64), StartError> {
    let unusable = |detail: String| StartError::Unusable { path: from.to_owned(), detail };
    let damaged = |what: &str| unusable(format!("the backup is damaged ({what}): take another one"));
    let mut archive = tar::Archive::new(BufReader::with_capacity(1 << 20, file));
    let broken = |error: io::Error| match error.kind() {
        // A file that is no archive fails at its first header.
        io::ErrorKind::UnexpectedEof => damaged("it is cut short"),
        _ => damaged(&error.to_string()),
    };
    let (mut about, mut sums) = (None, None);
    let (mut found, mut bytes) = (BTreeMap::new(), 0);
    for entry in archive.entries().map_err(broken)? {
        let mut entry = entry.map_err(broken)?;
        let name = plain_name(&entry.path().map_err(broken)?)
            .filter(|_| entry.header().entry_type().is_file())
            .ok_or_else(|| unusable("it holds what no backup of a controller holds".to_owned()))?;
        if sums.is_some() || found.contains_key(&name) {
            return Err(damaged("it goes on after its end"));
        }
        let size = entry.header().size().map_err(broken)?;
        let mut reader = Hashing::new(&mut entry);
        if name == ABOUT || name == SUMS {
            let mut text = String::new();
            (&mut reader).take(MOST_TEXT).read_to_string(&mut text).map_err(broken)?;
            if name == SUMS {
                sums = Some(text);
                continue;
            }
            let read: About = serde_json::from_str(&text).map_err(|error| damaged(&error.to_string()))?;
            if read.format != FORMAT {
                let (format, program) = (read.format, &read.program);
                return Err(unusable(format!(
                    "it has format {format} (of roost-controller {program}), this program reads format {FORMAT}"
                )));
            }
            about = Some(read);
        } else {
            let secret = FILES.iter().any(|(file, secret)| *file == name && *secret) || name == DATABASE;
            let path = into.join(&name);
            let mode = if secret { 0o600 } else { 0o644 };
            let mut file = OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(mode)
                .open(&path)
                .map_err(file_error(&path))?;
            copy(&mut reader, &mut file, &path, &broken)?;
            file.flush().and_then(|()| file.sync_all()).map_err(file_error(&path))?;
        }
        if reader.bytes != size {
            return Err(damaged("it is cut short"));
        }
        bytes += size;
        found.insert(name, reader.sum());
    }
    let Some(sums) = sums else { return Err(damaged("it is cut short")) };
    let expected: BTreeMap<String, String> = sums
        .lines()
        .filter_map(|line| line.split_once("  ").map(|(sum, name)| (name.to_owned(), sum.to_owned())))
        .collect();
    if let Some((name, _)) = expected.iter().find(|(name, sum)| found.get(*name) != Some(*sum)) {
        return Err(damaged(&format!("{name} is not what was written")));
    }
    if let Some(name) = found.keys().find(|name| !expected.contains_key(*name)) {
        return Err(damaged(&format!("{name} is not in its list")));
    }
    about.map(|about| (about, bytes)).ok_or_else(|| damaged(&format!("{ABOUT} is missing")))
}

/// Returns the name if a backup may hold a file of that name.
fn plain_name(path: &Path) -> Option<String> {
    let parts: Vec<_> = path
        .components()
        .map(|part| match part {
            Component::Normal(part) => part.to_str(),
            _ => None,
        })
        .collect::<Option<_>>()?;
    let known = match parts.as_slice() {
        [BLOBS, blob] => blob.parse::<BlobId>().is_ok(),
        [name] => [ABOUT, SUMS, DATABASE].contains(name) || FILES.iter().any(|(file, _)| file == name),
        _ => false,
    };
    known.then(|| parts.join("/"))
}

fn copy(
    from: &mut impl Read,
    to: &mut File,
    path: &Path,
    broken: &impl Fn(io::Error) -> StartError,
) -> Result<(), StartError> {
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = from.read(&mut buffer).map_err(broken)?;
        if count == 0 {
            return Ok(());
        }
        to.write_all(buffer.get(..count).unwrap_or_default()).map_err(file_error(path))?;
    }
}

/// Moves every file from the stage to its place and gives it to the directory's owner; the settings
/// last.
fn settle(state: &StateDir, stage: &Path) -> Result<(), StartError> {
    let dir = state.dir();
    let owner = std::fs::metadata(dir).map_err(file_error(dir))?;
    let mut paths = vec![state.path("lock")];
    for name in blob_names(&stage.join(BLOBS))? {
        paths.push(stage.join(BLOBS).join(name));
    }
    let files = FILES.map(|(name, _)| name);
    let names = [BLOBS, DATABASE].into_iter().chain(files).filter(|name| stage.join(name).exists());
    let names: Vec<_> = names.collect();
    paths.extend(names.iter().map(|name| stage.join(name)));
    for path in &paths {
        let of = std::fs::metadata(path).map_err(file_error(path))?;
        if (of.uid(), of.gid()) != (owner.uid(), owner.gid()) {
            let given = std::os::unix::fs::chown(path, Some(owner.uid()), Some(owner.gid()));
            given.map_err(file_error(path))?;
        }
    }
    for name in &names {
        let path = state.path(name);
        std::fs::rename(stage.join(name), &path).map_err(file_error(&path))?;
    }
    for folder in [state.path(BLOBS), dir.to_owned()] {
        File::open(&folder).and_then(|open| open.sync_all()).map_err(file_error(&folder))?;
    }
    Ok(())
}
