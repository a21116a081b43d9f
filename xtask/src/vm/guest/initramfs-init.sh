#!/bin/busybox sh
# The initramfs: finds the root file system and the host's share, and hands over to the init script that lies there.
# With `probe` on the command line it only says that the kernel came up.
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
if /bin/busybox grep -qw probe /proc/cmdline; then
    echo "tcmu-dif probe: up" > /dev/ttyS0
    echo o > /proc/sysrq-trigger
    /bin/busybox sleep 60
fi
for module in /modules/*.ko; do
    /bin/busybox insmod "$module" || echo "initramfs: cannot load $module"
done
/bin/busybox mount -t ext4 /dev/vda /newroot || echo "initramfs: no root file system"
/bin/busybox mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144 host /newroot/host || echo "initramfs: no share"
for dir in dev proc sys; do
    /bin/busybox mount --move /$dir /newroot/$dir
done
exec /bin/busybox switch_root /newroot /bin/bash /host/init.sh
