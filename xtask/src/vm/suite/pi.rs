//! Protection information from an initiator's own buffers to the image and back, on the stock target_core_user and on the one
//! with our change (`vendor/linux/`).

use super::super::guest::Guest;
use super::fault::flip;
use super::initiator::{file_system_with_verified_writes, raw};
use super::lun::{
    assert_image_clean, assert_nothing_left, create, create_on_loopback, daemon_pid, delete, start_daemon,
};
use super::{Run, Test};
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::time::Duration;

pub const TESTS: &[Test] = &[
    Test {
        name: "pi.stock-module",
        promise: "on a stock kernel check-host says which fabric loses PI, and create refuses to expose it unless asked by name",
        limit: 240,
        group: Some("pi-stock"),
        run: stock_module,
    },
    Test {
        name: "pi.interleaved-sg",
        promise: "on a stock kernel PI between the blocks gets through SG_IO: types 1, 2 and 3, 512 and 4096, clause by clause",
        limit: 600,
        group: Some("pi-stock"),
        run: interleaved_sg,
    },
    Test {
        name: "pi.scsi-debug-clauses",
        promise: "the conformance table runs against scsi_debug, types 1, 2 and 3, and ends as its list of known failures says",
        limit: 240,
        group: Some("pi-stock"),
        run: scsi_debug_clauses,
    },
    Test {
        name: "pi.differential-scsi-debug",
        promise: "20 000 random commands with every xxPROTECT end on our LUN as on scsi_debug but where SBC-4 says otherwise",
        limit: 900,
        group: Some("pi-stock"),
        run: differential_scsi_debug,
    },
    Test {
        name: "pi.patched-module",
        promise: "the module with our change announces itself, and a LUN without PI to show works on it as ever",
        limit: 420,
        group: Some("pi-patched"),
        run: patched_module,
    },
    Test {
        name: "pi.loopback-dix",
        promise: "with the change Linux's block layer makes and checks PI through loopback; a flipped bit and a bad tuple are found",
        limit: 600,
        group: Some("pi-patched"),
        run: loopback_dix,
    },
    Test {
        name: "pi.vhost",
        promise: "with the change an initiator with VIRTIO_SCSI_F_T10_PI sends and gets tuples of its own, clause by clause",
        limit: 600,
        group: Some("pi-patched"),
        run: vhost,
    },
    Test {
        name: "pi.differential-lio",
        promise: "random commands with good and bad tuples end on our LUN as on LIO's ramdisk but where SBC-4 says otherwise",
        limit: 900,
        group: Some("pi-patched"),
        run: differential_lio,
    },
];

