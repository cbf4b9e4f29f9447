# Sourced: builds the programs and says where they are.
# shellcheck shell=bash

# The folder that cargo builds into (absolute), for the workspace's one target.
target_dir() {
    local dir=${CARGO_TARGET_DIR:-$ROOST_ROOT/target}
    echo "$dir/x86_64-unknown-linux-gnu"
}

# Builds every program that a host or a user runs, in release mode, and nothing else.
# With ROOST_NO_BUILD=1 the programs in the target folder are taken as they are.
build_programs() {
    [ -z "${ROOST_NO_BUILD:-}" ] || return 0
    cargo build --release --locked -p roost-agent -p roost-controller -p roost-cli
    build_monitor
}

# The monitor as it is installed: one process per instance, so it is worth a build of its own (Cargo.toml, profile.monitor).
build_monitor() {
    [ -z "${ROOST_NO_BUILD:-}" ] || return 0
    cargo build --profile monitor --locked -p roost-vmm --bin roost-vmm
    mkdir -p "$(programs_dir)"
    cmp -s "$(target_dir)/monitor/roost-vmm" "$(programs_dir)/roost-vmm" ||
        cp --remove-destination "$(target_dir)/monitor/roost-vmm" "$(programs_dir)/roost-vmm"
}

# Where only build_monitor writes: cargo's own release builds put another one into the folder of programs.
installed_monitor() { echo "$(target_dir)/monitor/roost-vmm"; }

programs_dir() { echo "$(target_dir)/release"; }

# A loopback port that nobody listens on now.
free_port() {
    local port
    for _ in $(seq 50); do
        port=$((20000 + RANDOM % 20000))
        if ! (exec 3<> "/dev/tcp/127.0.0.1/$port") 2>/dev/null; then echo "$port"; return; fi
    done
    die "no free port found on 127.0.0.1"
}
