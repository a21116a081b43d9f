//! The files of `dist/` by systemd's own judgement: the unit makes sense to it and is shut as far as is promised, users and
//! directories are made as written.
#![allow(clippy::unwrap_used)] // A test may panic.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

fn dist() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("dist")
}

fn unit() -> String {
    fs::read_to_string(dist().join("systemd/tcmu-dif.service")).unwrap()
}

#[track_caller]
fn run(program: &str, args: &[&str]) -> Output {
    Command::new(program).args(args).env("SYSTEMD_COLORS", "0").output().unwrap_or_else(|e| {
        panic!("{program} cannot be run ({e}); Debian has it in the package systemd: apt-get install systemd")
    })
}

/// All values of a setting, its lines joined.
fn values(unit: &str, setting: &str) -> BTreeSet<String> {
    let lines = unit.lines().filter_map(|l| l.strip_prefix(setting)?.strip_prefix('='));
    lines.flat_map(str::split_whitespace).map(str::to_owned).collect()
}

/// The unit in a directory of its own, with the binary that was built in place of the installed one.
fn with_our_binary(dir: &Path) -> PathBuf {
    let path = dir.join("tcmu-dif.service");
    let text = unit();
    assert!(text.contains("ExecStart=/usr/bin/tcmu-dif daemon\n"), "the path of the package's binary");
    fs::write(&path, text.replace("/usr/bin/tcmu-dif", env!("CARGO_BIN_EXE_tcmu-dif"))).unwrap();
    path
}

#[test]
fn systemd_finds_no_fault_in_the_unit() {
    let dir = tempfile::tempdir().unwrap();
    let path = with_our_binary(dir.path());
    let out = run("systemd-analyze", &["verify", "--man=no", path.to_str().unwrap()]);
    let said = String::from_utf8_lossy(&out.stderr);
    let ours: Vec<&str> = said.lines().filter(|l| l.contains("tcmu-dif")).collect();
    assert!(out.status.success() && ours.is_empty(), "{said}");
}

#[test]
fn a_fault_in_the_unit_would_be_found() {
    let dir = tempfile::tempdir().unwrap();
    let path = with_our_binary(dir.path());
    let text = fs::read_to_string(&path).unwrap().replace("WatchdogSec=30s", "WatchdogSec=soon");
    fs::write(&path, text).unwrap();
    let out = run("systemd-analyze", &["verify", "--man=no", path.to_str().unwrap()]);
    let said = String::from_utf8_lossy(&out.stderr);
    // It ignores what it cannot read, and says so: that is why silence is asked for above.
    assert!(said.contains("tcmu-dif.service:") && said.contains("soon"), "{out:?}");
}

#[test]
fn the_unit_s_exposure_is_three_at_most() {
    let unit = dist().join("systemd/tcmu-dif.service");
    let args = ["security", "--no-pager", "--offline=true", "--threshold=30", unit.to_str().unwrap()];
    let out = run("systemd-analyze", &args);
    let said = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success(), "{said}\n{}", String::from_utf8_lossy(&out.stderr));
    assert!(said.contains("Overall exposure level"), "{said}");
}

#[test]
fn the_daemon_is_there_before_those_who_use_its_disks_and_after_what_it_needs() {
    let unit = unit();
    for later in ["remote-fs-pre.target", "libvirtd.service", "virtqemud.service", "libvirt-guests.service"] {
        assert!(values(&unit, "Before").contains(later), "{later}");
    }
    for restores_targets in ["rtslib-fb-targetctl.service", "target.service"] {
        assert!(values(&unit, "Before").contains(restores_targets), "{restores_targets}");
    }
    for earlier in [
        "sys-kernel-config.mount",
        "systemd-modules-load.service",
        "local-fs.target",
        "systemd-tmpfiles-setup.service",
        "tcmu-dif-modules.service",
        "dbus.socket",
    ] {
        assert!(values(&unit, "After").contains(earlier), "{earlier}");
    }
}

#[test]
fn the_modules_are_loaded_once_and_not_by_every_restart() {
    let unit = fs::read_to_string(dist().join("systemd/tcmu-dif-modules.service")).unwrap();
    assert!(unit.contains("\nType=oneshot\nRemainAfterExit=yes\n"), "{unit}");
    let loaded = values(&unit, "ExecStart");
    for module in ["configfs", "target_core_user", "vhost_scsi", "tcm_loop"] {
        assert!(loaded.contains(module), "{module}");
    }
    assert!(values(&unit, "Before").contains("sys-kernel-config.mount"));
}

/// The one value of a setting of `[Service]`; what a later line sets wins, as with systemd.
#[track_caller]
fn of_service(unit: &str, setting: &str) -> String {
    let service = unit.split("\n[").find_map(|s| s.strip_prefix("Service]")).expect("a section [Service]");
    let mut lines = service.lines().filter_map(|l| l.strip_prefix(setting)?.strip_prefix('='));
    lines.next_back().unwrap_or_else(|| panic!("{setting}= is not set")).trim().to_owned()
}

