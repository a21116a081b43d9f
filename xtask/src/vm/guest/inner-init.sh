#!/bin/busybox sh
# The initramfs of the guest inside the guest, which is all that it has: the outer guest adds the programs and what is to be done.
/bin/busybox --install -s /bin
export PATH=/bin:/usr/sbin:/usr/bin:/sbin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
for module in /modules/*.ko; do
    insmod "$module" || echo "inner: cannot load $module"
done
exec sh /inner.sh
