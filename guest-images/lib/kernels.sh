# Kernels. Each is a folder of the cache with:
#   kernel        what boots: a 64-bit ELF vmlinux with a PVH entry
#   bzImage       the packaged form, for monitors that want one (debian only)
#   initrd        what a guest needs from it before its root (debian only; fast has everything built in)
#   initrd-host   the same for the virtual host (debian only)
#   modules/      all its modules (debian only)
#   release       as uname -r says
#   System.map    where its functions are (fast only)
#
# shellcheck shell=bash

KERNELS=$ROOST_ROOT/guest-images/kernels

# What Debian's cloud kernel has as modules and a guest needs: disk, network, entropy, power button,
# vsock, balloon, memory that comes later; virtio-mmio for Roost's monitor, virtio-pci for others.
GUEST_MODULES=(virtio_mmio virtio_pci virtio_blk virtio_net virtio_rng evdev button crc32c_intel
    virtio_balloon virtio_mem vmw_vsock_virtio_transport)
HOST_MODULES=(virtio_pci virtio_blk virtio_rng crc32c_intel overlay)

kernel_key() {
    local image
    case $1 in
    debian)
        image=$(package_behind linux-image-cloud-amd64 '^linux-image-[0-9].*-cloud-amd64$')
        { packages_resolve_only "$image" busybox-static
          echo "${GUEST_MODULES[@]} / ${HOST_MODULES[@]}"
          hash_files "$KERNELS/initrd-init" "$ROOST_ROOT/guest-images/lib/initrd.sh" "$ROOST_ROOT/guest-images/lib/kernels.sh"; } | hash_key
        ;;
    fast)
        { packages_resolve_only linux-source-6.1
          hash_files "$KERNELS/fast.config" "$KERNELS/bss.patch"; } | hash_key
        ;;
    *) die "no kernel '$1': debian or fast" ;;
    esac
}

# Prints the kernel's folder, building it first where needed.
kernel_folder() {
    local name=$1 key
    key=$(kernel_key "$name")
    cache_entry kernels "$name" "$key" "_build_kernel_$name"
}

_build_kernel_debian() {
    local out=$1 work image release tree
    work=$(mktemp -d "$CACHE/.work-XXXXXX")
    at_end rm -rf "$work"
    image=$(package_behind linux-image-cloud-amd64 '^linux-image-[0-9].*-cloud-amd64$')
    packages_resolve_only "$image" busybox-static > "$work/list"
    packages_fetch "$work/list" "$work/debs"
    dpkg-deb -x "$work"/debs/linux-image-*.deb "$work/kernel"
    dpkg-deb -x "$work"/debs/busybox-static_*.deb "$work/busybox"
    release=$(ls "$work/kernel/lib/modules")
    tree=$work/kernel/lib/modules/$release
    echo "$release" > "$out/release"
    cp "$work/kernel/boot/vmlinuz-$release" "$out/bzImage"
    cp "$work/kernel/boot/config-$release" "$out/config"
    extract_vmlinux "$out/bzImage" "$out/kernel"
    _make_initrd "$work" "$tree" "$out/initrd" "${GUEST_MODULES[@]}"
    _make_initrd "$work" "$tree" "$out/initrd-host" "${HOST_MODULES[@]}"
    /sbin/depmod -b "$work/kernel" "$release"
    mkdir "$out/modules"
    mv "$tree" "$out/modules/$release"
}

_make_initrd() {
    local work=$1 tree=$2 out=$3 root
    shift 3
    root=$work/initrd
    rm -rf "$root"
    mkdir -p "$root"/{bin,dev,proc,sys,newroot}
    cp "$work/busybox/bin/busybox" "$root/bin/busybox"
    local applet
    for applet in sh mount umount insmod cat echo usleep switch_root poweroff mkdir chmod; do ln -s busybox "$root/bin/$applet"; done
    cp "$KERNELS/initrd-init" "$root/init"
    copy_modules "$tree" "$root/modules" "$@"
    pack_cpio "$root" "$out"
}

# extract_vmlinux BZIMAGE OUT: the ELF file inside. Linux Documentation/x86/boot.rst: setup_sects at
# 0x1f1, payload_offset at 0x248 and payload_length at 0x24c, counted from the end of the setup sectors;
# the payload ends with its unpacked size, 4 bytes that are no part of the lz4 stream.
extract_vmlinux() {
    local setup offset length start
    setup=$(_u 1 0x1f1 "$1")
    offset=$(_u 4 0x248 "$1")
    length=$(_u 4 0x24c "$1")
    start=$(((setup + 1) * 512 + offset))
    head -c $((start + length - 4)) "$1" | tail -c +$((start + 1)) | lz4 -d -q > "$2"
    [[ $(head -c 4 "$2") == $'\x7fELF' ]] || die "$1 does not hold an lz4-compressed ELF kernel"
}

_u() { od -An -t "u$1" -j $(($2)) -N "$1" "$3" | tr -d ' '; }

# The kernel from Debian's own source with our options and one patch: some minutes, once.
_build_kernel_fast() {
    local out=$1 work source option
    work=$(mktemp -d "$CACHE/.work-XXXXXX")
    at_end rm -rf "$work"
    packages_resolve_only linux-source-6.1 > "$work/list"
    packages_fetch "$work/list" "$work/debs"
    dpkg-deb --fsys-tarfile "$work"/debs/linux-source-*.deb | tar -C "$work" -xf - ./usr/src/linux-source-6.1.tar.xz
    tar -C "$work" -xf "$work/usr/src/linux-source-6.1.tar.xz"
    rm "$work/usr/src/linux-source-6.1.tar.xz"
    source=$work/linux-source-6.1
    (
        cd "$source"
        # Nothing of this machine goes into the kernel: same source and options, same bytes.
        export KBUILD_BUILD_USER=roost KBUILD_BUILD_HOST=roost KBUILD_BUILD_VERSION=1 LC_ALL=C
        KBUILD_BUILD_TIMESTAMP=$(date -u -d "@$SOURCE_DATE_EPOCH" '+%a %b %e %H:%M:%S UTC %Y')
        export KBUILD_BUILD_TIMESTAMP
        patch -s -p1 -F0 --batch < "$KERNELS/bss.patch"
        make -s tinyconfig >/dev/null
        grep -v '^#' "$KERNELS/fast.config" | grep . > "$work/fragment"
        scripts/kconfig/merge_config.sh -m .config "$work/fragment" > /dev/null
        make -s olddefconfig
        # An option that did not take is a mistake in the fragment, found here and not in a guest.
        while read -r option; do
            case $option in
            *=n) ! grep -q "^${option%=n}=" .config || die "kernel option $option did not take: $(grep "^${option%=n}=" .config)" ;;
            *) grep -qxF "$option" .config || die "kernel option $option did not take: $(grep -w "${option%%=*}" .config || echo 'no such option, or what it depends on is off')" ;;
            esac
        done < "$work/fragment"
        step "compiling Linux $(make -s kernelversion) with $(grep -c '=y' .config) options (some minutes)"
        nice -n 19 make -s -j "$(nproc)" vmlinux
        strip -o "$out/kernel" vmlinux
        cp System.map "$out/"
        make -s kernelrelease > "$out/release"
        cp .config "$out/config"
    )
}
