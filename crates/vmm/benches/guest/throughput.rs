//! What goes through a guest's disk and interface, beside QEMU's: both machines are up at the same time and work in turn, so that
//! what else this machine does meets both alike.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpStream};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use crate::host::{about, figure};
use crate::link;
use crate::load::{PIECE, PORT, Work};
use crate::monitors::{Devices, Does, Machine, Up, command};
use crate::report::Who;

const COUNTERS: [&str; 3] = ["exits", "mmio_exits", "irq_injections"];
const EVERYONE: [Who; 2] = [Who::Roost, Who::Qemu];
const DISK_BYTES: u64 = 256 << 20;
/// Threads of the guest that use the disk.
const THREADS: u64 = 4;
const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
/// `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`.
const TAP: libc::c_short = 2 | 0x1000 | 0x4000;

/// Names of what the rows cost.
pub const COST_OF_ROOST: &str = "cost of each, Roost";
pub const COST_OF_QEMU: &str = "cost of each, QEMU";

/// Every row's name and unit.
pub fn rows() -> Vec<(String, &'static str)> {
    let mut rows = Vec::new();
    for queues in QUEUES {
        for work in Work::ALL {
            rows.push((disk_row(work, queues), if work.size() < 1 << 20 { "per s" } else { "MiB/s" }));
        }
    }
    for vhost in [false, true] {
        for (what, unit) in
            [("to the guest", "MiB/s"), ("from the guest", "MiB/s"), ("there and back", "per s")]
        {
            rows.push((net_row(what, vhost), unit));
        }
    }
    rows
}

const QUEUES: [u32; 2] = [1, 4];

fn disk_row(work: Work, queues: u32) -> String {
    let what = match work {
        Work::RandomRead => "random reads of 4 KiB",
        Work::RandomWrite => "random writes of 4 KiB",
        Work::Read => "reads of 1 MiB",
        Work::Write => "writes of 1 MiB",
    };
    format!("disk, {queues} queue{}: {what}", if queues == 1 { "" } else { "s" })
}

fn net_row(what: &str, vhost: bool) -> String {
    format!("net{}: {what}", if vhost { ", vhost" } else { "" })
}

/// `pairs` of measurements of each row, each of so many milliseconds.
pub fn measure(what: &str, pairs: u64, milliseconds: u64) {
    let time = Duration::from_millis(milliseconds);
    fs::create_dir_all("/data").unwrap();
    crate::host::mount_device("/dev/vda", "ext4", "/data").unwrap();
    for queues in QUEUES.into_iter().filter(|_| what != "net") {
        let guests = EVERYONE.map(|who| Guest::start(who, queues, false));
        for _ in 0..pairs {
            for work in Work::ALL {
                for guest in &guests {
                    guest.disk(work, queues, time);
                }
            }
        }
        say_costs(&guests);
    }
    for vhost in [false, true].into_iter().filter(|_| what != "disk") {
        let guests = EVERYONE.map(|who| Guest::start(who, 1, vhost));
        for _ in 0..pairs {
            for part in [Guest::take, Guest::give, Guest::reply] {
                for guest in &guests {
                    part(guest, vhost, time);
                }
            }
        }
        say_costs(&guests);
    }
}

struct Guest {
    who: Who,
    address: Ipv4Addr,
    up: Up,
    _tap: File,
    /// What each row has cost so far.
    costs: RefCell<BTreeMap<String, Cost>>,
}

/// What KVM counted and threads used, for so many units of a row.
#[derive(Clone, Copy, Default)]
struct Cost {
    units: f64,
    counters: [u64; COUNTERS.len()],
    /// Of the vCPUs' threads, and of all others.
    nanoseconds: [u64; 2],
}

impl Cost {
    fn of(up: &Up) -> Self {
        let mut nanoseconds = [0; 2];
        for (name, time) in up.threads() {
            // QEMU calls them `CPU 0/KVM`.
            nanoseconds[usize::from(!(name.starts_with("vcpu") || name.starts_with("CPU")))] += time;
        }
        Self { units: 0.0, counters: COUNTERS.map(|name| up.counter(name)), nanoseconds }
    }

    fn add(&mut self, before: &Self, after: &Self, units: f64) {
        self.units += units;
        for (n, sum) in self.counters.iter_mut().enumerate() {
            *sum += after.counters[n] - before.counters[n];
        }
        for (n, sum) in self.nanoseconds.iter_mut().enumerate() {
            *sum += after.nanoseconds[n].saturating_sub(before.nanoseconds[n]);
        }
    }

