# Process 1 of the guest: mounts what a test needs, and then either serves the host or gives a person a shell.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
if grep -qw systemd /proc/cmdline; then
    # systemd mounts the rest. tcmu-dif is to come from its package.
    mount -t ext4 /dev/vdb /scratch
    tar -xf /dev/vdc -C /usr/local/bin ./xtask
    cat > /etc/systemd/system/guest-agent.service <<'END'
[Unit]
Description=Runs the host's scripts
After=multi-user.target

[Service]
Environment=HOME=/root LANG=C.UTF-8
WorkingDirectory=/root
ExecStart=/usr/local/bin/xtask guest-agent
# What a script has left running is the script's affair.
KillMode=process

[Install]
WantedBy=multi-user.target
END
    mkdir -p /etc/systemd/system/multi-user.target.wants
    ln -sf ../guest-agent.service /etc/systemd/system/multi-user.target.wants/
    # A test begins without the other daemon, as every test does.
    ln -sf /dev/null /etc/systemd/system/tcmu-runner.service
    exec /lib/systemd/systemd
fi
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp
mkdir -p /dev/shm /dev/pts /run/lock
mount -t tmpfs tmpfs /dev/shm
mount -t devpts devpts /dev/pts
mount -t ext4 /dev/vdb /scratch
modprobe configfs && mount -t configfs configfs /sys/kernel/config
mountpoint -q /sys/kernel/debug || mount -t debugfs debugfs /sys/kernel/debug
ln -sf /proc/self/fd /dev/fd
hostname guest
ip link set lo up
echo 60 > /proc/sys/kernel/hung_task_timeout_secs
# What udev would load for a SCSI disk.
modprobe -a sd_mod sg
tar -xf /dev/vdc -C /usr/local/bin
# Who asks for tcmu-runner's name would have the bus start one, beside that which a test has started: the second to come ends at the first one's lock.
rm -f /usr/share/dbus-1/system-services/org.kernel.TCMUService1.service
cd /root
if grep -qw shell /proc/cmdline; then
    setsid --ctty bash -i < /dev/ttyS0 > /dev/ttyS0 2>&1
else
    /usr/local/bin/xtask guest-agent > /dev/ttyS0 2>&1 &
    wait $!
fi
sync
echo o > /proc/sysrq-trigger
sleep 60
