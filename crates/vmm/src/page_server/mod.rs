//! A program that brings the memory of clones page by page (`roost-vmm serve-memory`), in the way of Firecracker's page-fault
//! handlers, and remembers what the first of them touched: the next ones get these pages at once, before they ask.

mod faults;
mod served;
mod working_set;

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, MmapRegion};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::error::{Error, Result};
use crate::snapshot::lazy::Mapping;
use crate::snapshot::memory_file;
use crate::{log, stand_alone, threads};
use faults::Faults;
use served::Served;
pub use working_set::WorkingSet;

/// Most bytes of what a monitor says about its memory.
const MOST_WORDS: usize = 64 << 10;
/// How long a monitor may take for it.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long it is waited after a monitor that could not be served.
const BREATH: Duration = Duration::from_millis(100);

/// What is served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// The memory file of a full snapshot.
    pub memory: PathBuf,
    /// Where monitors connect: the `backend_path` of their `mem_backend`.
    pub socket: PathBuf,
    /// Where it is kept what a clone touches first.
    pub working_set: Option<PathBuf>,
    /// How long that is: seconds from a clone's start.
    pub seconds: u64,
}

/// What all clones share.
struct Shared {
    memory: MmapRegion,
    snapshot: [u8; 16],
    /// What a clone touches first, and where it is kept. `None`: nobody wants to know.
    kept: Option<(PathBuf, Mutex<Option<Arc<WorkingSet>>>)>,
    first: Duration,
}

/// Serves clones until SIGTERM or SIGINT; the socket goes then. Clones that still run end with it, as their memory does.
///
/// # Errors
/// [`Error::Path`], [`Error::Snapshot`] for a file that is no whole memory, [`Error::Io`].
pub fn serve(options: &Options) -> Result<()> {
    let signals = crate::api::block_signals().map_err(Error::io("signalfd"))?;
    let shared = Arc::new(Shared::open(options)?);
    let listener = stand_alone::bind(&options.socket, "socket")?;
    log::print(&format!("serving {} at {}\n", options.memory.display(), options.socket.display()))?;
    let served = accept(&listener, &shared, signals.as_raw_fd());
    // A socket that nobody listens at is no more than a riddle.
    std::fs::remove_file(&options.socket).map_err(Error::io("removing the socket"))?;
    served
}

fn accept(listener: &UnixListener, shared: &Arc<Shared>, signals: RawFd) -> Result<()> {
    for number in 1_u64.. {
        let [_, signal] = loop {
            match ready([listener.as_raw_fd(), signals], -1).map_err(Error::io("waiting for a monitor"))? {
                [false, false] => {}
                which => break which,
            }
        };
        if signal {
            return Ok(());
        }
        let shared = Arc::clone(shared);
        let accepted = listener.accept().map_err(Error::io("accepting a monitor")).and_then(|(stream, _)| {
            threads::spawn(format!("clone-{number}"), move || match shared.serve(&stream) {
                Ok(words) => log::info(&format!("clone {number}: {words}")),
                Err(error) => log::error(&format!("clone {number}: {}", error.chain())),
            })
        });
        // Those that are served already live by this process: it does not end for one more that it has no room for.
        if let Err(error) = accepted {
            log::error(&format!("clone {number}: {}", error.chain()));
            std::thread::sleep(BREATH);
        }
    }
    Ok(())
}

