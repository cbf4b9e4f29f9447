//! User data that reports its environment. Every image must run it in cloud-init's place and
//! environment.

use std::io::Write;
use std::process::{Command, Stdio};

/// Writes what a script may rely on to the file and to stdout.
pub fn tells(file: &str) -> String {
    format!(
        "#!/bin/sh
{{
  echo \"told user $(id -u) in $(pwd) umask $(umask)\"
  echo \"told path $PATH\"
  echo \"told home ${{HOME-unset}}\"
  if [ -t 0 ]; then echo 'told input is a terminal'; else echo 'told input is none'; fi
  if [ -d /run/systemd/system ]; then echo \"told boot $(systemctl is-active multi-user.target)\"; fi
}} > {file}
cat {file}
"
    )
}

/// The result of [`tells`] on a system with systemd.
pub const TOLD: &str = "told user 0 in / umask 0022
told path /usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
told home unset
told input is none
told boot active
";

/// As an editor on Windows saves it, packed by gzip.
pub fn dos_gzip(script: &str) -> Vec<u8> {
    let mut child = Command::new("gzip").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    // Fits into a pipe.
    child.stdin.take().unwrap().write_all(script.replace('\n', "\r\n").as_bytes()).unwrap();
    child.wait_with_output().unwrap().stdout
}
