//! tcmu-dif as a service: systemd is process 1, and the Debian package is installed.

use super::super::guest::Guest;
use super::lun::{assert_image_clean, names, show};
use super::{Run, Test, witness};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::time::Duration;

pub const TESTS: &[Test] = &[
    Test {
        name: "service.package",
        promise: "installed, the service serves the declared LUNs, also after a reboot: the same disk, by serial number, names and data",
        limit: 600,
        group: Some("service"),
        run: package,
    },
    Test {
        name: "service.restarts",
        promise: "under fio's verification at QD32 the service is restarted: no I/O error, no BUSY, no reset, nothing answered is lost or done twice; the pauses are told",
        limit: 900,
        group: Some("service"),
        run: restarts,
    },
    Test {
        name: "service.kills",
        promise: "under fio's verification at QD32 the daemon is killed and started again by systemd: no I/O error, no BUSY, no reset, nothing answered is lost or done twice",
        limit: 1500,
        group: Some("service"),
        run: kills,
    },
    Test {
        name: "service.watchdog",
        promise: "a daemon that hangs is ended and started again by systemd, and its LUN goes on",
        limit: 300,
        group: Some("service"),
        run: watchdog,
    },
    Test {
        name: "service.upgrade",
        promise: "the package is upgraded under load without an I/O error, and purged without a trace but what is the administrator's",
        limit: 600,
        group: Some("service"),
        run: upgrade,
    },
];

const DECLARED: &str =
    "image = \"/scratch/vm1.qcow2\"\npi = \"type1\"\ncpus = \"0-1\"\nexport = [\"loopback\"]\n";

/// Runs fio again and again on the LUN, with its own verification, until /tmp/enough is there; /tmp/load.txt ends with the rounds that
/// passed, and /tmp/lat.* say when each command ended.
const LOAD: &str = r#"
rm -f /tmp/enough /tmp/lat.*; cd /tmp; rounds=0
while [ ! -e /tmp/enough ]; do
    fio --name=load --filename=$1 --size=24M --rw=randwrite --bs=4k --direct=1 --ioengine=libaio --iodepth=32 --verify=crc32c \
        --do_verify=1 --verify_fatal=1 --randseed=$rounds --write_lat_log=/tmp/lat.$rounds --log_avg_msec=0 > /tmp/fio.txt 2>&1 || { echo failed; cat /tmp/fio.txt; exit 1; }
    rounds=$((rounds + 1))
done
echo "rounds $rounds"
"#;