/// Loads target_core_user with our change in place of the stock one.
pub fn load_patched_module(guest: &mut Guest) -> Result<()> {
    guest
        .sh("if [ \"$(cat /sys/module/target_core_user/parameters/dif 2>/dev/null)\" != Y ]; then
               modprobe -a target_core_mod uio
               insmod /host/target_core_user.ko
             fi
             [ \"$(cat /sys/module/target_core_user/parameters/dif)\" = Y ]
             # Guard errors that are made on purpose would flood a slow console.
             dmesg --console-level 1")
        .context("the module with our change does not load")
        .map(drop)
}

/// The daemon, unless a test of the same group has started it.
fn daemon(guest: &mut Guest) -> Result<()> {
    if daemon_pid(guest).is_ok() {
        return Ok(());
    }
    guest.sh("dmesg --console-level 1")?;
    start_daemon(guest, "auto")
}

/// What `check-host --json` says of one thing.
fn check_host(guest: &mut Guest, what: &str) -> Result<String> {
    let report = guest.json("tcmu-dif check-host --json || true")?;
    let checks = report["checks"].as_array().cloned().unwrap_or_default();
    let found = checks.iter().find(|check| check["what"] == what).and_then(|check| check["detail"].as_str());
    found.map(str::to_owned).with_context(|| format!("check-host says nothing of {what}: {report}"))
}

fn stock_module(run: &mut Run<'_>) -> Result<()> {
    let guest = &mut *run.guest;
    daemon(guest)?;
    for module in ["tcm_loop", "vhost_scsi"] {
        let said = check_host(guest, module)?;
        ensure!(said.contains("PI is lost"), "{module}: {said}");
    }
    let options = "--image /scratch/no.raw --size 16M --pi type1 --exposure initiator --export loopback";
    let refused = guest.try_sh(&format!("tcmu-dif create no {options}"))?;
    ensure!(refused.status == Some(1) || refused.status == Some(2), "not refused: {refused:?}");
    for part in ["target_core_user", "next:", "--pi-transfer interleaved"] {
        ensure!(refused.stderr.contains(part), "no {part:?} in the message:\n{}", refused.stderr);
    }
    ensure!(!guest.try_sh("test -e /scratch/no.raw -o -e /scratch/no.raw.pi")?.ok(), "files are left");
    assert_nothing_left(guest)
}

/// Runs `tcmu-dif conformance` and gives back its table, whether clauses failed or not.
fn conformance(guest: &mut Guest, disk: &str) -> Result<Value> {
    let output = guest.run(
        &format!("tcmu-dif conformance {disk} --destroy-data --json"),
        true,
        Duration::from_secs(240),
    )?;
    serde_json::from_str(&output.stdout)
        .with_context(|| format!("conformance {disk}: {}{}", output.stdout, output.stderr))
}

/// The failed clauses of a table, a line each.
fn failures(table: &Value) -> Vec<String> {
    let rows = table["clauses"].as_array().cloned().unwrap_or_default();
    rows.iter()
        .filter(|row| row["verdict"] == "fail")
        .map(|row| {
            let text = |key: &str| row[key].as_str().unwrap_or_default().to_owned();
            format!("{} {}: {}", text("clause"), text("what"), text("detail"))
        })
        .collect()
}

/// Nothing may fail, and tuples must have been carried, so that the clauses about them were asked.
fn conforms(guest: &mut Guest, disk: &str, carriage: &str) -> Result<u64> {
    let table = conformance(guest, disk)?;
    let failed = failures(&table);
    ensure!(failed.is_empty(), "{disk} fails:\n{}", failed.join("\n"));
    ensure!(table["disk"]["carriage"] == carriage, "PI does not travel {carriage}: {}", table["disk"]);
    let passed = table["passed"].as_u64().unwrap_or(0);
    ensure!(passed >= 60, "only {passed} clauses were asked");
    Ok(passed)
}

const SHAPES: [(&str, u32); 6] =
    [("type1", 512), ("type1", 4096), ("type2", 512), ("type2", 4096), ("type3", 512), ("type3", 4096)];

fn interleaved_sg(run: &mut Run<'_>) -> Result<()> {
    let guest = &mut *run.guest;
    daemon(guest)?;
    let mut said = String::new();
    for (pi, block) in SHAPES {
        let image = format!("/scratch/{pi}-{block}.raw");
        let lun = create_on_loopback(
            guest,
            "inter",
            &format!(
                "--image {image} --size 16M --block-size {block} --pi {pi} --exposure initiator --pi-transfer interleaved"
            ),
        )?;
        let passed = conforms(guest, &lun.sg, "between").with_context(|| format!("{pi}, {block}"))?;
        said += &format!(" {pi}/{block}: {passed}");
        delete(guest, "inter")?;
        guest.sh(&format!("rm -f {image} {image}.pi"))?;
    }
    guest.note(format!("clauses passed:{said}"));
    guest.sh("dmesg --clear").map(drop)
}

/// Loads scsi_debug and gives back its /dev/sgN.
fn scsi_debug(guest: &mut Guest, dif: u8, block: u32) -> Result<String> {
    guest.sh(&format!(
        "modprobe scsi_debug dif={dif} dix=0 dev_size_mb=8 sector_size={block} delay=0
         for _ in $(seq 100); do
             for host in /sys/class/scsi_host/*; do
                 [ \"$(cat $host/proc_name)\" = scsi_debug ] || continue
                 for sg in $host/device/target*/*/scsi_generic/*; do
                     [ -e \"$sg\" ] && {{ echo /dev/${{sg##*/}}; exit 0; }}
                 done
             done
             sleep 0.1
         done
         exit 1"
    ))
}

