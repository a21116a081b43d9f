//! What others' tools say of the SCSI target: libiscsi's suite, and the reports of sg3-utils as snapshots.

use super::super::guest::{Guest, TIME_IS_OVER, patience};
use super::lun::{assert_image_clean, create_on_loopback, daemon, daemon_pid, delete, start_daemon};
use super::reference::{LOOPBACK, START_TCMU_RUNNER};
use super::{Run, Test, compare_snapshot, iscsi};
use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::time::Duration;

pub const TESTS: &[Test] = &[
    Test {
        name: "conformance.iscsi-test-cu-512",
        promise: "libiscsi's SCSI suite, raw and 512 bytes: nothing fails or is skipped but what is named with a reason",
        limit: 600,
        group: None,
        run: |run| iscsi_test_cu(run, "raw", 512),
    },
    Test {
        name: "conformance.iscsi-test-cu-4096",
        promise: "libiscsi's SCSI suite, qcow2 and 4096 bytes: nothing fails or is skipped but what is named with a reason",
        limit: 600,
        group: None,
        run: |run| iscsi_test_cu(run, "qcow2", 4096),
    },
    Test {
        name: "conformance.offloads-elsewhere",
        promise: "what libiscsi's families of copies and atomic writes say of LIO's fileio and of tcmu-runner is what the docs compare ours with",
        limit: 300,
        group: None,
        run: offloads_elsewhere,
    },
    Test {
        name: "conformance.sg-raw-512",
        promise: "sg_inq, sg_vpd, sg_opcodes, sg_readcap and sg_luns show the raw LUN as they did",
        limit: 120,
        group: Some("sg"),
        run: |run| sg(run, "raw", 512, "off", false),
    },
    Test {
        name: "conformance.sg-qcow2-4096",
        promise: "sg_inq, sg_vpd, sg_opcodes, sg_readcap and sg_luns show the protected, read-only qcow2 LUN as they did",
        limit: 120,
        group: Some("sg"),
        run: |run| sg(run, "qcow2", 4096, "type1", true),
    },
];

/// The whole suite on a LUN of `format` and `block`, compared with the expectations for that block size.
fn iscsi_test_cu(run: &mut Run<'_>, format: &str, block: u32) -> Result<()> {
    let path = run.files.join(format!("expect/iscsi-test-cu-{block}.txt"));
    let expected = iscsi::expectations(
        &fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?,
    )?;
    let guest = &mut *run.guest;
    start_daemon(guest, "auto")?;
    // Small, because SANITIZE goes over all of it within the suite's time limit for one command, and because a LUN of more
    // than 65535 blocks is read in one piece, which is more than an sg device transfers.
    let image = format!("/scratch/suite.{format}");
    let options = format!("--image {image} --block-size {block} --pi type1");
    let lun = create_on_loopback(guest, "suite", &format!("{options} --size 24M --format {format}"))?;
    let mut ended = suite(guest, &lun.sg, "SCSI", "")?;
    // SANITIZE tests run one by one: on an sg device the suite itself crashes in one of them.
    let sanitize: Vec<String> =
        ended.keys().filter(|name| name.starts_with("Sanitize.") && *name != CRASHES).cloned().collect();
    for name in sanitize {
        ended.extend(suite(guest, &lun.sg, &format!("SCSI.{name}"), "--allow-sanitize")?);
    }
    delete(guest, "suite")?;
    assert_image_clean(guest, &image, format, true)?;
    let lun = create_on_loopback(guest, "suite", &format!("{options} --read-only"))?;
    ended.extend(suite(guest, &lun.sg, "SCSI.ReadOnly", "")?);
    delete(guest, "suite")?;
    // MAXIMUM WRITE SAME LENGTH shows only on a LUN that is longer.
    let large = format!("--image /scratch/large.{format} --size 40G --format {format} --block-size {block}");
    let lun = create_on_loopback(guest, "large", &large)?;
    for family in ["WriteSame10", "WriteSame16"] {
        ended.extend(suite(guest, &lun.sg, &format!("SCSI.{family}.ZeroBlocks"), "")?);
    }
    delete(guest, "large")?;
    if block == 512 {
        atomic_writes_on_qcow2(guest)?;
    }

    let count = |wanted| ended.values().filter(|ended| ended.outcome == wanted).count();
    guest.note(format!(
        "iscsi-test-cu: {} tests, {} passed, {} failed, {} skipped",
        ended.len(),
        count(iscsi::Outcome::Passed),
        count(iscsi::Outcome::Failed),
        count(iscsi::Outcome::Skipped)
    ));
    let differences = iscsi::differences(&ended, &expected);
    ensure!(differences.is_empty(), "not as {} has it:\n{differences}", path.display());
    daemon_pid(guest).map(drop)
}

