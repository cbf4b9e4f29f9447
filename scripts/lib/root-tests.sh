# Sourced by scripts/test: tests that need root or a host of their own, which plain `cargo nextest run` leaves out
# (they are marked `#[ignore]` with the reason).
# shellcheck shell=bash

NOT_RUN=() # what was left out, and why: the run's last lines say it

# The network of an instance and the jail of a monitor, in namespaces of this machine that vanish with each test. Root, or sudo without a question.
tests_as_root() {
    local runner=()
    if [[ $EUID != 0 ]]; then
        if ! sudo -n true 2> /dev/null; then
            NOT_RUN+=("crates/agent/tests/network.rs, crates/vmm/tests/jail.rs, crates/vmm/tests/attempts.rs: need root, or sudo that asks no password")
            return 0
        fi
        # Only the test is run as root, not cargo: what is built stays the caller's.
        runner=("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER=sudo -n --preserve-env --")
    fi
    env "${runner[@]}" cargo nextest run --locked -p roost-agent -p roost-vmm --test network --test jail --test attempts --run-ignored only
}

# The agent with a real guest and without a controller, on the host where the guests are: HOST_BIN is the folder of the
# programs there, IMAGE the folder of `tiny` here (host.sh says how the host is reached).
real_host_tests() {
    local host_bin=$1 image=$2 test there=/tmp/roost-real-host
    test=$(cargo test --locked -q -p roost-agent --test real_host --no-run --message-format=json |
        jq -r 'select(.reason == "compiler-artifact" and .target.name == "real_host") | .executable // empty')
    [[ -n $test ]] || { warn "cargo did not say where it built the test real_host"; return 1; }
    # `stage` asks for the exit code, so `set -e` does not hold in here.
    copy_to_host "$there" "$test" "$image" &&
        on_host "ROOST_TEST_BIN=$host_bin ROOST_TEST_TINY=$there/${image##*/} $there/${test##*/} --ignored --nocapture" &&
        on_host "rm -rf $there"
}

# One line for each thing that was not run. Silence would look like success.
report_not_run() {
    local what
    for what in "${NOT_RUN[@]}"; do warn "NOT RUN: $what"; done
}
