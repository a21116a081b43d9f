#!/bin/busybox sh
# The initramfs of the guest inside the guest: its root is the outer guest's own, read-only over 9p, and what it does stands in
# /scratch/inner.sh there.
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
for module in /modules/*.ko; do
    /bin/busybox insmod "$module" || echo "inner: cannot load $module"
done
/bin/busybox mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=262144,cache=loose outer /newroot || echo "inner: no root"
for dir in dev proc sys; do
    /bin/busybox mount --move /$dir /newroot/$dir
done
exec /bin/busybox switch_root /newroot /bin/bash /scratch/inner.sh