    /// For one unit.
    fn text(&self) -> String {
        let counted = COUNTERS.iter().zip(self.counters);
        let mut text: Vec<String> =
            counted.map(|(name, sum)| format!("{name} {:.2}", sum as f64 / self.units)).collect();
        for (name, sum) in ["vCPUs", "other threads"].iter().zip(self.nanoseconds) {
            text.push(format!("{name} {:.0} µs", sum as f64 / 1e3 / self.units));
        }
        text.join(", ")
    }
}

impl Guest {
    fn start(who: Who, queues: u32, vhost: bool) -> Self {
        let number = if who == Who::Roost { 1 } else { 2 };
        let address = Ipv4Addr::new(10, 0, number, 2);
        let name = format!("tap{number}");
        let tap = tap(&name);
        link::bring_up(&name, Ipv4Addr::new(10, 0, number, 1)).unwrap();
        let disk = format!("/data/disk{number}");
        // Written once, so that every block is there.
        let mut file = File::create(&disk).unwrap();
        let block = vec![0x5a; 1 << 20];
        (0..DISK_BYTES >> 20).for_each(|_| file.write_all(&block).unwrap());
        file.sync_all().unwrap();
        let devices = Devices { disk: &disk, disk_queues: queues, tap: &tap, vhost };
        let machine = Machine {
            cpus: queues,
            memory_mib: 256,
            does: Does::Load(address),
            words: "",
            devices: Some(devices),
        };
        let up = Up::start(command(who, machine));
        Self { who, address, up, _tap: tap, costs: RefCell::default() }
    }

    /// A figure: how many units in how many seconds `work` says.
    fn row(&self, row: &str, work: impl FnOnce() -> (f64, f64)) {
        let before = Cost::of(&self.up);
        let (units, seconds) = work();
        self.costs.borrow_mut().entry(row.to_owned()).or_default().add(&before, &Cost::of(&self.up), units);
        figure(row, self.who, units / seconds);
    }

    fn ask(&self, request: &str) -> TcpStream {
        let mut stream = TcpStream::connect((self.address, PORT)).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(30))).unwrap();
        writeln!(stream, "{request}").unwrap();
        stream
    }

    fn disk(&self, work: Work, queues: u32, time: Duration) {
        self.row(&disk_row(work, queues), || {
            let stream = self.ask(&format!("disk {} {THREADS} {}", work.name(), time.as_millis()));
            let mut line = String::new();
            BufReader::new(stream).read_line(&mut line).unwrap();
            let rate: f64 = line.trim().parse().unwrap_or_else(|_| panic!("the guest says {line:?}"));
            (rate * time.as_secs_f64(), time.as_secs_f64())
        });
    }

    fn take(&self, vhost: bool, time: Duration) {
        self.row(&net_row("to the guest", vhost), || {
            let mut stream = self.ask("take");
            let piece = vec![0; PIECE];
            let begin = Instant::now();
            while begin.elapsed() < time {
                stream.write_all(&piece).unwrap();
            }
            stream.shutdown(Shutdown::Write).unwrap();
            let mut taken = [0; 8];
            stream.read_exact(&mut taken).unwrap();
            (u64::from_le_bytes(taken) as f64 / f64::from(1 << 20), begin.elapsed().as_secs_f64())
        });
    }

    fn give(&self, vhost: bool, time: Duration) {
        self.row(&net_row("from the guest", vhost), || {
            let mut stream = self.ask("give");
            let mut piece = vec![0; PIECE];
            let (begin, mut taken) = (Instant::now(), 0);
            while begin.elapsed() < time {
                taken += stream.read(&mut piece).unwrap();
            }
            (taken as f64 / f64::from(1 << 20), begin.elapsed().as_secs_f64())
        });
    }

    fn reply(&self, vhost: bool, time: Duration) {
        self.row(&net_row("there and back", vhost), || {
            let mut stream = self.ask("reply");
            let (begin, mut times, mut byte) = (Instant::now(), 0_u32, [0]);
            while begin.elapsed() < time {
                stream.write_all(&byte).unwrap();
                stream.read_exact(&mut byte).unwrap();
                times += 1;
            }
            (f64::from(times), begin.elapsed().as_secs_f64())
        });
    }
}

/// What the rows cost: for one request, one MiB, one byte there and back.
fn say_costs(guests: &[Guest]) {
    for guest in guests {
        let whose = if guest.who == Who::Roost { COST_OF_ROOST } else { COST_OF_QEMU };
        for (row, cost) in guest.costs.borrow().iter() {
            about(whose, &format!("{row}: {}", cost.text()));
        }
    }
}

/// A tap of this name, which goes with its descriptor.
fn tap(name: &str) -> File {
    let tap = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
    let mut request = link::named(name);
    request.ifr_ifru.ifru_flags = TAP;
    // SAFETY: TUNSETIFF reads the ifreq that it is given.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETIFF, &raw mut request) };
    assert!(result >= 0, "{}", std::io::Error::last_os_error());
    tap
}
