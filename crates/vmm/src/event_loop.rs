//! The device thread: waits for the guest's bells, for the host's packets and for console input, and lets the device
//! concerned take a turn. And the way in which threads tell the main thread that something happened.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use crate::devices::serial::SerialPort;
use crate::devices::virtio::mmio::{Shared, lock};
use crate::error::{Error, Result};
use crate::vcpu::Stop;
use crate::{seccomp, threads};

/// Tells the main thread that a vCPU stopped by itself.
#[derive(Debug)]
pub struct Notifier {
    sender: Sender<Stop>,
    bell: EventFd,
    /// Becomes true at the vCPU's first exit, if anybody waits for that.
    first: Option<Arc<AtomicBool>>,
}

impl Notifier {
    /// A notifier, where its messages arrive, and the eventfd that rings for them.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn new() -> Result<(Self, Receiver<Stop>, EventFd)> {
        let (sender, receiver) = channel();
        let bell = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(Error::io("eventfd"))?;
        let ours = bell.try_clone().map_err(Error::io("duplicating an eventfd"))?;
        Ok((Self { sender, bell, first: None }, receiver, ours))
    }

    /// Another one for the same receiver.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn try_clone(&self) -> Result<Self> {
        Ok(Self { sender: self.sender.clone(), bell: self.bell()?, first: None })
    }

    /// What rings for the main thread.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn bell(&self) -> Result<EventFd> {
        self.bell.try_clone().map_err(Error::io("duplicating an eventfd"))
    }

    /// The same, which also tells of the vCPU's first exit.
    #[must_use]
    pub fn telling_first(self, first: Option<Arc<AtomicBool>>) -> Self {
        Self { first, ..self }
    }

    /// The guest ran, and came to the monitor.
    pub fn ran(&mut self) {
        if let Some(first) = self.first.take() {
            first.store(true, Ordering::Release);
            let _ = self.bell.write(1);
        }
    }

    /// The guest stopped.
    pub fn stopped(&self, stop: Stop) {
        let _ = self.sender.send(stop);
        let _ = self.bell.write(1);
    }
}

/// What the device thread waits for.
enum Source {
    Bell { device: Shared, queue: usize, bell: EventFd },
    Backend { device: Shared, again: EventFd },
    Again { device: Shared, again: EventFd },
    Timer { device: Shared, queue: usize },
    Input { serial: Arc<SerialPort>, file: File },
    Stop,
}

/// The device thread.
pub struct EventLoop {
    epoll: Epoll,
    sources: Vec<Source>,
    devices: Vec<Shared>,
}

/// Handle on the running thread.
#[derive(Debug)]
pub struct DeviceThread {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl EventLoop {
    /// An empty loop.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn new() -> Result<Self> {
        let epoll = Epoll::new().map_err(Error::io("epoll"))?;
        Ok(Self { epoll, sources: Vec::new(), devices: Vec::new() })
    }

    fn add(&mut self, descriptor: RawFd, events: EventSet, source: Source) -> Result<()> {
        let event = EpollEvent::new(events, self.sources.len() as u64);
        self.epoll.ctl(ControlOperation::Add, descriptor, event).map_err(Error::io("epoll_ctl"))?;
        self.sources.push(source);
        Ok(())
    }

