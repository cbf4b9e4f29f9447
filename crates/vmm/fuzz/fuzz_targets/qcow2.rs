//! qcow2 images, opened as the monitor does: files as a tenant may have made them, which are read; and images as the agent
//! makes them, which a guest reads and writes, beside a model.
//!
//! Files with metadata that lies are not written to: there imago 0.2.6 can still fill its stack (the monitor refuses the
//! one way into it that it can see, `block/qcow2.rs`).
#![no_main]

use std::fs::File;

use imago::FormatCreateBuilder;
use imago::qcow2::Qcow2;
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use roost_vmm::config::DriveFormat;
use roost_vmm::devices::virtio::block::backend::{Backend, Image};
use roost_vmm::memory::{Slice, slice_of};
use roost_vmm_fuzz::host::file;

/// What lies below an overlay.
const BASE: [u8; 8192] = [9; 8192];

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Step {
    Read(u32, u8),
    Write(u32, u8, u8),
    Discard(u32, u8),
    Zero(u32, u8, bool),
    Flush,
    Reopen,
}

#[derive(Arbitrary, Debug)]
enum Origin<'a> {
    Anybody { writable: bool, image: &'a [u8] },
    Agent { cluster_bits: u8, sectors: u16 },
}

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    based: bool,
    steps: Vec<Step>,
    origin: Origin<'a>,
}

/// The part of the disk that a step is about: inside, as the queue logic promises.
fn range(size: u64, sector: u32, count: u8) -> (u64, usize) {
    let sector = u64::from(sector) % (size / 512).max(1);
    (sector * 512, (u64::from(count) * 512).min(size - sector * 512) as usize)
}

/// As the queue logic lists them: no part is empty.
fn list(buffer: &mut [u8]) -> Vec<Slice<'_>> {
    buffer.chunks_mut(700).map(slice_of).collect()
}

fn read(image: &Image, offset: u64, length: usize) -> std::io::Result<Vec<u8>> {
    let mut buffer = vec![3; length];
    image.read(offset, &list(&mut buffer))?;
    Ok(buffer)
}

fn look(image: &File, based: bool, writable: bool, steps: &[Step]) {
    let base = based.then(|| file(&BASE));
    let opened = Image::open(image.try_clone().unwrap(), DriveFormat::Qcow2, base, writable);
    let Ok(image) = opened else { return };
    let size = image.size() / 512 * 512;
    for step in steps.iter().take(16) {
        if let Step::Read(sector, count) = *step {
            let (offset, length) = range(size, sector, count);
            let _ = read(&image, offset, length);
        }
    }
}

fn use_it(cluster_bits: u8, sectors: u16, based: bool, steps: &[Step]) {
    let size = 512 * usize::from(sectors);
    let disk = file(&[]);
    let storage = imago::file::File::try_from(disk.try_clone().unwrap()).unwrap();
    let builder = Qcow2::<imago::file::File>::create_builder(storage)
        .size(size as u64)
        .cluster_size(512 << (cluster_bits % 8));
    let builder = if based { builder.backing("base".into(), "raw".into()) } else { builder };
    builder.create().unwrap();
    let open = || {
        let base = based.then(|| file(&BASE));
        Image::open(disk.try_clone().unwrap(), DriveFormat::Qcow2, base, true).unwrap()
    };
    let mut image = open();
    let mut model: Vec<Option<u8>> = vec![Some(0); size];
    if based {
        model.iter_mut().zip(BASE).for_each(|(byte, of_base)| *byte = Some(of_base));
    }
    for step in steps.iter().take(32) {
        match *step {
            Step::Read(sector, count) => {
                let (offset, length) = range(size as u64, sector, count);
                let found = read(&image, offset, length).unwrap();
                let known = &model[offset as usize..offset as usize + length];
                assert!(
                    found.iter().zip(known).all(|(byte, known)| known.is_none_or(|known| known == *byte))
                );
            }
            Step::Write(sector, count, byte) => {
                let (offset, length) = range(size as u64, sector, count);
                let mut buffer = vec![byte; length];
                image.write(offset, &list(&mut buffer)).unwrap();
                model[offset as usize..offset as usize + length].fill(Some(byte));
            }
            Step::Discard(sector, count) => {
                let (offset, length) = range(size as u64, sector, count);
                image.discard(offset, length as u64).unwrap();
                // What is there then is not promised.
                model[offset as usize..offset as usize + length].fill(None);
            }
            Step::Zero(sector, count, unmap) => {
                let (offset, length) = range(size as u64, sector, count);
                image.write_zeroes(offset, length as u64, unmap).unwrap();
                model[offset as usize..offset as usize + length].fill(Some(0));
            }
            Step::Flush => image.flush().unwrap(),
            Step::Reopen => {
                image.flush().unwrap();
                image = open();
            }
        }
    }
}

fuzz_target!(|input: Input<'_>| {
    match input.origin {
        Origin::Anybody { writable, image } => look(&file(image), input.based, writable, &input.steps),
        Origin::Agent { cluster_bits, sectors } => {
            use_it(cluster_bits, sectors % 256, input.based, &input.steps)
        }
    }
});