impl Shared {
    fn open(options: &Options) -> Result<Self> {
        let open = |path: &Path, what| {
            File::open(path).map_err(|source| Error::Path { what, path: path.to_owned(), source })
        };
        let file = open(&options.memory, "memory file")?;
        let (snapshot, bytes) = memory_file::whole(&file)?;
        let size = usize::try_from(bytes).map_err(|error| Error::Memory(error.to_string()))?;
        let memory = MmapRegionBuilder::new(size)
            .with_mmap_prot(libc::PROT_READ)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .with_file_offset(FileOffset::new(file, 0))
            .build()
            .map_err(|error| Error::Memory(format!("mapping the memory file: {error}")))?;
        let kept = options.working_set.as_ref().map(|path| {
            let known = WorkingSet::read(path, snapshot, bytes)?;
            let words = known.as_ref().map_or_else(
                || "will be made of the first clone".to_owned(),
                |known| format!("{} pages", known.pages()),
            );
            log::print(&format!("working set {}: {words}\n", path.display()))?;
            Ok((path.clone(), Mutex::new(known.map(Arc::new))))
        });
        let kept = kept.transpose()?;
        Ok(Self { memory, snapshot, kept, first: Duration::from_secs(options.seconds) })
    }

    /// Serves one clone to its end; says what it took.
    fn serve(&self, stream: &UnixStream) -> Result<String> {
        let (mappings, faults) = self.meet(stream)?;
        let known = self.known();
        let source = self.memory.as_ptr() as u64;
        let learns = self.kept.is_some() && known.is_none();
        let mut served = Served::new(mappings, source, known.as_deref(), learns.then_some(self.first));
        while served.goes_on(&faults, stream.as_raw_fd())? {
            if let Some(set) = served.learned(false) {
                self.keep(set);
            }
        }
        if let Some(set) = served.learned(true) {
            self.keep(set);
        }
        Ok(served.to_string())
    }

    /// What is mapped where, and the descriptor of its faults.
    fn meet(&self, stream: &UnixStream) -> Result<(Vec<Mapping>, Faults)> {
        let failed = || Error::io("meeting a monitor");
        stream.set_read_timeout(Some(PATIENCE)).map_err(failed())?;
        let mut words = vec![0; MOST_WORDS];
        let met = stream.recv_with_fd(&mut words).map_err(|error| failed()(error.into()))?;
        let (count, Some(descriptor)) = met else {
            return Err(Error::Snapshot("the monitor sent no userfaultfd descriptor".into()));
        };
        let mappings = mappings(&words[..count], self.memory.size() as u64).map_err(Error::Snapshot)?;
        Ok((mappings, Faults::new(descriptor)))
    }

    fn known(&self) -> Option<Arc<WorkingSet>> {
        let (_, known) = self.kept.as_ref()?;
        known.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The first clone that has something to tell is believed.
    fn keep(&self, set: WorkingSet) {
        let Some((path, known)) = &self.kept else { return };
        let mut known = known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.is_some() || set.pages() == 0 {
            return;
        }
        match set.write(path, self.snapshot) {
            Ok(()) => log::info(&format!("working set {}: {} pages", path.display(), set.pages())),
            // Later clones have it all the same.
            Err(error) => log::error(&format!("working set {}: {error}", path.display())),
        }
        *known = Some(Arc::new(set));
    }
}

/// What a monitor says about its memory, if that can be served from a file with so many bytes.
///
/// # Errors
/// Why it cannot.
pub fn mappings(words: &[u8], bytes: u64) -> std::result::Result<Vec<Mapping>, String> {
    let mappings: Vec<Mapping> = serde_json::from_slice(words)
        .map_err(|error| format!("what the monitor says of its memory: {error}"))?;
    served::check(&mappings, bytes)?;
    Ok(mappings)
}

/// Waits until one of two descriptors has something, or so many milliseconds are over (-1: never); says which of them has.
fn ready(descriptors: [RawFd; 2], milliseconds: libc::c_int) -> io::Result<[bool; 2]> {
    let mut polled =
        descriptors.map(|fd| libc::pollfd { fd, events: libc::POLLIN | libc::POLLRDHUP, revents: 0 });
    // SAFETY: two pollfds, as is said.
    let result = unsafe { libc::poll(polled.as_mut_ptr(), 2, milliseconds) };
    let error = io::Error::last_os_error();
    if result < 0 && error.kind() != ErrorKind::Interrupted {
        return Err(error);
    }
    Ok(polled.map(|polled| result > 0 && polled.revents != 0))
}