/// Of a qcow2 LUN with 512-byte blocks any 2048 blocks can be written as a whole: libiscsi writes up to 256 of them where it likes, and Linux's
/// sd reads of VPD page B0 that it may send such writes.
fn atomic_writes_on_qcow2(guest: &mut Guest) -> Result<()> {
    let options = "--image /scratch/atomic.qcow2 --size 24M --format qcow2 --block-size 512 --pi type1";
    let lun = create_on_loopback(guest, "atomic", options)?;
    let ended = suite(guest, &lun.sg, "SCSI.WriteAtomic16", "")?;
    ensure!(ended.len() == 6, "{} tests of WRITE ATOMIC", ended.len());
    for (name, ended) in &ended {
        let wanted = match name.as_str() {
            // It looks at alignment and granularity of more than one block; here both are one.
            "WriteAtomic16.VPD" => iscsi::Outcome::Skipped,
            _ => iscsi::Outcome::Passed,
        };
        ensure!(
            ended.outcome == wanted,
            "on qcow2 with 512-byte blocks {name} ended with {:?}",
            ended.outcome
        );
    }
    let queue = format!("/sys/block/{}/queue", lun.device.trim_start_matches("/dev/"));
    let said =
        guest.sh(&format!("cat {queue}/atomic_write_unit_min_bytes {queue}/atomic_write_unit_max_bytes"))?;
    let bytes: Vec<u64> = said.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    guest.note(format!("atomic writes by Linux's sd, of at least and at most so many bytes: {bytes:?}"));
    ensure!(bytes.len() == 2 && bytes[0] == 512 && bytes[1] >= 64 << 10, "Linux has these limits: {bytes:?}");
    delete(guest, "atomic")?;
    assert_image_clean(guest, "/scratch/atomic.qcow2", "qcow2", true)
}

