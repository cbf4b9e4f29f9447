# QEMU for the virtual host: Debian's own build of a newer version than the machine's, with the libraries it was built
# against and two mends (below), in a folder of its own. Nothing of it is installed on this machine, and it runs on
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
    at_end rm -rf "$work"
    _qemu_suite _qemu_packages > "$work/list"
    _qemu_suite packages_fetch "$work/list" "$work/debs"
    mkdir "$out/root"
    for deb in "$work"/debs/*.deb; do dpkg-deb -x "$deb" "$out/root"; done
    rm -rf "$out"/root/usr/share/{doc,man,info,locale,lintian,bash-completion,icons}
    _mend_qemu "$out/root/usr/bin/qemu-system-x86_64"
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

# Two faults of QEMU's that strike guests in the virtual host, each mended by taking one store out, found by the bytes
# around it (docs/decisions/0012-qemu-of-its-own.md):
#
# 1. VMRUN delivers the interrupt that its caller injects, and also leaves its vector behind as a pending exception
#    (target/i386/tcg/system/svm_helper.c, helper_vmrun, SVM_EVTINJ_TYPE_INTR: `cs->exception_index = vector`). When the
#    emulator leaves its loop next for a reason of its own, the guest is struck by that vector a second time, interrupts
#    disabled or not.
# 2. When any CPU loads FPU state without a pending exception, cpu_clear_ignne (fpu_helper.c) clears a bit in the first CPU's
#    `hflags2`, from the thread of the CPU that loads. The first CPU's own change of that word at the same moment is lost:
#    after a #VMEXIT its nested paging stays on, the next access leaves "the guest" once more, and the host's registers are
#    saved as the guest's. The bit belongs to the FERR#/IGNNE# pins, which Linux has not used since the 486 (it sets CR0.NE).
_mend_qemu() {
    local program=$1
    # shellcheck disable=SC2016 # perl's variables
    perl -e '
        my ($file) = @ARGV;
        # A name, the store in hexadecimal, what stands behind it.
        my @mends = (
            # mov %esi,-0x3db0(%rbx); movl $0,0x3484(%rbx); movq $-1,0x3488(%rbx)
            ["VMRUN", "89b350c2ffff", "c7838434000000000000" . "48c78388340000ffffffff"],
            # andl $0xffffff7f,0x41a4(%rax); add $8,%rsp; xor %eax,%eax; xor %edx,%edx
            ["IGNNE", "81a0a44100007fffffff", "4883c408" . "31c0" . "31d2"],
        );
        # No-ops of as many bytes.
        my %nothing = (6 => "660f1f440000", 10 => "662e0f1f840000000000");
        open(my $in, "<:raw", $file) or die "$file: $!\n";
        my $code = do { local $/; <$in> };
        my @unknown;
        for (@mends) {
            my ($name, $store, $behind) = ($_->[0], pack("H*", $_->[1]), pack("H*", $_->[2]));
            my $found = () = $code =~ /\Q$store$behind\E/g;
            if ($found != 1) { push @unknown, $name; next; }
            my $nothing = pack("H*", $nothing{length $store});
            $code =~ s/\Q$store$behind\E/$nothing$behind/;
        }
        open(my $out, ">:raw", $file) or die "$file: $!\n";
        print $out $code;
        close($out) or die "$file: $!\n";
        print "@unknown";
    ' "$program" > "$program.unknown"
    [[ ! -s $program.unknown ]] ||
        warn "this build of QEMU is not the one that _mend_qemu knows ($(< "$program.unknown")): now and then a guest in the virtual host may hang or die (docs/decisions/0012-qemu-of-its-own.md)"
    rm "$program.unknown"
}
