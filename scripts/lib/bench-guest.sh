# Sourced by scripts/bench: the benchmark of Linux guests, in a virtual host of its own that has nothing in it but what is
# measured: a kernel, KVM, the monitors, the guest. All of it is one initial RAM disk.
# shellcheck shell=bash

# measure_guests MODE FORMAT WORD...: MODE is counted, profile, restore, idle or throughput; words go to the benchmark (runs=5, seconds=60, pairs=10).
# With a word in $uncleared the host of a restore does not clear memory as it is freed.
measure_guests() {
    local mode=$1 format=$2 forgets="" debian fast qemu root program libraries loader accelerator work disk=()
    shift 2
    # shellcheck source=guest-images/lib/initrd.sh
    source "$ROOST_ROOT/guest-images/lib/initrd.sh"
    debian=$(guest-images/build --kernel debian)
    fast=${kernel:-$(guest-images/build --kernel fast)/kernel}
    qemu=$(guest-images/build --qemu)
    root=$qemu/root libraries=$qemu/root/usr/lib/x86_64-linux-gnu
    loader=$libraries/ld-linux-x86-64.so.2
    work=$(mktemp -d)
    at_end rm -rf "$work"

    step "Build the monitor as it is installed, and the benchmark"
    build_monitor
    program=$(cargo bench --locked -p roost-vmm --bench guest --no-run --message-format json |
        jq -r 'select(.target.name? == "guest" and .executable).executable')
    [[ -x $program ]] || die "the benchmark does not build: cargo bench -p roost-vmm --bench guest --no-run"

    step "Put the virtual host together"
    mkdir -p "$work"/{host/{bin,qemu/{lib,share},about},guest,load}
    strip -o "$work/load/init" "$program"
    cp "$work/load/init" "$work/host/init"
    "$program" init "$work/guest/init"
    chmod 755 "$work/guest/init"
    local guest
    for guest in guest load; do
        (cd "$work/$guest" && find . -mindepth 1 | cpio --create --format=newc --quiet) > "$work/host/$guest.cpio"
    done
    cp "$fast" "$work/host/kernel"
    cp "$(installed_monitor)" "$work/host/bin/roost-vmm"
    copy_modules "$debian/modules/"* "$work/host/modules" kvm-amd tun vhost_net virtio_pci virtio_blk ext4
    cp "$loader" "$work/host/qemu/loader"
    cp "$root/usr/bin/qemu-system-x86_64" "$work/host/qemu/"
    cp "$root/usr/share/qemu/qboot.rom" "$root/usr/share/qemu/bios-microvm.bin" "$work/host/qemu/share/" 2> /dev/null || true
    local library
    for library in $("$loader" --library-path "$libraries" --list "$root/usr/bin/qemu-system-x86_64" | grep -o '=> /[^ ]*' | cut -c4-); do
        cp -L "$library" "$work/host/qemu/lib/"
    done
    head -n 1 "$qemu/version" > "$work/host/about/qemu"
    printf '%s (%d bytes)\n' "$(cat "$(dirname "$fast")/release" 2> /dev/null || basename "$fast")" "$(stat -c %s "$fast")" \
        > "$work/host/about/kernel"
    case $mode in
    # One instruction is one nanosecond of the virtual host's time, whatever else this machine does.
    counted | profile) accelerator=(-accel "tcg,thread=single,tb-size=512" -smp 1 -icount "shift=0,sleep=on") ;;
    idle | restore | throughput) accelerator=(-accel "tcg,thread=multi,tb-size=512" -smp 2) ;;
    esac
    # Whoever writes to memory that a dead guest ran code in waits while QEMU drops its translation, which takes it up to 0.1 ms for each
    # block: cleared as it is freed, memory costs who used it and not who comes next.
    [[ $mode != restore || -n ${uncleared:-} ]] || forgets=init_on_free=1
    # The guests' disks are files of a file system; the disk beneath it is in no measurement, as all of them stay in the page cache.
    if [[ $mode == throughput ]]; then
        truncate -s 1G "$work/disk"
        mke2fs -q -t ext4 -E lazy_itable_init=0 "$work/disk"
        disk=(-drive "if=virtio,format=raw,cache=unsafe,file=$work/disk")
    fi
    echo "$mode ($*)${forgets:+, host with $forgets}, minimum / median; QEMU ${accelerator[*]}; load of this machine $(cut -d' ' -f1-3 /proc/loadavg)" > "$work/host/about/mode"
    (cd "$work/host" && find . -mindepth 1 | cpio --create --format=newc --quiet) > "$work/initrd"

    step "Measure"
    if [[ $mode == profile ]]; then
        gcc -O2 -shared -fPIC -o "$work/count.so" crates/vmm/benches/guest/count.c
        local boots few=2 many=8
        for boots in $few $many; do
            run_bench_host "$work/after-$boots" "runs=$boots $*" -plugin "file=$work/count.so,out=$work/after-$boots.counts"
        done
        "$program" profile "$format" "$work/after-$few" "$work/after-$many" $((many - few)) "$(dirname "$fast")/System.map"
        return
    fi
    run_bench_host "$work/console" "$*"
    "$program" "$work/console" "$format"
}

# run_bench_host CONSOLE WORDS OPTION...: a boot of the virtual host that measure_guests has put together, to its end.
run_bench_host() {
    local console=$1 words=$2
    shift 2
    timeout "${ROOST_BENCH_LIMIT:-1500}" "$qemu/qemu-system-x86_64" -M q35 "${accelerator[@]}" -cpu max,-la57 -m 3072 -nodefaults -no-user-config \
        "${disk[@]}" "$@" -display none -monitor none -no-reboot -serial "file:$console" -kernel "$debian/bzImage" -initrd "$work/initrd" \
        -append "console=ttyS0 quiet panic=-1 mitigations=off $forgets rdinit=/init bench=$mode $words" < /dev/null >&2 ||
        warn "the virtual host was ended: it took longer than ${ROOST_BENCH_LIMIT:-1500} s"
    [[ -z ${ROOST_BENCH_CONSOLE:-} ]] || cp "$console" "$ROOST_BENCH_CONSOLE"
    grep -aq '^MEASURED' "$console" || { tail -n 30 "$console" >&2; die "the measurement did not come to its end"; }
}
