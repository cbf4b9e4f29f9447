# debian-12: Debian as one expects it on a server, without what takes time at boot. First boot makes the machine id and the
# ssh host key; Debian's own cloud-init asks the metadata service for host name, keys and user data.
#
# debian-12-fast: without cloud-init; a script of ours (rootfs/usr/lib/roost/init) does that part, and runs user data that
# is a script.
# shellcheck shell=bash disable=SC2034

PACKAGES=(systemd-sysv udev dbus procps openssh-server sudo iproute2 iputils-ping e2fsprogs ca-certificates
    netbase less curl)
ROOT_SIZE=900M
# Inode tables of a grown file system are written lazily; 16 MiB of journal are enough for small volumes.
MKE2FS=(-J size=16 -i 8192)
DEFAULT_USER=debian
DESCRIPTION='Debian 12 (bookworm), minimal, with ssh'
# A boot log that can be read, without colours: whoever reads the console may have no terminal.
BOOT_ARGS='console=ttyS0 root=/dev/vda rw rootfstype=ext4 quiet loglevel=4 panic=1 memhp_default_state=online_movable net.ifnames=0 systemd.show_status=true TERM=dumb'
VARIANTS=(fast)
if [[ -z $VARIANT ]]; then
    PACKAGES+=(cloud-init) ROOT_SIZE=1200M MIN_VOLUME_GIB=2 DESCRIPTION='Debian 12 (bookworm), minimal, with ssh and cloud-init'
fi

recipe_inputs() { guest_sources; hash_files "$SHARED"; }

recipe_root() {
    bootstrap "$1" "$2" "${PACKAGES[@]}"
}

recipe_finish() {
    local root=$1 unit wants=$1/etc/systemd/system/multi-user.target.wants
    echo debian > "$root/etc/hostname"
    printf '127.0.0.1 localhost\n::1 localhost ip6-localhost\n' > "$root/etc/hosts"
    : > "$root/etc/fstab"
    # Empty, not missing: systemd fills it in without going through a "first boot".
    : > "$root/etc/machine-id"
    rm -f "$root"/etc/ssh/ssh_host_* "$root/etc/resolv.conf" "$root/var/lib/dbus/machine-id"
    ln -s /etc/machine-id "$root/var/lib/dbus/machine-id"
    : > "$root/etc/resolv.conf"
    guest_sources > "$root/etc/apt/sources.list"
    rm -rf "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/*.bin "$root"/var/log/{apt,dpkg.log,alternatives.log,bootstrap.log}

    chroot "$root" useradd --create-home --shell /bin/bash --comment Debian debian
    # Times in shadow(5) are days: the day of the build must not show.
    sed -i "s/^\([^:]*:[^:]*\):[0-9]*:/\1:$((SOURCE_DATE_EPOCH / 86400)):/" "$root/etc/shadow"
    rm -f "$root"/etc/{passwd,group,shadow,gshadow,subuid,subgid}-
    echo 'debian ALL=(ALL) NOPASSWD: ALL' > "$root/etc/sudoers.d/debian"
    chmod 440 "$root/etc/sudoers.d/debian"

    # What costs seconds on a small machine and serves nobody here.
    for unit in apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service \
        fstrim.timer getty@tty1.service serial-getty@.service getty-static.service systemd-pstore.service modprobe@.service \
        kmod-static-nodes.service sys-kernel-debug.mount sys-kernel-tracing.mount sys-kernel-config.mount \
        sys-fs-fuse-connections.mount dev-mqueue.mount dev-hugepages.mount systemd-binfmt.service \
        proc-sys-fs-binfmt_misc.automount systemd-ask-password-wall.path systemd-ask-password-console.path \
        systemd-update-utmp.service systemd-update-utmp-runlevel.service systemd-modules-load.service \
        systemd-networkd-wait-online.service; do
        ln -sf /dev/null "$root/etc/systemd/system/$unit"
    done
    mkdir -p "$wants"
    for unit in ssh systemd-networkd; do ln -sf "/lib/systemd/system/$unit.service" "$wants/"; done
    for unit in roost-console roost-grow roost-ready; do ln -sf "../$unit.service" "$wants/"; done
    ln -sf /lib/systemd/system/multi-user.target "$root/etc/systemd/system/default.target"
    if [[ -z $VARIANT ]]; then
        rm "$root/etc/systemd/system/roost-init.service" "$root/etc/systemd/system/roost-user-data.service" "$root/usr/lib/roost/init"
        # One source in the list: cloud-init asks it without first guessing from SMBIOS where it is.
        cat > "$root/etc/cloud/cloud.cfg.d/90-roost.cfg" << 'CFG'
datasource_list: [ Ec2 ]
datasource:
  Ec2:
    strict_id: false
    metadata_urls: [ 'http://169.254.169.254' ]
    apply_full_imds_network_config: false
network: {config: disabled}
# The archive that the image was built from.
apt: {preserve_sources_list: true}
# The one locale that is there: the default one would have to be generated first.
locale: C.UTF-8
# The instance's own name resolves, or sudo complains each time.
manage_etc_hosts: localhost
ssh_genkeytypes: [ ed25519 ]
# Made before the network is up and said on the console (roost-host-keys.service); made anew for a copied disk below.
ssh_deletekeys: false
CFG
        install -d "$root/var/lib/cloud/scripts/per-instance"
        cat > "$root/var/lib/cloud/scripts/per-instance/roost-host-keys" << 'SCRIPT'
#!/bin/sh
# A disk that was copied from another instance has that one's host key.
mkdir -p /var/lib/roost
if [ -s /var/lib/roost/instance-id ]; then
    /usr/lib/roost/host-keys new
    systemctl try-restart --no-block ssh.service
fi
cp /var/lib/cloud/data/instance-id /var/lib/roost/instance-id
SCRIPT
        chmod 755 "$root/var/lib/cloud/scripts/per-instance/roost-host-keys"
    else
        install -m 755 "$SHARED/user-data" "$root/usr/lib/roost/user-data"
        for unit in roost-init roost-user-data; do ln -sf "../$unit.service" "$wants/"; done
        rm -rf "$root/etc/cloud"
    fi
}
