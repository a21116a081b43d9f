//! Bad input: each is a message with the value and the next step, exit status 1 or 2, and nothing half-made left behind.

use super::lun::{
    assert_nothing_left, configfs, create_on_loopback, daemon, daemon_pid, delete, names, start_daemon,
};
use super::{Run, Test};
use anyhow::{Result, ensure};

pub const TESTS: &[Test] = &[
    Test {
        name: "refuse.check-host",
        promise: "check-host says what this host can do, before the modules are loaded and after",
        limit: 60,
        group: Some("refuse"),
        run: check_host,
    },
    Test {
        name: "refuse.no-daemon",
        promise: "without a daemon, create fails with the next step, hangs nothing and leaves nothing",
        limit: 120,
        group: Some("refuse"),
        run: no_daemon,
    },
    Test {
        name: "refuse.wrong-words",
        promise: "wrong paths, images, sizes, names and options are refused, and nothing is left in configfs",
        limit: 240,
        group: Some("refuse"),
        run: wrong_words,
    },
    Test {
        name: "refuse.second-call",
        promise: "create is idempotent, and delete refuses while the disk is in use",
        limit: 120,
        group: Some("refuse"),
        run: second_call,
    },
];

fn check_host(run: &mut Run<'_>) -> Result<()> {
    let guest = &mut *run.guest;
    let bare = guest.try_sh("tcmu-dif check-host --json")?;
    serde_json::from_str::<serde_json::Value>(&bare.stdout)?;
    guest.sh("modprobe -a target_core_user tcm_loop vhost_scsi")?;
    let text = guest.sh("tcmu-dif check-host")?;
    for part in ["target_core_user", "vhost", "io_uring"] {
        ensure!(text.contains(part), "nothing about {part}:\n{text}");
    }
    guest.json("tcmu-dif check-host --json").map(drop)
}

fn no_daemon(run: &mut Run<'_>) -> Result<()> {
    let guest = &mut *run.guest;
    guest.sh("modprobe -a target_core_user tcm_loop vhost_scsi && truncate -s 16M /scratch/lonely.raw")?;
    let refused =
        guest.try_sh("timeout 30 tcmu-dif create lonely --image /scratch/lonely.raw --export loopback")?;
    ensure!(refused.status == Some(1), "{refused:?}");
    ensure!(refused.stderr.contains("daemon") && refused.stderr.contains("next:"), "{}", refused.stderr);
    assert_nothing_left(guest)?;
    guest.sh("rm /scratch/lonely.raw").map(drop)
}

/// What is wrong, the words of the command line, the exit status, and what the message must hold.
const WRONG: &[(&str, &str, i32, &str)] = &[
    ("a path that is not there", "create w --image /scratch/nowhere.raw", 1, "/scratch/nowhere.raw"),
    ("a directory", "create w --image /scratch", 1, "/scratch"),
    ("an image that a LUN has", "create w --image /scratch/good.raw", 1, "/scratch/good.raw"),
    ("an image that QEMU has", "create w --image /scratch/locked.qcow2", 1, "/scratch/locked.qcow2"),
    ("an unknown option", "create w --image /scratch/free.raw --sise 3", 2, "--sise"),
    ("no image", "create w", 2, "--image"),
    (
        "a size that is no multiple of the block size",
        "create w --image /scratch/new.raw --size 1000",
        2,
        "1000",
    ),
    (
        "an image whose size is no multiple of the block size",
        "create w --image /scratch/odd.raw --block-size 4096",
        1,
        "/scratch/odd.raw",
    ),
    ("a block size that is none", "create w --image /scratch/free.raw --block-size 520", 2, "520"),
    ("a PI type that is none", "create w --image /scratch/free.raw --pi type9", 2, "type9"),
    ("a corrupt header", "create w --image /scratch/corrupt.qcow2", 1, "/scratch/corrupt.qcow2"),
    ("a backing file that is missing", "create w --image /scratch/orphan.qcow2", 1, "gone.raw"),
    ("a backing file that loops", "create w --image /scratch/loop.qcow2", 1, "loop.qcow2"),
    ("an incompatible feature bit", "create w --image /scratch/future.qcow2", 1, "/scratch/future.qcow2"),
    ("a name with a slash", "create a/b --image /scratch/free.raw", 2, "a/b"),
    ("an empty name", "create '' --image /scratch/free.raw", 2, ""),
    ("a wwn that is none", "create w --image /scratch/free.raw --export vhost:naa.xyz", 2, "naa.xyz"),
    ("a fabric that is none", "create w --image /scratch/free.raw --export pigeon", 2, "pigeon"),
    ("a LUN that is not there", "delete nobody", 1, "nobody"),
    ("a LUN that is not there", "resize nobody 32M", 1, "nobody"),
    ("a LUN that is not there", "show nobody", 1, "nobody"),
];