/// Seconds of a time as the unit has them: 30s, 3min, 500ms.
#[track_caller]
fn seconds(time: &str) -> f64 {
    let at = time.find(|c: char| !c.is_ascii_digit()).unwrap_or(time.len());
    let unit = match &time[at..] {
        "" | "s" => 1.0,
        "ms" => 0.001,
        "min" => 60.0,
        other => panic!("{other:?} in {time}"),
    };
    time[..at].parse::<f64>().unwrap() * unit
}

#[test]
fn systemd_is_told_of_readiness_and_life_and_of_how_the_daemon_ends_and_comes_again() {
    let unit = unit();
    for (setting, value) in [
        // READY=1, WATCHDOG=1 and RELOADING=1 are sent by the daemon's process and by none else.
        ("Type", "notify"),
        ("NotifyAccess", "main"),
        ("ExecStart", "/usr/bin/tcmu-dif daemon"),
        ("Restart", "on-failure"),
        // SIGTERM goes to the daemon; what it leaves behind when its time is over is killed.
        ("KillMode", "mixed"),
    ] {
        assert_eq!(of_service(&unit, setting), value, "{setting}=");
    }
    let time = |setting: &str| seconds(&of_service(&unit, setting));
    // A LUN's thread counts as hung after half of it; less than a few seconds would take a busy disk for one.
    assert!((10.0..=60.0).contains(&time("WatchdogSec")));
    // The daemon waits a minute for its LUNs, at the start and at the end.
    assert!(time("TimeoutStopSec") > 60.0 && time("TimeoutStartSec") > 60.0);
    // Guests wait meanwhile.
    assert!(time("RestartSec") <= 1.0);
    assert_eq!(values(&unit, "StartLimitIntervalSec"), BTreeSet::from(["0".to_owned()]));
    // Settings are judged before the daemon is told to read them.
    let reload: Vec<_> = unit.lines().filter_map(|l| l.strip_prefix("ExecReload=")).collect();
    assert_eq!(reload, ["/usr/bin/tcmu-dif daemon --check", "/bin/kill -HUP $MAINPID"]);
}

#[test]
fn at_shutdown_luns_are_released_after_those_who_use_them_and_before_the_daemon_ends() {
    let release = fs::read_to_string(dist().join("systemd/tcmu-dif-release.service")).unwrap();
    assert_eq!(of_service(&release, "Type"), "oneshot");
    assert_eq!(of_service(&release, "RemainAfterExit"), "yes");
    // On no terminal, so that nobody is asked.
    assert_eq!(of_service(&release, "ExecStop"), "/usr/bin/tcmu-dif release");
    assert!(values(&release, "StandardInput").is_empty());
    assert!(values(&release, "After").contains("tcmu-dif.service"));
    // The same users as the daemon's own unit has.
    for later in ["remote-fs-pre.target", "libvirtd.service", "virtqemud.service", "libvirt-guests.service"] {
        assert!(values(&release, "Before").contains(later), "{later}");
        assert!(values(&unit(), "Before").contains(later), "{later}");
    }
}

#[test]
fn what_the_daemon_cannot_do_without_is_left_open() {
    let unit = unit();
    assert!(values(&unit, "RestrictAddressFamilies").contains("AF_NETLINK"));
    assert!(values(&unit, "ReadWritePaths").contains("-/sys/kernel/config"));
    assert!(values(&unit, "CapabilityBoundingSet").contains("CAP_NET_ADMIN"));
    // Each of these would hide /dev/uio*, the kernel's events, or images.
    for shut in
        ["PrivateDevices", "ProtectClock", "DeviceAllow", "PrivateNetwork", "PrivateTmp", "ProtectHome"]
    {
        assert!(values(&unit, shut).is_empty(), "{shut}");
    }
}

#[test]
fn every_door_left_open_says_why() {
    let unit = unit();
    let reasons = &unit[unit.find("# What stays open, and why.").unwrap()..];
    for door in [
        "User=",
        "CAP_NET_ADMIN",
        "CAP_DAC_OVERRIDE",
        "PrivateNetwork=",
        "PrivateDevices=",
        "ProtectClock=",
        "ProtectHome=",
        "PrivateTmp=",
        "ProtectSystem=full",
        "ProcSubset=",
        "UMask=",
        "/sys is",
    ] {
        assert!(reasons.contains(door), "{door}");
    }
}

#[test]
fn the_group_and_the_directories_are_made_as_written() {
    let root = tempfile::tempdir().unwrap();
    fs::create_dir_all(root.path().join("etc")).unwrap();
    let under = format!("--root={}", root.path().display());
    let sysusers = dist().join("sysusers.d/tcmu-dif.conf");
    let out = run("systemd-sysusers", &[&under, sysusers.to_str().unwrap()]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let groups = fs::read_to_string(root.path().join("etc/group")).unwrap();
    assert!(groups.lines().any(|l| l.starts_with("tcmu-dif:")), "{groups}");

    // Without root the owners cannot be set; that the lines are understood is seen all the same.
    let tmpfiles = dist().join("tmpfiles.d/tcmu-dif.conf");
    let out = run("systemd-tmpfiles", &[&under, "--create", tmpfiles.to_str().unwrap()]);
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(!said.contains("tcmu-dif.conf:"), "{said}");
    for made in ["run/tcmu-dif", "var/lib/tcmu-dif"] {
        assert!(root.path().join(made).is_dir(), "{made}: {said}");
    }
}
