# tiny: busybox and one init script, for tests and lessons. Everything it does stands in rootfs/init.sh.
# shellcheck shell=bash disable=SC2034

PACKAGES=()
ONLY_PACKAGES=(busybox-static)
# The smallest journal that ext4 takes (1 MiB) is worth having: tests pull the plug.
ROOT_SIZE=3840K
MKE2FS=(-b 1024 -N 400 -J size=1 -O '^resize_inode,^metadata_csum,^64bit')
DEFAULT_USER=root
SSH=false
OWNER=root
DESCRIPTION='BusyBox in under 4 MB: boots in a moment, for tests and lessons; no password, no ssh'
BOOT_ARGS='console=ttyS0 root=/dev/vda rw rootfstype=ext4 quiet loglevel=4 panic=1 memhp_default_state=online_movable init=/init.sh'

recipe_root() {
    local root=$1 work=$2 applet
    mkdir -p "$root"/{bin,dev,etc,proc,run,sys,tmp,root,var/lib,www}
    ln -s bin "$root/sbin"
    dpkg-deb -x "$work"/debs/busybox-static_*.deb "$work/busybox"
    cp "$work/busybox/bin/busybox" "$root/bin/busybox"
    # Its own list of names; a link each, as `busybox --install -s` would make at every boot.
    "$root/bin/busybox" --list | while read -r applet; do [[ $applet == busybox ]] || ln -s busybox "$root/bin/$applet"; done
    ln -s /proc/self/mounts "$root/etc/mtab"
    echo 'root::0:0:root:/root:/bin/sh' > "$root/etc/passwd"
    echo 'root:x:0:' > "$root/etc/group"
    echo tiny > "$root/etc/hostname"
    printf '127.0.0.1 localhost\n' > "$root/etc/hosts"
    chmod 1777 "$root/tmp"
}

recipe_inputs() { hash_files "$SHARED"; }
recipe_finish() { install -m 755 "$SHARED/user-data" "$1/usr/lib/roost/user-data"; }
