#!/bin/sh
# The first process: the kernel starts it, it sets the machine up and hands over to busybox init, which
# keeps what /etc/inittab names running.
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
# Already there when the kernel or an initrd mounted it.
grep -q ' /dev devtmpfs' /proc/mounts || mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs -o mode=755 run /run
mount -t tmpfs -o mode=1777 tmp /tmp
exec init