/// What scsi_debug is known to answer otherwise than SBC-4 says: parts of the demands that fail on it.
const SCSI_DEBUG_FAILS: &[&str] = &[
    "at LBA 18446744073709551615 is refused",
    "with the reserved xxPROTECT=",
    "type 1: ",
    "type 2: ",
    "type 3: ",
    "SPT names the type",
    "extended INQUIRY",
    "GRD_CHK",
    "REF_CHK",
];

fn scsi_debug_clauses(run: &mut Run<'_>) -> Result<()> {
    let guest = &mut *run.guest;
    daemon(guest)?;
    for dif in [1, 2, 3] {
        let sg = scsi_debug(guest, dif, 512)?;
        let table = conformance(guest, &sg)?;
        let failed = failures(&table);
        guest.note(format!("scsi_debug dif={dif}: {} passed, {} failed", table["passed"], failed.len()));
        ensure!(table["passed"].as_u64().unwrap_or(0) >= 8, "nothing was asked: {table}");
        let unknown: Vec<&String> =
            failed.iter().filter(|line| !SCSI_DEBUG_FAILS.iter().any(|part| line.contains(part))).collect();
        ensure!(unknown.is_empty(), "scsi_debug dif={dif} fails otherwise: {unknown:#?}");
        guest.sh("rmmod scsi_debug")?;
    }
    guest.sh("dmesg --clear").map(drop)
}

/// Compares two disks, and gives back how many commands were sent.
fn differential(guest: &mut Guest, ours: &str, peer: &str, commands: u32, seed: u32) -> Result<u64> {
    let output = guest.run(
        &format!(
            "tcmu-dif conformance {ours} --against {peer} --commands {commands} --seed {seed} --destroy-data --json"
        ),
        true,
        Duration::from_secs(600),
    )?;
    let report: Value = serde_json::from_str(&output.stdout)
        .with_context(|| format!("no report: {}{}", output.stdout, output.stderr))?;
    if report["differences"] != 0 {
        bail!("seed {seed}: {} differences, the first: {:#}", report["differences"], report["listed"]);
    }
    guest.note(format!(
        "{ours} and {peer}: {} commands, {} good, {} failed alike, expected differences {}",
        report["commands"], report["good"], report["equal_errors"], report["expected"]
    ));
    ensure!(report["good"].as_u64().unwrap_or(0) * 4 > u64::from(commands), "hardly any command ended well");
    Ok(report["commands"].as_u64().unwrap_or(0))
}

fn differential_scsi_debug(run: &mut Run<'_>) -> Result<()> {
    let commands = run.scale.pick(500, 3500, 20_000);
    let guest = &mut *run.guest;
    daemon(guest)?;
    let (mut sent, mut differences) = (0, Vec::new());
    for (seed, (pi, block)) in (1..).zip(SHAPES) {
        let image = format!("/scratch/d-{pi}-{block}.raw");
        let lun = create_on_loopback(
            guest,
            "differ",
            &format!(
                "--image {image} --size 8M --block-size {block} --pi {pi} --exposure initiator --pi-transfer interleaved"
            ),
        )?;
        let dif = pi.trim_start_matches("type").parse()?;
        let peer = scsi_debug(guest, dif, block)?;
        // All shapes are gone through: a difference in one tells more beside the others.
        match differential(guest, &lun.sg, &peer, commands, seed) {
            Ok(commands) => sent += commands,
            Err(error) => differences.push(format!("{pi}, blocks of {block}: {error:#}")),
        }
        guest.sh("rmmod scsi_debug")?;
        delete(guest, "differ")?;
        // The peer sees no tuples, so only good ones were sent.
        assert_image_clean(guest, &image, "raw", true)?;
        guest.sh(&format!("rm -f {image} {image}.pi && dmesg --clear"))?;
    }
    ensure!(differences.is_empty(), "{}", differences.join("\n"));
    ensure!(sent == 6 * u64::from(commands), "{sent} commands were sent");
    Ok(())
}

