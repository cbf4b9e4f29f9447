//! The script that makes a program of user data in images without cloud-init.
#![allow(clippy::unwrap_used, missing_docs)]

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};

/// The script's output, and the program that it made.
fn prepare(user_data: &[u8]) -> (String, Option<Vec<u8>>) {
    let folder = tempfile::tempdir().unwrap();
    let (raw, program) = (folder.path().join("raw"), folder.path().join("program"));
    fs::write(&raw, user_data).unwrap();
    let script = roost_testbed::repository_root().join("guest-images/shared/user-data");
    let output = Command::new("sh").arg(script).arg(&raw).arg(&program).output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    let made = fs::read(&program).ok();
    if made.is_some() {
        assert_eq!(fs::metadata(&program).unwrap().permissions().mode() & 0o777, 0o700);
    }
    let left = fs::read_dir(folder.path()).unwrap().count();
    assert_eq!(left, 1 + usize::from(made.is_some()), "no file of its own is left");
    (String::from_utf8(output.stdout).unwrap(), made)
}

fn gzip(plain: &[u8]) -> Vec<u8> {
    let mut command = Command::new("gzip");
    let mut child = command.arg("-c").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    let plain = plain.to_vec();
    let writer = std::thread::spawn(move || input.write_all(&plain));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap().unwrap();
    output.stdout
}

#[test]
fn a_script_is_run_plain_or_gzipped_with_unix_or_dos_lines() {
    let unix = b"#!/bin/sh\necho one\nprintf 'a\\r\\n'\n";
    let dos = b"#!/bin/sh\r\necho one\r\nprintf 'a\\r\\n'\r\n";
    for given in [unix.to_vec(), dos.to_vec(), gzip(unix), gzip(dos)] {
        let (said, made) = prepare(&given);
        assert_eq!((said.as_str(), made.as_deref()), ("", Some(unix.as_slice())), "{given:?}");
    }
}

#[test]
fn a_script_whose_first_line_ends_with_lf_keeps_every_byte() {
    let script = b"#!/bin/sh\nprintf x > a\r\n\x00\xff\nno end of line";
    assert_eq!(prepare(script), (String::new(), Some(script.to_vec())));
}

#[test]
fn nothing_is_said_of_user_data_that_is_empty() {
    assert_eq!(prepare(b""), (String::new(), None));
}

#[test]
fn user_data_of_any_other_form_is_named_and_not_run() {
    let mut cut = gzip(b"#!/bin/sh\necho a script that was cut short\n");
    cut.truncate(cut.len() - 12);
    let forms: &[(&[u8], &str)] = &[
        (b"#cloud-config\npackages: [x]\n", "cloud-config"),
        (b"#cloud-config-archive\n- x\n", "cloud-config-archive"),
        (b"Content-Type: multipart/mixed; boundary=\"x\"\nMIME-Version: 1.0\n", "multipart"),
        (b"MIME-Version: 1.0\r\nContent-Type: multipart/mixed; boundary=\"x\"\r\n", "multipart"),
        (b"#cloud-boothook\n#!/bin/sh\n", "cloud-boothook"),
        (b"#include\nhttp://x/\n", "include"),
        (b"#include-once\nhttp://x/\n", "include"),
        (b"#part-handler\n", "part-handler"),
        (b"## template: jinja\n#!/bin/sh\n", "jinja-template"),
        (b"\xef\xbb\xbf#!/bin/sh\n", "byte-order-mark"),
        (&cut, "damaged-gzip"),
        (b"\x1f\x8b", "damaged-gzip"),
        (&gzip(&vec![b'#'; 17 << 20]), "damaged-gzip"),
        (&gzip(b"#cloud-config\n"), "cloud-config"),
        (&gzip(&gzip(b"#!/bin/sh\n")), "unknown"),
        (b"#!/no/such/program -x\n", "no-interpreter"),
        (b"#!\n", "no-interpreter"),
        (b"\n#!/bin/sh\n", "unknown"),
        (b"echo hello\n", "unknown"),
        (b"\xff\xfe#\x00!\x00", "unknown"),
        (b"\x00", "unknown"),
    ];
    for (given, form) in forms {
        let expected = format!("roost-guest: user data not run: {form}\n");
        assert_eq!(
            prepare(given),
            (expected, None),
            "{}",
            String::from_utf8_lossy(&given[..given.len().min(40)])
        );
    }
}
