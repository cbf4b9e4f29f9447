//! The host's side, in memory, which asserts what devices promise it.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::net::Shutdown;
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;
use std::rc::Rc;
use std::sync::Mutex;

use roost_vmm::devices::virtio::block::backend::Backend;
use roost_vmm::devices::virtio::net::queue::{HEADER, MAX_PACKET, Tap};
use roost_vmm::devices::virtio::queue::{copy_out, length};
use roost_vmm::devices::virtio::vsock::switch::{Host, Socket};
use roost_vmm::memory::Slice;

/// A disk that a request must never leave.
pub struct Disk(Mutex<Vec<u8>>);

impl Disk {
    pub fn new(sectors: u8) -> Self {
        Self(Mutex::new(vec![7; 512 * usize::from(sectors)]))
    }

    /// Each piece of a request, with its part of the disk.
    fn each(&self, offset: u64, list: &[Slice<'_>], mut act: impl FnMut(&Slice<'_>, &mut [u8])) {
        let mut disk = self.0.lock().unwrap();
        let mut at = usize::try_from(offset).unwrap();
        for slice in list {
            act(slice, &mut disk[at..at + slice.len()]);
            at += slice.len();
        }
    }

    fn clear(&mut self, offset: u64, length: u64) -> io::Result<()> {
        let (at, length) = (usize::try_from(offset).unwrap(), usize::try_from(length).unwrap());
        self.0.lock().unwrap()[at..at + length].fill(0);
        Ok(())
    }
}

impl Backend for Disk {
    fn size(&self) -> u64 {
        self.0.lock().unwrap().len() as u64
    }

    fn read(&self, offset: u64, target: &[Slice<'_>]) -> io::Result<()> {
        self.each(offset, target, |slice, disk| slice.copy_from(disk));
        Ok(())
    }

    fn write(&self, offset: u64, source: &[Slice<'_>]) -> io::Result<()> {
        self.each(offset, source, |slice, disk| assert_eq!(slice.copy_to(disk), disk.len()));
        Ok(())
    }

    fn discard(&mut self, offset: u64, length: u64) -> io::Result<()> {
        self.clear(offset, length)
    }

    fn write_zeroes(&mut self, offset: u64, length: u64, _: bool) -> io::Result<()> {
        self.clear(offset, length)
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

/// A tap with these packets in it.
pub struct Packets(pub VecDeque<(u16, u8)>);

impl Tap for Packets {
    fn receive(&mut self, packet: &mut [u8]) -> io::Result<Option<usize>> {
        let Some((length, byte)) = self.0.pop_front() else { return Ok(None) };
        let length = usize::from(length).min(packet.len());
        packet[..length].fill(byte);
        Ok(Some(length))
    }

    fn send(&mut self, packet: &[Slice<'_>]) -> io::Result<()> {
        let mut bytes = vec![0; usize::try_from(length(packet)).unwrap()];
        let count = copy_out(packet, &mut bytes);
        assert!(count > HEADER && count <= MAX_PACKET && count == bytes.len());
        if bytes[HEADER] == 0xff { Err(ErrorKind::WouldBlock.into()) } else { Ok(()) }
    }
}

/// A host program's end of a vsock connection.
#[derive(Default)]
pub struct Program {
    pub says: VecDeque<u8>,
    pub silent: bool,
    pub room: usize,
    pub gone: bool,
}

#[derive(Clone, Default)]
pub struct Pipe(pub Rc<RefCell<Program>>);

impl Socket for Pipe {
    fn read(&mut self, target: &mut [u8]) -> io::Result<usize> {
        let mut program = self.0.borrow_mut();
        if program.says.is_empty() && !program.silent && !program.gone {
            return Err(ErrorKind::WouldBlock.into());
        }
        let count = target.len().min(program.says.len());
        for (target, byte) in target.iter_mut().zip(program.says.drain(..count)) {
            *target = byte;
        }
        Ok(count)
    }

    fn write(&mut self, source: &[u8]) -> io::Result<usize> {
        let mut program = self.0.borrow_mut();
        if program.gone {
            return Err(ErrorKind::BrokenPipe.into());
        }
        let count = source.len().min(program.room);
        program.room -= count;
        if count == 0 { Err(ErrorKind::WouldBlock.into()) } else { Ok(count) }
    }

    fn shut(&mut self, _: Shutdown) {}
}

/// Programs that listen on even ports.
#[derive(Default)]
pub struct Programs(pub Vec<(u64, Pipe)>);

impl Host for Programs {
    type Socket = Pipe;

    fn connect(&mut self, port: u32, token: u64) -> io::Result<Pipe> {
        if port % 2 == 1 {
            return Err(ErrorKind::ConnectionRefused.into());
        }
        let pipe = Pipe::default();
        pipe.0.borrow_mut().room = 100;
        self.0.push((token, pipe.clone()));
        Ok(pipe)
    }
}

/// A file in memory with this content.
pub fn file(content: &[u8]) -> File {
    // SAFETY: the name is a string that ends with a NUL; the result is checked.
    let descriptor = unsafe { libc::memfd_create(c"fuzz".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(descriptor >= 0, "{}", io::Error::last_os_error());
    // SAFETY: memfd_create just made this descriptor, and nothing else owns it.
    let file = unsafe { File::from_raw_fd(descriptor) };
    file.write_all_at(content, 0).unwrap();
    file
}