fn patched_module(run: &mut Run<'_>) -> Result<()> {
    let guest = &mut *run.guest;
    load_patched_module(guest)?;
    daemon(guest)?;
    for module in ["tcm_loop", "vhost_scsi"] {
        let said = check_host(guest, module)?;
        ensure!(said.contains("PI is carried"), "{module}: {said}");
    }
    let lun = create_on_loopback(guest, "plain", "--image /scratch/plain.raw --size 128M --pi type1")?;
    file_system_with_verified_writes(guest, &lun.device, 8)?;
    delete(guest, "plain")?;
    assert_image_clean(guest, "/scratch/plain.raw", "raw", true)?;
    assert_nothing_left(guest)
}

fn loopback_dix(run: &mut Run<'_>) -> Result<()> {
    let mebibytes = run.scale.pick(8, 16, 64);
    let guest = &mut *run.guest;
    load_patched_module(guest)?;
    daemon(guest)?;
    let image = "/scratch/dix.raw";
    let options = format!("--image {image} --pi type1 --exposure initiator");
    let mark = guest.mark()?;
    let lun = create_on_loopback(guest, "dix", &format!("{options} --size 128M"))?;
    let (device, sg) = (&lun.device, &lun.sg);
    guest.sh(&format!("blockdev --rereadpt {device} 2>/dev/null || true; sleep 1"))?;
    let log = guest.kernel_log_since(&mark)?;
    for line in ["Enabling DIX T10-DIF-TYPE1-CRC", "Enabling DIF Type 1 protection"] {
        ensure!(log.contains(line), "the kernel does not say {line:?}:\n{log}");
    }
    let disk = device.trim_start_matches("/dev/");
    let verify =
        guest.sh(&format!("cat /sys/block/{disk}/integrity/{{format,read_verify,write_generate}}"))?;
    ensure!(verify == "T10-DIF-TYPE1-CRC\n1\n1", "the block layer does not make and check PI: {verify}");

    let mark = guest.mark()?;
    file_system_with_verified_writes(guest, device, mebibytes)?;
    let log = guest.kernel_log_since(&mark)?;
    ensure!(!log.contains("error"), "errors where there should be none:\n{log}");

    // A bit flips in the image: the read fails at that sector, and at no other.
    let lba = 777;
    guest.sh(&format!("dd if=/dev/urandom of={device} oflag=direct bs=4k count=256 status=none"))?;
    flip(guest, image, lba * 512 + 9)?;
    let mark = guest.mark()?;
    let read =
        guest.try_sh(&format!("dd if={device} of=/dev/null iflag=direct bs=512 skip={lba} count=1 2>&1"))?;
    ensure!(!read.ok(), "the flipped block reads as good");
    let log = guest.kernel_log_since(&mark)?;
    ensure!(log.contains(&format!("sector {lba} ")), "no error at sector {lba}:\n{log}");
    ensure!(
        log.contains("guard") || log.contains("Guard") || log.contains("protection"),
        "the log names no guard:\n{log}"
    );
    guest.sh(&format!(
        "dd if={device} of=/dev/null iflag=direct bs=512 skip={} count=1 status=none",
        lba + 1
    ))?;

    // A tuple that does not fit, written by hand: refused, and nothing is written.
    guest.sh(&format!("dd if=/dev/urandom of={device} oflag=direct bs=4k count=256 status=none"))?;
    // The block and its tuple, unchecked (RDPROTECT=3), and the block as the image has it.
    let held = format!(
        "sg_raw --request=520 --outfile=/tmp/held {sg} 88 60 0 0 0 0 0 0 0 64 0 0 0 1 0 0 2> /dev/null
         (cat /tmp/held; dd if={image} bs=512 skip=100 count=1 status=none) | sha256sum"
    );
    let before = guest.sh(&held)?;
    guest.sh("head -c 512 /dev/urandom > /tmp/bad && printf '\\x12\\x34\\0\\0\\0\\0\\0\\x64' >> /tmp/bad")?;
    let mut cdb = [0u8; 16];
    (cdb[0], cdb[1], cdb[9], cdb[13]) = (0x8a, 0x20, 100, 1);
    let answer = raw(guest, sg, &cdb, "--send=520 --infile=/tmp/bad")?;
    ensure!(answer.status != Some(0), "a bad tuple is taken: {}", answer.text);
    ensure!(answer.text.contains("guard check failed"), "not for its guard: {}", answer.text);
    ensure!(guest.sh(&held)? == before, "something was written");
    delete(guest, "dix")?;
    assert_image_clean(guest, image, "raw", true)?;
    guest.sh("dmesg --clear").map(drop)
}

