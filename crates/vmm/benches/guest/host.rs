//! The virtual host's init: loads KVM, measures, powers off.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;

use serde_json::json;

use crate::report::Who;
use crate::{boots, idle, restore, snapshots, throughput};

/// Measures what is asked for, prints figures on the console, and ends the machine whatever happens.
pub fn run(what: &str) -> ! {
    let done = prepare().map(|()| {
        let measured = std::panic::catch_unwind(|| match what {
            "counted" => {
                boots::measure(number("runs", 5));
                snapshots::measure(number("runs", 5));
            }
            "profile" => {
                let qemu = std::env::var("of").is_ok_and(|of| of == "qemu");
                boots::watched(number("runs", 1), if qemu { Who::Qemu } else { Who::Roost });
            }
            "idle" => idle::measure(number("seconds", 60)),
            "restore" => restore::measure(number("runs", 5)),
            "throughput" => throughput::measure(
                &std::env::var("of").unwrap_or_default(),
                number("pairs", 10),
                number("milliseconds", 1000),
            ),
            other => println!("bench={other}: counted, profile, restore, idle and throughput are there"),
        });
        println!("{}", if measured.is_ok() { "MEASURED" } else { "FAILED" });
    });
    if let Err(error) = done {
        println!("FAILED {error}");
    }
    // SAFETY: writes what there is, and ends the machine.
    unsafe { libc::sync() };
    // SAFETY: the same.
    unsafe { libc::reboot(libc::RB_POWER_OFF) };
    loop {
        // SAFETY: waits for the end.
        unsafe { libc::pause() };
    }
}

/// A figure for the table.
pub fn figure(what: &str, who: Who, value: f64) {
    let who = if who == Who::Roost { "roost" } else { "qemu" };
    println!("FIGURE {}", json!({ "what": what, "who": who, "value": value }));
}

/// What the figures depend on.
pub fn about(name: &str, text: &str) {
    println!("FIGURE {}", json!({ "about": name, "text": text }));
}

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

fn prepare() -> io::Result<()> {
    for (kind, place) in [
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("devtmpfs", "/dev"),
        ("tmpfs", "/tmp"),
        ("debugfs", "/sys/kernel/debug"),
        ("tracefs", "/sys/kernel/tracing"),
    ] {
        let _ = fs::create_dir_all(place);
        mount(kind, place)?;
    }
    let console = OpenOptions::new().read(true).write(true).open("/dev/console")?;
    for standard in 0..3 {
        // SAFETY: both are descriptors of this process.
        if unsafe { libc::dup2(console.as_raw_fd(), standard) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    let mut modules: Vec<_> = fs::read_dir("/modules")?.flatten().map(|entry| entry.path()).collect();
    modules.sort();
    for module in modules {
        let file = File::open(&module)?;
        // SAFETY: the descriptor is open, the text ends with a NUL.
        let result = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
        if result < 0 {
            return Err(io::Error::other(format!("{}: {}", module.display(), io::Error::last_os_error())));
        }
    }
    let read = |path| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    let cpus = std::thread::available_parallelism()?;
    about("virtual host", &format!("{cpus} CPUs, Linux {}", read("/proc/sys/kernel/osrelease")));
    about("mode", &read("/about/mode"));
    about("kernel", &read("/about/kernel"));
    about("QEMU", &read("/about/qemu"));
    Ok(())
}

/// Mounts a file system of this kind that needs no device.
pub fn mount(kind: &str, place: &str) -> io::Result<()> {
    mount_device(kind, kind, place)
}

/// Mounts the file system on a device.
pub fn mount_device(device: &str, kind: &str, place: &str) -> io::Result<()> {
    let (device, kind, place) = (CString::new(device)?, CString::new(kind)?, CString::new(place)?);
    // SAFETY: all texts end with a NUL.
    let result = unsafe { libc::mount(device.as_ptr(), place.as_ptr(), kind.as_ptr(), 0, std::ptr::null()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
