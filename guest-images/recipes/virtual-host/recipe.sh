# What scripts/virtual-host boots: a bare Debian with KVM, cgroup v2 and nftables, as a user's own box
# would have them. Nothing of Roost is in it: that comes on a payload disk.
# shellcheck shell=bash disable=SC2034

PACKAGES=(systemd-sysv udev kmod dbus procps openssh-server openssh-client iproute2 nftables iputils-ping
    ca-certificates jq socat curl e2fsprogs)
# Sparse: the room is for what runs in it, on a throw-away layer.
ROOT_SIZE=4G
# The host's modules are part of the root, so the root belongs to one kernel.
KERNELS_ALLOWED=debian
DESCRIPTION='The virtual host: Debian 12 with KVM, for tests and for boxes without usable KVM'
BOOT_ARGS='console=ttyS0 quiet loglevel=4 panic=1 root=/dev/vda rw net.ifnames=0 cgroup_no_v1=all systemd.show_status=false'

recipe_root() {
    local root=$1 work=$2
    bootstrap "$root" "$work" "${PACKAGES[@]}"
    mkdir -p "$root/usr/lib/modules" "$root/opt/roost" "$root/var/lib/roost"
    cp -a "$kernel_dir"/modules/* "$root/usr/lib/modules/"
}

recipe_finish() {
    local root=$1 unit
    echo virtual-host > "$root/etc/hostname"
    printf '127.0.0.1 localhost\n127.0.1.1 virtual-host\n' > "$root/etc/hosts"
    : > "$root/etc/machine-id"
    rm -f "$root"/etc/ssh/ssh_host_* "$root/etc/resolv.conf"
    echo 'nameserver 192.0.2.3' > "$root/etc/resolv.conf"
    : > "$root/etc/fstab"
    for unit in apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service \
        fstrim.timer getty@tty1.service serial-getty@ttyS0.service systemd-update-utmp.service systemd-pstore.service \
        systemd-networkd.service systemd-networkd.socket systemd-tmpfiles-clean.timer nftables.service \
        modprobe@.service kmod-static-nodes.service sys-kernel-debug.mount sys-kernel-tracing.mount \
        sys-kernel-config.mount sys-fs-fuse-connections.mount dev-mqueue.mount systemd-logind.service \
        systemd-random-seed.service systemd-binfmt.service proc-sys-fs-binfmt_misc.automount \
        systemd-ask-password-wall.path systemd-ask-password-console.path systemd-user-sessions.service \
        systemd-hwdb-update.service systemd-journal-catalog-update.service systemd-journal-flush.service \
        systemd-machine-id-commit.service systemd-firstboot.service systemd-sysusers.service ldconfig.service; do
        ln -sf /dev/null "$root/etc/systemd/system/$unit"
    done
    local wants=$root/etc/systemd/system/multi-user.target.wants
    mkdir -p "$wants"
    ln -sf ../roost-host.service ../roost-host-ready.service "$wants/"
    ln -sf /lib/systemd/system/ssh.service "$wants/"
    ln -sf /lib/systemd/system/multi-user.target "$root/etc/systemd/system/default.target"
}