    /// Serves a virtio device: its queues' bells and its timers, and its backend as soon as it is prepared.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn add_device(&mut self, device: &Shared, bells: &[EventFd]) -> Result<()> {
        self.devices.push(Arc::clone(device));
        for (queue, bell) in bells.iter().enumerate() {
            if lock(device).kernel_hears(queue) {
                continue;
            }
            let bell = bell.try_clone().map_err(Error::io("duplicating an eventfd"))?;
            let source = Source::Bell { device: Arc::clone(device), queue, bell };
            let Source::Bell { bell, .. } = &source else { continue };
            self.add(bell.as_raw_fd(), EventSet::IN, source)?;
        }
        let timers = lock(device).timers();
        for (queue, descriptor) in timers {
            self.add(descriptor, EventSet::IN, Source::Timer { device: Arc::clone(device), queue })?;
        }
        Ok(())
    }

    /// Feeds a descriptor's bytes to the serial port.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn add_input(&mut self, serial: &Arc<SerialPort>, file: File) -> Result<()> {
        let descriptor = file.as_raw_fd();
        self.add(descriptor, EventSet::IN, Source::Input { serial: Arc::clone(serial), file })
    }

    /// Starts the thread, behind its filter.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Seccomp`].
    pub fn start(mut self, filter: seccomp::Filter) -> Result<DeviceThread> {
        let stop = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(Error::io("eventfd"))?;
        self.add(stop.as_raw_fd(), EventSet::IN, Source::Stop)?;
        let (sender, receiver) = channel();
        let thread = threads::spawn(threads::DEVICES.to_owned(), move || {
            let locked = self.prepare().and_then(|()| seccomp::install(&filter));
            let go = locked.is_ok();
            let _ = sender.send(locked);
            if go {
                self.run();
            }
        })?;
        receiver.recv().map_err(|_| Error::State("the device thread ended at once".into()))??;
        Ok(DeviceThread { stop, thread: Some(thread) })
    }

    /// What devices do on this thread while it may still do everything.
    fn prepare(&mut self) -> Result<()> {
        let devices = self.devices.clone();
        devices.iter().try_for_each(|device| {
            let backend = {
                let mut device = lock(device);
                let name = device.name().to_owned();
                device.prepare().map_err(Error::io(format!("preparing {name}")))?;
                device.backend_fds()
            };
            if backend.is_empty() {
                return Ok(());
            }
            let again = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(Error::io("eventfd"))?;
            for descriptor in backend {
                let again = again.try_clone().map_err(Error::io("duplicating an eventfd"))?;
                // Edge-triggered: a packet that finds no buffers must not keep the thread spinning.
                let source = Source::Backend { device: Arc::clone(device), again };
                self.add(descriptor, EventSet::IN | EventSet::EDGE_TRIGGERED, source)?;
            }
            self.add(again.as_raw_fd(), EventSet::IN, Source::Again { device: Arc::clone(device), again })
        })
    }

    fn run(&self) {
        let mut events = [EpollEvent::default(); 32];
        loop {
            let count = match self.epoll.wait(-1, &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    crate::log::line(&format!("the device thread cannot wait for events: {error}"));
                    return;
                }
            };
            for event in &events[..count] {
                let source = usize::try_from(event.data()).ok().and_then(|index| self.sources.get(index));
                match source {
                    Some(Source::Stop) => return,
                    Some(source) => self.serve(source),
                    None => {}
                }
            }
        }
    }

    fn serve(&self, source: &Source) {
        match source {
            Source::Bell { device, queue, bell } => {
                let _ = bell.read();
                if lock(device).queue_event(*queue) {
                    let _ = bell.write(1);
                }
            }
            Source::Backend { device, again } => {
                if lock(device).backend_event() {
                    let _ = again.write(1);
                }
            }
            Source::Again { device, again } => {
                let _ = again.read();
                if lock(device).backend_event() {
                    let _ = again.write(1);
                }
            }
            Source::Timer { device, queue } => lock(device).timer_event(*queue),
            Source::Input { serial, file } => self.read_input(serial, file),
            Source::Stop => {}
        }
    }

    fn read_input(&self, serial: &SerialPort, mut file: &File) {
        let mut bytes = [0; 1024];
        match file.read(&mut bytes) {
            Ok(count) if count > 0 => {
                if serial.input(&bytes[..count]).is_err() {
                    static LOG: crate::log::Limited = crate::log::Limited::new();
                    LOG.line(|| "console input is lost: the guest does not read it".into());
                }
            }
            Err(error)
                if matches!(
                    error.kind(),
                    std::io::ErrorKind::Interrupted | std::io::ErrorKind::WouldBlock
                ) => {}
            // The other side is gone; the guest lives on without input.
            _ => {
                let _ = self.epoll.ctl(ControlOperation::Delete, file.as_raw_fd(), EpollEvent::default());
            }
        }
    }
}

impl Drop for DeviceThread {
    fn drop(&mut self) {
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
