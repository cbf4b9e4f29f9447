#!/bin/sh
# The first process: the kernel starts it, it sets the machine up and hands over to busybox init, which
# keeps what /etc/inittab names running. Here and below, what the shell can do by itself it does: each process
# costs milliseconds of a boot that is to take a moment.
export PATH=/bin
# Already there when the kernel or an initrd mounted it.
[ -c /dev/null ] || mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -a
mkfifo /run/imds /run/waiting
exec init
