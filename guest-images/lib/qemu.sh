# QEMU for the virtual host: Debian's own build of a newer version than the machine's, with the libraries it was built
# against and one mend (below), in a folder of its own. Nothing of it is installed on this machine, and it runs on
# any release. Why this version: docs/decisions/0012-qemu-of-its-own.md.
#
#   qemu_folder   prints the folder; its program is qemu-system-x86_64
#
# shellcheck shell=bash

QEMU_SUITE=trixie

qemu_folder() {
    local key
    key=$( { _qemu_suite _qemu_packages; hash_files "$ROOST_ROOT/guest-images/lib/qemu.sh"; } | hash_key)
    cache_entry qemu x86_64 "$key" _build_qemu
}

# Runs CMD with the package functions turned to QEMU's suite and its backports.
_qemu_suite() {
    # shellcheck disable=SC2034 # read by packages.sh
    local GUEST_SUITE=$QEMU_SUITE APT_ROOT=$CACHE/apt/$QEMU_SUITE BACKPORTS=yes _index_ready=''
    "$@"
}

# What it depends on comes along, down to the C library.
_qemu_packages() { _resolve_cached -t "$QEMU_SUITE-backports" install qemu-system-x86; }

_build_qemu() {
    local out=$1 work deb
    work=$(mktemp -d "$CACHE/.work-XXXXXX")
    # shellcheck disable=SC2064
    trap "rm -rf '$work'" EXIT
    _qemu_suite _qemu_packages > "$work/list"
    _qemu_suite packages_fetch "$work/list" "$work/debs"
    mkdir "$out/root"
    for deb in "$work"/debs/*.deb; do dpkg-deb -x "$deb" "$out/root"; done
    rm -rf "$out"/root/usr/share/{doc,man,info,locale,lintian,bash-completion,icons}
    _mend_vmrun "$out/root/usr/bin/qemu-system-x86_64"
    cat > "$out/qemu-system-x86_64" << 'LAUNCHER'
#!/bin/bash
# QEMU by its own loader, on its own libraries.
root=$(dirname "$0")/root
libraries=$root/usr/lib/x86_64-linux-gnu
# A host that stays up must not hold its starter's locks and pipes. 255 is this script, and closes with it.
for fd in /proc/self/fd/*; do
    fd=${fd##*/}
    ((fd <= 2 || fd == 255)) || eval "exec $fd>&-"
done
exec "$libraries/ld-linux-x86-64.so.2" --library-path "$libraries" --argv0 qemu-system-x86_64 \
    "$root/usr/bin/qemu-system-x86_64" -L "$root/usr/share/qemu" -L "$root/usr/share/seabios" "$@"
LAUNCHER
    chmod 755 "$out/qemu-system-x86_64"
    "$out/qemu-system-x86_64" --version > "$out/version"
}

# QEMU's VMRUN delivers the interrupt that its caller injects, and also leaves its vector behind as a pending exception
# (target/i386/tcg/system/svm_helper.c, helper_vmrun, SVM_EVTINJ_TYPE_INTR: `cs->exception_index = vector`). When the
# emulator leaves its loop next for a reason of its own, the guest is struck by that vector a second time, interrupts
# disabled or not. This takes that one store out: `mov %esi,-0x3db0(%rbx)`, found by the two stores behind it.
_mend_vmrun() {
    local program=$1
    # shellcheck disable=SC2016 # perl's variables
    perl -e '
        my ($file) = @ARGV;
        open(my $in, "<:raw", $file) or die "$file: $!\n";
        my $code = do { local $/; <$in> };
        my $store = "\x89\xb3\x50\xc2\xff\xff";
        my $behind = "\xc7\x83\x84\x34\0\0\0\0\0\0" . "\x48\xc7\x83\x88\x34\0\0\xff\xff\xff\xff";
        my $found = () = $code =~ /\Q$store$behind\E/g;
        exit 1 unless $found == 1;
        # A no-op of six bytes.
        $code =~ s/\Q$store$behind\E/\x66\x0f\x1f\x44\0\0$behind/;
        open(my $out, ">:raw", $file) or die "$file: $!\n";
        print $out $code;
    ' "$program" && return
    warn "this build of QEMU is not the one that _mend_vmrun knows: now and then a guest in the virtual host may be struck twice by one interrupt and die (docs/decisions/0012-qemu-of-its-own.md)"
}