/// Installs the package; the first test of the boot does it.
fn install(guest: &mut Guest) -> Result<()> {
    guest
        .sh("if ! systemctl is-active --quiet tcmu-dif; then
                 dpkg -i /host/tcmu-dif.deb
                 systemctl is-enabled --quiet tcmu-dif
             fi
             for _ in $(seq 300); do systemctl is-active --quiet tcmu-dif && exit 0; sleep 0.2; done
             systemctl status --no-pager tcmu-dif; journalctl --no-pager -u tcmu-dif | tail -n 40; exit 1")
        .context("the service is not up")
        .map(drop)
}

/// Waits until a LUN is online, and gives what `show` says of it.
fn wait_online(guest: &mut Guest, name: &str) -> Result<Value> {
    guest
        .sh(&format!(
            "for _ in $(seq 300); do
                 grep -q '\"state\": *\"online\"' <(tcmu-dif show {name} --json 2>/dev/null) && exit 0; sleep 0.2
             done
             tcmu-dif list; journalctl --no-pager -u tcmu-dif | tail -n 40; exit 1"
        ))
        .with_context(|| format!("{name} is not online"))?;
    show(guest, name)
}

/// The LUN `vm1` as it is declared, with its disk.
fn declared(guest: &mut Guest) -> Result<(Value, String)> {
    install(guest)?;
    guest.sh(&format!(
        "[ -e /scratch/vm1.qcow2 ] || tcmu-dif image create -f qcow2 /scratch/vm1.qcow2 256M
         if [ ! -e /etc/tcmu-dif/luns.d/vm1.toml ]; then
             printf '%s' '{DECLARED}' > /etc/tcmu-dif/luns.d/vm1.toml
             systemctl reload tcmu-dif
         fi"
    ))?;
    let lun = wait_online(guest, "vm1")?;
    let device = guest.sh(
        "for _ in $(seq 300); do
             d=$(tcmu-dif show vm1 --json | sed -n 's/.*\"device\": *\"\\([^\"]*\\)\".*/\\1/p'); [ -b \"$d\" ] && { echo $d; exit 0; }; sleep 0.2
         done; tcmu-dif show vm1; exit 1",
    )?;
    Ok((lun, device))
}

/// What makes a disk the same one.
fn identity(lun: &Value) -> (Value, Value) {
    (lun["serial"].clone(), lun["exports"][0]["wwn"].clone())
}

fn package(run: &mut Run<'_>) -> Result<()> {
    let guest = &mut *run.guest;
    let (lun, device) = declared(guest)?;
    ensure!(lun["io"] == "io_uring", "the sandbox keeps the daemon from io_uring: {lun}");
    let status = guest.sh("systemctl show -P StatusText tcmu-dif")?;
    ensure!(status.contains("1 LUN: 1 online"), "the status is {status:?}");
    guest.sh(&format!(
        "mkfs.ext4 -q -F {device} && mkdir -p /mnt && mount {device} /mnt && cp -r /usr/sbin /mnt/
         (cd /mnt && find sbin -type f -print0 | sort -z | xargs -0 sha256sum) > /root/sums && umount /mnt && sync"
    ))?;
    let fields = guest.sh("journalctl -u tcmu-dif LUN=vm1 --no-pager | wc -l")?;
    ensure!(fields.parse::<u32>()? > 0, "nothing in the journal has the field LUN=vm1");
    let before = identity(&lun);

    guest.reboot()?;
    let (lun, device) = declared(guest)?;
    ensure!(identity(&lun) == before, "before the reboot {before:?}, after it {lun}");
    guest.sh(&format!(
        "e2fsck -fn {device} && mount -o ro {device} /mnt && (cd /mnt && sha256sum --check --quiet /root/sums) && umount /mnt"
    ))?;
    // READY came after the LUN: whoever is ordered after the service finds the disk.
    let said =
        guest.sh("grep -oE 'declared, and made|ready: ' <(journalctl -b -u tcmu-dif -o cat --no-pager)")?;
    ensure!(
        said.lines().take(2).eq(["declared, and made", "ready: "]),
        "the service was ready before its LUN: {said}"
    );

    // Who has the disk open without mounting it, as QEMU does, keeps it: the daemon sees that from within its sandbox.
    guest.sh(&format!(
        "exec 9< {device}
         mv /etc/tcmu-dif/luns.d/vm1.toml /root/ && systemctl reload tcmu-dif
         for _ in $(seq 100); do grep -q \"declared no more, and still there: .*is open in process $$ \" <(journalctl -b -u tcmu-dif LUN=vm1 --no-pager) && break; sleep 0.2; done
         grep -q \"declared no more, and still there: .*is open in process $$ \" <(journalctl -b -u tcmu-dif LUN=vm1 --no-pager)
         dd if={device} of=/dev/null bs=4k count=1 iflag=direct status=none
         mv /root/vm1.toml /etc/tcmu-dif/luns.d/ && systemctl reload tcmu-dif
         exec 9<&-"
    ))?;
    // Stopped, the LUN waits; started, it is the same disk.
    guest.sh(&format!(
        "systemctl stop tcmu-dif; ! systemctl is-active --quiet tcmu-dif; [ -b {device} ]
         systemctl start tcmu-dif; dd if={device} of=/dev/null bs=4k count=1 iflag=direct status=none"
    ))?;
    ensure!(identity(&wait_online(guest, "vm1")?) == before, "another disk after stop and start");

    // What is declared no more goes, and comes back as the same disk only if somebody says which it is.
    guest.sh(
        "mv /etc/tcmu-dif/luns.d/vm1.toml /root/ && systemctl reload tcmu-dif
              for _ in $(seq 300); do tcmu-dif show vm1 > /dev/null 2>&1 || exit 0; sleep 0.2; done; exit 1",
    )?;
    ensure!(names(guest)?.is_empty(), "a LUN is left");
    assert_image_clean(guest, "/scratch/vm1.qcow2", "qcow2", true)?;
    guest.sh("printf 'image = \"/scratch/vm1.qcow2\"\\nnonsense = 1\\n' > /etc/tcmu-dif/luns.d/vm2.toml; systemctl reload tcmu-dif
              for _ in $(seq 100); do grep -q 'line 2: unknown field' <(journalctl -u tcmu-dif LUN=vm2 --no-pager) && break; sleep 0.2; done
              grep -q 'line 2: unknown field' <(journalctl -u tcmu-dif LUN=vm2 --no-pager)
              rm /etc/tcmu-dif/luns.d/vm2.toml; mv /root/vm1.toml /etc/tcmu-dif/luns.d/; systemctl reload tcmu-dif")?;
    wait_online(guest, "vm1").map(drop)
}

/// Starts the load: fio, and the witness behind it.
fn start_load(guest: &mut Guest, device: &str) -> Result<()> {
    std::fs::write(guest.share().join("load.sh"), LOAD)?;
    witness::start(guest, device, 32)?;
    guest
        .sh(&format!("setsid bash /host/load.sh {device} > /tmp/load.txt 2>&1 < /dev/null & sleep 2"))
        .map(drop)
}

/// Ends the load after its round; it met no error, nor did the kernel, and no initiator was told of a reset.
fn end_load(guest: &mut Guest, log: &str) -> Result<String> {
    let rounds = guest.sh_within(
        Duration::from_secs(240),
        "touch /tmp/enough; for _ in $(seq 1100); do grep -qE 'rounds|failed' /tmp/load.txt && break; sleep 0.2; done
         tail -n 30 /tmp/load.txt; grep -q rounds /tmp/load.txt",
    )?;
    let bad: Vec<&str> = log
        .lines()
        .filter(|line| {
            ["I/O error", "check failed", "Power-on or device reset", "BUSY", "reset"]
                .iter()
                .any(|w| line.contains(w))
                && line.contains("sd")
        })
        .collect();
    ensure!(bad.is_empty(), "at the initiator: {bad:#?}");
    witness::end(guest)?;
    Ok(rounds)
}

/// The longest times in which no command ended, so many of them: what initiators noticed. Least, median and most, in milliseconds; of a command that
/// ended, fio writes down when, counted from its own start.
fn pauses(guest: &mut Guest, count: u64) -> Result<String> {
    guest.sh_within(Duration::from_secs(150), &format!(
        "for _ in $(seq 600); do ls /tmp/lat.*_clat*.log > /dev/null 2>&1 && break; sleep 0.2; done # fio writes them when a round ends
         for log in /tmp/lat.*_clat*.log; do
             sort -s -t, -n -k1,1 $log | awk -F, 'NR > 1 && $1 - last > 20 {{ print $1 - last }} {{ last = $1 }}'
         done | sort -n | tail -n {count} | awk '{{ t[NR] = $1 }} END {{ print t[1], t[int((NR + 1) / 2)], t[NR] }}'"
    ))
}

fn restarts(run: &mut Run<'_>) -> Result<()> {
    let graceful = run.scale.pick(3, 8, 50);
    let guest = &mut *run.guest;
    let (_, device) = declared(guest)?;
    let mark = guest.mark()?;
    start_load(guest, &device)?;
    let took = guest.sh_within(
        Duration::from_secs(600),
        &format!(
            "for _ in $(seq {graceful}); do
                 a=$(date +%s%N); systemctl restart tcmu-dif; b=$(date +%s%N); echo $(((b - a) / 1000000)); sleep 0.$((RANDOM % 10))
             done | sort -n | awk '{{ t[NR] = $1 }} END {{ print t[1], t[int((NR + 1) / 2)], t[NR] }}'"
        ),
    )?;
    // How long a process takes to come up by itself here.
    let start = guest.sh(
        "a=$(date +%s%N); tcmu-dif --version > /dev/null; b=$(date +%s%N); echo $(((b - a) / 1000000))",
    )?;
    let noticed = pauses(guest, graceful)?;
    guest.note(format!(
        "{graceful} restarts, least, median and most: systemctl took {took} ms, initiators waited {noticed} ms; a bare process start takes {start} ms"
    ));
    let log = guest.kernel_log_since(&mark)?;
    let rounds = end_load(guest, &log)?;
    guest.note(format!("fio: {rounds} of 24 MiB"));
    nothing_given_back(guest)
}

fn kills(run: &mut Run<'_>) -> Result<()> {
    let kills = run.scale.pick(3, 8, 200);
    let guest = &mut *run.guest;
    let (_, device) = declared(guest)?;
    let mark = guest.mark()?;
    start_load(guest, &device)?;
    guest
        .sh_within(
            Duration::from_secs(1400),
            &format!(
                "for i in $(seq {kills}); do
                     pid=$(systemctl show -P MainPID tcmu-dif); systemctl kill -s KILL tcmu-dif
                     for _ in $(seq 600); do
                         now=$(systemctl show -P MainPID tcmu-dif)
                         [ $now != 0 ] && [ $now != $pid ] && systemctl is-active --quiet tcmu-dif && break; sleep 0.05
                     done
                     systemctl is-active --quiet tcmu-dif; sleep 0.$((RANDOM % 10))
                 done"
            ),
        )
        .context("systemd did not start it again")?;
    let log = guest.kernel_log_since(&mark)?;
    let rounds = end_load(guest, &log)?;
    guest.note(format!("{kills} kills; fio: {rounds} of 24 MiB"));
    nothing_given_back(guest)
}

/// No ring had to be reset: each was taken up as it was.
fn nothing_given_back(guest: &mut Guest) -> Result<()> {
    let given_back =
        guest.sh("journalctl -b -u tcmu-dif --no-pager | grep -c 'given back to be sent again' || true")?;
    ensure!(given_back == "0", "a ring was reset {given_back} times");
    Ok(())
}

fn watchdog(run: &mut Run<'_>) -> Result<()> {
    let guest = &mut *run.guest;
    let (_, device) = declared(guest)?;
    guest.sh(
        "mkdir -p /run/systemd/system/tcmu-dif.service.d
         printf '[Service]\\nWatchdogSec=6s\\nTimeoutAbortSec=5s\\n' > /run/systemd/system/tcmu-dif.service.d/watchdog.conf
         systemctl daemon-reload; systemctl restart tcmu-dif",
    )?;
    let mark = guest.mark()?;
    // Three times its time without a hang: it is fed.
    guest.sh("before=$(systemctl show -P NRestarts tcmu-dif); sleep 18; [ $(systemctl show -P NRestarts tcmu-dif) = $before ]")?;
    start_load(guest, &device)?;
    guest.sh("pid=$(systemctl show -P MainPID tcmu-dif); kill -STOP $pid
         for _ in $(seq 300); do
             now=$(systemctl show -P MainPID tcmu-dif)
             [ $now != 0 ] && [ $now != $pid ] && systemctl is-active --quiet tcmu-dif && break; sleep 0.2
         done
         [ $now != $pid ] && systemctl is-active --quiet tcmu-dif
         grep -qi 'watchdog timeout' <(journalctl -u tcmu-dif --no-pager)")?;
    let log = guest.kernel_log_since(&mark)?;
    end_load(guest, &log)?;
    guest
        .sh("rm -r /run/systemd/system/tcmu-dif.service.d; systemctl daemon-reload; systemctl restart tcmu-dif")
        .map(drop)
}

fn upgrade(run: &mut Run<'_>) -> Result<()> {
    let guest = &mut *run.guest;
    let (lun, device) = declared(guest)?;
    let mark = guest.mark()?;
    start_load(guest, &device)?;
    let pids = guest.sh_within(
        Duration::from_secs(300),
        "systemctl show -P MainPID tcmu-dif
         dpkg-deb -R /host/tcmu-dif.deb /scratch/newer && sed -i 's/^Version: .*/Version: 99.0-1/' /scratch/newer/DEBIAN/control
         dpkg-deb -Znone -b /scratch/newer /scratch/newer.deb > /dev/null && dpkg -i /scratch/newer.deb > /tmp/dpkg.txt 2>&1 || { cat /tmp/dpkg.txt; exit 1; }
         systemctl is-active --quiet tcmu-dif; systemctl show -P MainPID tcmu-dif",
    )?;
    let mut pids = pids.lines();
    ensure!(pids.next() != pids.next(), "the upgrade did not restart the daemon");
    let log = guest.kernel_log_since(&mark)?;
    end_load(guest, &log)?;
    ensure!(identity(&wait_online(guest, "vm1")?) == identity(&lun), "another disk after the upgrade");

    guest.sh("rm /etc/tcmu-dif/luns.d/vm1.toml; systemctl reload tcmu-dif
         for _ in $(seq 300); do tcmu-dif show vm1 > /dev/null 2>&1 || break; sleep 0.2; done
         dpkg --purge tcmu-dif > /tmp/dpkg.txt 2>&1 || { cat /tmp/dpkg.txt; exit 1; }")?;
    // /run/tcmu-dif is empty at the next boot, and is nobody's until then.
    let left = guest.sh("pgrep -x tcmu-dif || true; systemctl is-enabled tcmu-dif 2>/dev/null || true
         ls -d /usr/bin/tcmu-dif /usr/share/doc/tcmu-dif /etc/tcmu-dif/luns.d/README /var/lib/tcmu-dif 2>/dev/null || true")?;
    ensure!(left.trim().is_empty(), "left behind by the purge:\n{left}");
    // The tests before may have killed the daemon, which leaks a cluster; a reference to a free one would be corruption.
    guest.sh("qemu-img check -q -f qcow2 /scratch/vm1.qcow2 || [ $? = 3 ]").map(drop)
}