const WRONG_IMAGES: &str = r#"
cd /scratch
truncate -s 16M free.raw
qemu-img create -q -f qcow2 locked.qcow2 16M
truncate -s 16777000 odd.raw
qemu-img create -q -f qcow2 corrupt.qcow2 16M
printf '\377\377\377\377\377\377\377\377' | dd of=corrupt.qcow2 bs=1 seek=40 conv=notrunc status=none
qemu-img create -q -f raw gone.raw 16M
qemu-img create -q -f qcow2 -b /scratch/gone.raw -F raw orphan.qcow2
rm gone.raw
qemu-img create -q -f qcow2 loop.qcow2 16M
qemu-img create -q -f qcow2 -b /scratch/loop.qcow2 -F qcow2 loop2.qcow2
qemu-img rebase -u -f qcow2 -b /scratch/loop2.qcow2 -F qcow2 loop.qcow2
qemu-img create -q -f qcow2 future.qcow2 16M
printf '\200' | dd of=future.qcow2 bs=1 seek=72 conv=notrunc status=none
# It reads a block when it has opened the image, and keeps it open until its standard input ends. Nobody else opens the image
# meanwhile: a second reader could keep it from its lock.
(setsid sh -c "echo 'read 0 512'; exec sleep 900" | setsid qemu-io -f qcow2 locked.qcow2 > qemu-io.log 2>&1 &)
for _ in $(seq 900); do
    ! grep -q 'read 512' qemu-io.log || exit 0
    sleep 0.1
done
echo 'qemu-io did not open the image:' >&2
cat qemu-io.log >&2
exit 1
"#;

fn wrong_words(run: &mut Run<'_>) -> Result<()> {
    let guest = &mut *run.guest;
    start_daemon(guest, "auto")?;
    create_on_loopback(guest, "good", "--image /scratch/good.raw --size 16M --format raw")?;
    guest.sh(WRONG_IMAGES)?;
    let before = configfs(guest)?;
    let mut complaints = Vec::new();
    for (what, words, status, part) in WRONG {
        let said = guest.try_sh(&format!("timeout 30 tcmu-dif {words}"))?;
        if said.status != Some(*status) {
            complaints.push(format!("{what}: exit {:?} instead of {status}: {}", said.status, said.stderr));
        } else if !said.stderr.contains(part) {
            complaints.push(format!("{what}: the message does not name {part:?}: {}", said.stderr));
        } else if *status == 1 && !said.stderr.contains("  next: ") {
            complaints.push(format!("{what}: the message names no next step: {}", said.stderr));
        }
        if configfs(guest)? != before {
            complaints.push(format!("{what}: something half-made is left in configfs"));
        }
    }
    let new = guest.try_sh(
        "ls /scratch/new.raw /scratch/*.raw.pi 2>/dev/null || true; chmod 666 /scratch/free.raw; \
        setpriv --reuid=nobody --clear-groups tcmu-dif create w --image /scratch/free.raw 2>&1 >/dev/null",
    )?;
    if new.status != Some(1) || !new.stdout.contains("root") || new.stdout.contains("/scratch/new.raw\n") {
        complaints.push(format!("not root, or a file left over: {new:?}"));
    }
    ensure!(complaints.is_empty(), "{}", complaints.join("\n"));
    ensure!(names(guest)? == ["good"]);
    daemon_pid(guest)?;
    delete(guest, "good")?;
    assert_nothing_left(guest)?;
    guest.sh("pkill -x qemu-io; pkill -x sleep; rm -f /scratch/*.raw /scratch/*.qcow2").map(drop)
}

fn second_call(run: &mut Run<'_>) -> Result<()> {
    let guest = &mut *run.guest;
    daemon(guest)?;
    let words = "--image /scratch/twice.raw --size 64M --format raw --pi type1 --export loopback:naa.5001405000000041";
    let first = create_on_loopback(guest, "twice", words)?;
    let tree = configfs(guest)?;
    let second = create_on_loopback(guest, "twice", words)?;
    ensure!(first.report["created"] == true && second.report["created"] == false, "{}", second.report);
    ensure!(second.device == first.device && second.report["serial"] == first.report["serial"]);
    ensure!(configfs(guest)? == tree, "a second create changed configfs");
    let other = guest.try_sh("tcmu-dif create twice --image /scratch/another.raw --size 64M")?;
    ensure!(other.status == Some(1), "another LUN of the same name: {other:?}");

    guest.sh(&format!("mkfs.ext4 -q -F {0} && mkdir -p /mnt && mount {0} /mnt", first.device))?;
    let refused = guest.try_sh("timeout 30 tcmu-dif delete twice")?;
    ensure!(refused.status == Some(1), "a mounted disk was deleted: {refused:?}");
    ensure!(refused.stderr.contains(&first.device) || refused.stderr.contains("use"), "{}", refused.stderr);
    guest.sh("echo still there > /mnt/file && sync && umount /mnt")?;
    delete(guest, "twice")?;
    assert_nothing_left(guest)?;
    guest.sh("rm -f /scratch/twice.raw /scratch/twice.raw.pi").map(drop)
}