/// The families in which others are to be compared with us, on a disk of LIO's fileio and on one of tcmu-runner's.
fn offloads_elsewhere(run: &mut Run<'_>) -> Result<()> {
    let guest = &mut *run.guest;
    guest.sh(START_TCMU_RUNNER)?;
    let devices = guest.sh(&format!(
        r#"{LOOPBACK}
        modprobe -a target_core_mod target_core_file tcm_loop
        mkdir -p $T/core/fileio_7/ref $T/core/user_7/runner
        echo fd_dev_name=/scratch/ref.raw,fd_dev_size=$((24 << 20)),fd_buffered_io=1 > $T/core/fileio_7/ref/control
        truncate -s 24M /scratch/runner.raw
        echo dev_size=$((24 << 20)),dev_config=qcow//scratch/runner.raw > $T/core/user_7/runner/control
        for it in fileio_7/ref user_7/runner; do
            echo 1 > $T/core/$it/enable
            # Without a serial number the kernel reports no VPD pages.
            echo 0123456789abcdef > $T/core/$it/wwn/vpd_unit_serial
        done
        modprobe sg
        for it in fileio_7/ref=naa.5001405000000001 user_7/runner=naa.5001405000000002; do
            disk=$(export_loopback ${{it%=*}} ${{it#*=}})
            for _ in $(seq 100); do ls /sys/block/${{disk#/dev/}}/device/scsi_generic > /dev/null 2>&1 && break; sleep 0.1; done
            echo /dev/$(ls /sys/block/${{disk#/dev/}}/device/scsi_generic)
        done"#
    ))?;
    let mut text = String::new();
    for (who, sg) in ["LIO's fileio", "tcmu-runner"].iter().zip(devices.lines()) {
        for family in ["ExtendedCopy", "ReceiveCopyResults", "WriteAtomic16"] {
            for (name, ended) in suite(guest, sg, &format!("SCSI.{family}"), "")? {
                let _ = writeln!(text, "{who}: {name}: {:?}", ended.outcome);
            }
        }
    }
    compare_snapshot(run, "offloads-elsewhere.txt", &text)
}

/// A test of the suite that follows a null pointer unless the target is reached by libiscsi's own iSCSI.
const CRASHES: &str = "Sanitize.OverwriteReserved";

/// Runs one family or test of the suite and reads its log, which is kept.
fn suite(guest: &mut Guest, sg: &str, test: &str, more: &str) -> Result<BTreeMap<String, iscsi::Ended>> {
    let name = format!("iscsi-test-cu.{test}.log");
    // Its own time limit, so that the log is there when the suite hangs.
    let seconds = 380 * patience();
    let command = format!(
        "status=0; timeout -k 5 {seconds} iscsi-test-cu --dataloss {more} -V --test={test} {sg} > /tmp/{name} 2>&1 || status=$?
         cp /tmp/{name} /host/; [ $status != 124 ] || {{ echo {TIME_IS_OVER} >&2; exit 1; }}"
    );
    let ran = guest.sh_within(Duration::from_secs(400), &command);
    let log = guest.logs().join(&name);
    fs::copy(guest.share().join(&name), &log)?;
    ran.with_context(|| format!("see {}", log.display()))?;
    iscsi::parse(&String::from_utf8_lossy(&fs::read(&log)?)).with_context(|| format!("see {}", log.display()))
}

/// The snapshots' LUN has a fixed serial number and a fixed name on the fabric, so that nothing in them is volatile.
fn sg(run: &mut Run<'_>, format: &str, block: u32, pi: &str, read_only: bool) -> Result<()> {
    let guest = &mut *run.guest;
    daemon(guest)?;
    let image = format!("/scratch/snapshot.{format}");
    let mut options = format!("--image {image} --block-size {block} --pi {pi} --serial 0123456789abcdef");
    if read_only {
        create_on_loopback(guest, "snap", &format!("{options} --size 64M --format {format}"))?;
        delete(guest, "snap")?;
        options += " --read-only";
    } else {
        let _ = write!(options, " --size 64M --format {format}");
    }
    let lun =
        create_on_loopback(guest, "snap", &format!("{options} --export loopback:naa.5001405000000021"))?;
    let sg = &lun.sg;
    let pages =
        guest.sh(&format!("sg_vpd --page=sv --raw {sg} | od -An -v -tx1 -w1 -j4 | sed 's/^ */0x/'"))?;
    ensure!(pages.lines().count() >= 7, "VPD pages: {pages}");
    let mut commands = vec!["sg_inq".to_owned()];
    commands.extend(pages.lines().map(|page| format!("sg_vpd --page={page}")));
    for command in [
        "sg_opcodes",
        "sg_opcodes --tmf",
        "sg_readcap",
        "sg_readcap --16",
        "sg_luns --verbose",
        "sg_modes --all",
        "sg_get_lba_status --lba=0",
    ] {
        commands.push(command.to_owned());
    }
    let mut text = String::new();
    for command in commands {
        let said = guest.try_sh(&format!("{command} {sg} 2>&1 | sed 's|{sg}|SG|g'"))?;
        let _ = writeln!(text, "$ {command}\n{}", said.stdout);
    }
    delete(guest, "snap")?;
    compare_snapshot(run, &format!("sg-{format}-{block}.txt"), &text)
}