const WWPN: &str = "naa.5001405000000031";

fn vhost(run: &mut Run<'_>) -> Result<()> {
    let guest = &mut *run.guest;
    load_patched_module(guest)?;
    daemon(guest)?;
    let mut said = String::new();
    for (pi, block) in SHAPES {
        let image = format!("/scratch/v-{pi}-{block}.raw");
        create(
            guest,
            "v",
            &format!(
                "--image {image} --size 16M --block-size {block} --pi {pi} --exposure initiator --export vhost:{WWPN}"
            ),
        )?;
        let passed =
            conforms(guest, &format!("vhost:{WWPN}"), "beside").with_context(|| format!("{pi}, {block}"))?;
        said += &format!(" {pi}/{block}: {passed}");
        delete(guest, "v")?;
        guest.sh(&format!("rm -f {image} {image}.pi"))?;
    }
    guest.note(format!("clauses passed:{said}"));
    assert_nothing_left(guest)
}

/// LIO's own ramdisk behind vhost-scsi: `lio_ramdisk TYPE BLOCK WWN`, and its end.
const LIO: &str = r#"
T=/sys/kernel/config/target
lio_ramdisk() {
    modprobe -a target_core_mod vhost_scsi
    local dev=$T/core/rd_mcp_9/peer
    mkdir -p $dev
    echo rd_pages=2048 > $dev/control
    echo 1 > $dev/enable
    echo $2 > $dev/attrib/block_size
    echo $1 > $dev/attrib/pi_prot_type
    echo peer > $dev/wwn/vpd_unit_serial
    mkdir -p $T/vhost/$3/tpgt_1
    echo naa.5001405ffffffff1 > $T/vhost/$3/tpgt_1/nexus
    mkdir $T/vhost/$3/tpgt_1/lun/lun_0
    ln -s $dev $T/vhost/$3/tpgt_1/lun/lun_0/link
}
lio_gone() {
    rm $T/vhost/$1/tpgt_1/lun/lun_0/link
    rmdir $T/vhost/$1/tpgt_1/lun/lun_0 $T/vhost/$1/tpgt_1 $T/vhost/$1 $T/core/rd_mcp_9/peer
}
"#;

fn differential_lio(run: &mut Run<'_>) -> Result<()> {
    let commands = run.scale.pick(500, 5000, 20_000);
    let guest = &mut *run.guest;
    load_patched_module(guest)?;
    daemon(guest)?;
    const PEER: &str = "naa.5001405000000032";
    // LIO has types 1 and 3.
    for (seed, (pi, block)) in (11..).zip(SHAPES.into_iter().filter(|(pi, _)| *pi != "type2")) {
        let image = format!("/scratch/l-{pi}-{block}.raw");
        create(
            guest,
            "l",
            &format!(
                "--image {image} --size 8M --block-size {block} --pi {pi} --exposure initiator --export vhost:{WWPN}"
            ),
        )?;
        guest.sh(&format!("{LIO} lio_ramdisk {} {block} {PEER}", pi.trim_start_matches("type")))?;
        differential(guest, &format!("vhost:{WWPN}"), &format!("vhost:{PEER}"), commands, seed)
            .with_context(|| format!("{pi}, blocks of {block}"))?;
        guest.sh(&format!("{LIO} lio_gone {PEER}"))?;
        delete(guest, "l")?;
        guest.sh(&format!("rm -f {image} {image}.pi && dmesg --clear"))?;
    }
    Ok(())
}
