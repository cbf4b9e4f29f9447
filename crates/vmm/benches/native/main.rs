//! What a monitor costs the host before its guest does anything, measured natively on /dev/kvm, where that is a real
//! figure on any machine. QEMU's microvm runs beside ours in the same run. `scripts/bench` runs this.
//!
//! | module | what it measures |
//! |---|---|
//! | [`start`] | fork → first KVM_RUN, and memory there; both of the same processes |
//! | [`density`] | VMs started and held, and what each costs |
//! | [`devices`] | memory after a guest has used a disk and an interface |
//! | [`calls`] | how long API calls take |
//! | [`snapshots`] | how long it takes to make one, and to go on from it |

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

#[path = "../../tests/common/mod.rs"]
mod common;

mod calls;
mod density;
mod devices;
mod monitors;
mod report;
mod snapshots;
mod start;

use std::path::PathBuf;

use clap::{Parser, ValueEnum};
use monitors::{Bench, Who};
use report::{Goal, Report, Sample};

#[derive(Parser)]
#[command(about = "Measures the monitor natively, beside QEMU's microvm.")]
struct Options {
    /// An ELF kernel with a PVH entry; one of the size and shape of the `fast` kernel is made when left out.
    #[arg(long)]
    kernel: Option<PathBuf>,
    /// The monitor.
    #[arg(long, default_value = env!("CARGO_BIN_EXE_roost-vmm"))]
    monitor: PathBuf,
    /// QEMU; left out when it is not there.
    #[arg(long, default_value = "qemu-system-x86_64")]
    qemu: PathBuf,
    /// Times that each start and each call is measured.
    #[arg(long, default_value_t = 10)]
    runs: usize,
    /// VMs that are held at the same time.
    #[arg(long, default_value_t = 200)]
    held: usize,
    #[arg(long, value_enum, default_value_t)]
    output: Output,
    /// Cargo adds this to every benchmark.
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, Default, ValueEnum)]
enum Output {
    #[default]
    Table,
    Json,
}

fn main() {
    let options = Options::parse();
    let bench = Bench::new(&options.monitor, &options.qemu, options.kernel.as_deref()).unwrap();
    let mut report = Report::new(about(&bench, options.runs));
    start::measure(&bench, options.runs, &mut report);
    devices::measure(&bench, options.runs, &mut report);
    density::measure(&bench, options.held, &mut report);
    calls::measure(&bench, options.runs, &mut report);
    snapshots::measure(&bench, options.runs, &mut report);
    let mut size = Sample::default();
    size.add(Who::Roost, std::fs::metadata(&options.monitor).unwrap().len() as f64 / 1e6);
    report.compare("binary as it is installed", "MB", &size, Goal::below(3.0));
    report.finish();
    match options.output {
        Output::Table => print!("{report}"),
        Output::Json => println!("{}", report.json()),
    }
}

/// What the figures depend on.
fn about(bench: &Bench, runs: usize) -> Vec<(&'static str, String)> {
    let kernel = if bench.real_kernel {
        let size = bench.kernel().metadata().map_or(0, |about| about.len());
        format!("{} ({:.1} MB)", bench.kernel().display(), size as f64 / 1e6)
    } else {
        "a stand-in of the `fast` kernel's size (none is cached)".to_owned()
    };
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let cpus = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    vec![
        ("machine", format!("{cpus} CPUs, Linux {}", release.trim())),
        ("QEMU", bench.qemu_version().unwrap_or_else(|| "not there".to_owned())),
        ("kernel", kernel),
        ("runs", format!("{runs}, minimum / median")),
        ("load before", report::load()),
    ]
}
