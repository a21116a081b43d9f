//! A guest inside the guest: QEMU with `vhost-scsi-pci,t10_pi=on`, whose kernel makes and checks the PI of our LUN.
//!
//! Emulated twice it takes minutes, so these tests are run at full scale, or when they are named.

use super::lun::{assert_image_clean, assert_nothing_left, create, delete, start_daemon};
use super::pi::load_patched_module;
use super::{Run, Test};
use anyhow::{Context, Result, ensure};
use std::time::Duration;

pub const TESTS: &[Test] = &[
    Test {
        name: "pi.guest-type1",
        promise: "a guest's kernel makes and checks type 1 PI on our LUN: mkfs, verified writes, reboot, everything still there",
        limit: 1800,
        group: None,
        run: |run| guest(run, 1),
    },
    Test {
        name: "pi.guest-type3",
        promise: "a guest's kernel makes and checks type 3 PI on our LUN: mkfs, verified writes, reboot, everything still there",
        limit: 1800,
        group: None,
        run: |run| guest(run, 3),
    },
];

/// A processor without cmpxchg16b: the instruction goes wrong where an emulator runs in an emulator (a double fault in the
/// allocator, with rubbish for flags), and Linux does without it where it isn't there.
const INNER_CPU: &str = "qemu64,-cx16";

/// QEMU with an inner guest that has so many MiB and runs `/scratch/inner.sh`, which [`PACK`] has packed: the words to which its disk and its console are added.
pub(super) fn qemu(mebibytes: u32) -> String {
    format!(
        "qemu-system-x86_64 -accel tcg,thread=single -cpu {INNER_CPU} -smp 1 -m {mebibytes} -nographic -nodefaults -no-reboot \
         -object memory-backend-memfd,id=memory,size={mebibytes}M,share=on -machine memory-backend=memory \
         -kernel /host/inner-vmlinux -initrd /scratch/inner-initramfs \
         -append 'console=ttyS0 panic=-1 norandmaps cryptomgr.notests mitigations=off apparmor=0 no5lvl tsc=reliable random.trust_cpu=on'"
    )
}

/// How often the inner guest may die before it reaches user space.
pub(super) const BOOTS: u32 = 3;

const WWPN: &str = "naa.5001405000000041";

/// What the inner guest does in its first and its second life. It reboots in the end, which ends QEMU. Its shell and small programs are
/// busybox's: starting any other takes seconds there.
const INNER: &str = r#"
say() { echo "inner: $1 ($(cut -d' ' -f1 /proc/uptime) s)"; }
fail() { say "FAILED: $1"; dmesg | tail -n 20; }
mkdir -p /tmp /mnt
say "user space"
work() {
    for _ in $(seq 300); do [ -b /dev/sda ] && break; sleep 0.1; done
    dmesg | grep -E 'Enabling DI[FX]'
    if [ "$(cat /sys/block/sda/integrity/write_generate)" != 1 ]; then fail "the block layer makes no PI"; return; fi
    if [ "$LIFE" = 1 ]; then
        mkfs.ext4 -q -F /dev/sda || { fail mkfs; return; }
        say "mkfs is done"
        mount -t ext4 /dev/sda /mnt || { fail mount; return; }
        fio --name=job --directory=/mnt --size=2M --rw=randwrite --bs=4k --ioengine=psync --direct=1 \
            --verify=crc32c --verify_fatal=1 --randseed=7 > /tmp/fio.log 2>&1 || { tail -n 20 /tmp/fio.log; fail fio; return; }
        say "fio is done"
        head -c 500000 /usr/bin/fio > /mnt/file
        (cd /mnt && sha256sum file job.0.0 > sums)
    else
        e2fsck -fn /dev/sda || { fail fsck; return; }
        say "fsck is done"
        mount -t ext4 /dev/sda /mnt || { fail mount; return; }
        (cd /mnt && sha256sum -c sums) || { fail "what was written is not there"; return; }
    fi
    sync
    umount /mnt || { fail umount; return; }
    if dmesg | grep -iE 'i/o error|guard|protection error|ref tag'; then fail "errors in the log"; return; fi
    say "done with life $LIFE"
}
work
echo b > /proc/sysrq-trigger
sleep 60
"#;

/// Packs the programs that the inner guest runs, with what they are linked with, into an initramfs that begins with the prepared one.
/// What is to be done there is in `/scratch/inner.sh`.
pub(super) const PACK: &str = r#"
rm -rf /scratch/inner; mkdir -p /scratch/inner
for program in /usr/sbin/mkfs.ext4 /usr/sbin/e2fsck /usr/bin/fio; do
    for file in $program $(ldd $program | grep -o '/[^ ]*'); do
        mkdir -p /scratch/inner$(dirname $file)
        cp -L $file /scratch/inner$file
    done
done
mkdir -p /scratch/inner/etc && cp /etc/mke2fs.conf /scratch/inner/etc/
cp /scratch/inner.sh /scratch/inner/
(cd /scratch/inner && find . -mindepth 1 | cpio --create --format=newc --quiet) > /scratch/inner.cpio
cat /host/inner-initramfs /scratch/inner.cpio > /scratch/inner-initramfs
"#;

fn guest(run: &mut Run<'_>, pi: u8) -> Result<()> {
    let guest = &mut *run.guest;
    load_patched_module(guest)?;
    start_daemon(guest, "auto")?;
    let image = "/scratch/inner.raw";
    create(
        guest,
        "inner",
        &format!("--image {image} --size 96M --pi type{pi} --exposure initiator --export vhost:{WWPN}"),
    )?;
    let limit = 800 * super::super::guest::patience();
    for life in [1, 2] {
        let script = format!("LIFE={life}\n{INNER}");
        guest.sh(&format!("cat > /scratch/inner.sh <<'END'\n{script}\nEND\n{PACK}"))?;
        let qemu = format!(
            "timeout {limit} {} -device vhost-scsi-pci,wwpn={WWPN},t10_pi=on -serial file:/scratch/inner-{life}.log 2> /scratch/inner-qemu.log",
            qemu(512)
        );
        let mut attempt = 1;
        let (ended, said) = loop {
            // What it says comes on the outer console too, so that one can see how far it is.
            let log = format!("/scratch/inner-{life}.log");
            let watched = format!("truncate -s 0 {log}; tail -F {log} > /dev/console 2>&1 & {qemu}");
            let ended = guest.run(&watched, true, Duration::from_secs(820))?;
            let said = guest
                .sh(&format!("cat /scratch/inner-{life}.log | tr -d '\\r'; cat /scratch/inner-qemu.log"))?;
            let log = format!("inner-{life}.{attempt}.log");
            std::fs::write(guest.logs().join(&log), &said).with_context(|| format!("cannot keep {log}"))?;
            // A kernel that dies before user space has not seen our LUN: an emulator in an emulator does that.
            if said.contains("inner: user space") || attempt == BOOTS {
                break (ended, said);
            }
            guest.note(format!(
                "type {pi}, life {life}: boot {attempt} died in the emulator, and was repeated"
            ));
            attempt += 1;
        };
        ensure!(
            ended.ok() && said.contains(&format!("inner: done with life {life}")),
            "life {life} of the guest ended with {:?}:\n{}",
            ended.status,
            crate::sh::last_lines(&said, 30)
        );
        for line in ["Enabling DIX T10-DIF-TYPE", &format!("Enabling DIF Type {pi} protection")] {
            ensure!(said.contains(line), "the guest's kernel does not say {line:?}:\n{said}");
        }
    }
    delete(guest, "inner")?;
    assert_nothing_left(guest)?;
    assert_image_clean(guest, image, "raw", true)
}
