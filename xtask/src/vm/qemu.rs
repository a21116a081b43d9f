//! QEMU's command line, and the question whether KVM really works here.
//!
//! `/dev/kvm` exists on some machines and opens, yet cannot run a stock kernel. So a probe boots the very kernel the
//! tests use, with a short time limit; its answer is kept until the machine is booted anew.

use super::artefacts::Artefacts;
use super::cache::Cache;
use super::protocol::PORT_NAME;
use anyhow::{Context, Result};
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const PROBE_LIMIT: Duration = Duration::from_secs(10);
const KERNEL_WORDS: &str = "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable random.trust_cpu=on";

/// More of them under translation. What is translated is found again by its virtual address as well as by its physical one: with addresses that are
/// chosen anew for each process, every program would be translated anew whenever it is run, and that takes four times as long as running it.
const TCG_WORDS: &str = "norandmaps";

/// The disk with the programs, in a run's folder.
pub const PROGRAMS: &str = "programs.tar";

/// The word with which systemd is the guest's process 1; such a guest can be rebooted.
pub const SYSTEMD: &str = "systemd systemd.unit=multi-user.target";

/// How the guest's processors are run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accel {
    /// By the host's processors.
    Kvm,
    /// By translation.
    Tcg,
}

impl Accel {
    fn args(self) -> &'static [&'static str] {
        match self {
            Self::Kvm => &["-accel", "kvm", "-cpu", "host"],
            // Processors that say they move strings of bytes fast (ERMS, FSRM) have copies between kernel and user done byte by byte, and the
            // emulator takes a turn for each: a copy would cost eight times what it costs within the kernel.
            Self::Tcg => &["-accel", "tcg,thread=multi", "-cpu", "max,-erms,-fsrm"],
        }
    }

    fn words(self) -> &'static str {
        match self {
            Self::Kvm => "",
            Self::Tcg => TCG_WORDS,
        }
    }

    /// The name that people know it by.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }

    /// What works on this machine, from this boot's probe.
    pub fn of_this_machine(cache: &Cache, artefacts: &Artefacts) -> Result<Self> {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let note = cache.file("accel");
        let known = fs::read_to_string(&note).unwrap_or_default();
        for accel in [Self::Kvm, Self::Tcg] {
            if known == format!("{} {}\n", boot.trim(), accel.name()) {
                return Ok(accel);
            }
        }
        let accel = if kvm_boots(artefacts)? { Self::Kvm } else { Self::Tcg };
        let temporary = cache.file(&format!("accel.{}", std::process::id()));
        fs::write(&temporary, format!("{} {}\n", boot.trim(), accel.name()))?;
        fs::rename(&temporary, &note)?;
        println!("the VM runs under {} on this machine", accel.name());
        Ok(accel)
    }
}

fn kvm_boots(artefacts: &Artefacts) -> Result<bool> {
    if fs::File::options().read(true).write(true).open("/dev/kvm").is_err() {
        return Ok(false);
    }
    let mut qemu = base(Accel::Kvm, artefacts, "probe", 256);
    let mut child = qemu
        .args(["-serial", "stdio"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot start qemu-system-x86_64")?;
    let started = Instant::now();
    while started.elapsed() < PROBE_LIMIT && child.try_wait()?.is_none() {
        thread::sleep(Duration::from_millis(50));
    }
    let _ = child.kill();
    let output = child.wait_with_output()?;
    Ok(String::from_utf8_lossy(&output.stdout).contains("tcmu-dif probe: up"))
}

/// QEMU with the kernel and nothing else. It dies with the thread that starts it.
fn base(accel: Accel, artefacts: &Artefacts, words: &str, memory_mib: u32) -> Command {
    let mut qemu = Command::new("setpriv");
    qemu.args(["--pdeathsig", "KILL", "qemu-system-x86_64"])
        .args(accel.args())
        .args(["-smp", "2", "-nographic", "-nodefaults"])
        .args(["-m", &memory_mib.to_string()])
        .arg("-kernel")
        .arg(&artefacts.kernel)
        .arg("-initrd")
        .arg(&artefacts.initramfs)
        .args(["-append", &format!("{KERNEL_WORDS} {} {words}", accel.words())]);
    if words != SYSTEMD {
        // What panics ends, and is not tried for ever.
        qemu.arg("-no-reboot");
    }
    qemu
}

/// QEMU with disks and the share, for a run whose files are in `dir`.
pub fn machine(accel: Accel, artefacts: &Artefacts, dir: &Path, words: &str, memory_mib: u32) -> Command {
    let mut qemu = base(accel, artefacts, words, memory_mib);
    let drive = |id: &str, path: &Path, more: &str| {
        let path = path.to_string_lossy().replace(',', ",,");
        format!("id={id},if=none,format=raw,cache=unsafe,{more},file={path}")
    };
    let share = dir.join("share").to_string_lossy().replace(',', ",,");
    qemu.args(["-drive", &drive("root", &artefacts.rootfs, "snapshot=on")])
        .args(["-device", "virtio-blk-pci,drive=root"])
        .args(["-drive", &drive("scratch", &dir.join("scratch.ext4"), "discard=unmap")])
        .args(["-device", "virtio-blk-pci,drive=scratch"])
        .args(["-drive", &drive("programs", &dir.join(PROGRAMS), "readonly=on")])
        .args(["-device", "virtio-blk-pci,drive=programs"])
        .args(["-virtfs", &format!("local,path={share},mount_tag=host,security_model=none")])
        .args(["-device", "virtio-rng-pci"])
        .env("TMPDIR", dir);
    qemu
}

/// A guest's end of a cable between two.
#[derive(Clone, Copy, Debug)]
pub enum Cable<'a> {
    /// The end that listens at this socket, and is there first.
    First(&'a Path),
    /// The other one.
    Second(&'a Path),
}

/// Adds a network card at one end of a cable: there is nobody else on that network.
pub fn with_cable(qemu: &mut Command, cable: Cable<'_>) {
    let (server, last, path) = match cable {
        Cable::First(path) => ("on", 1, path),
        Cable::Second(path) => ("off", 2, path),
    };
    let path = path.to_string_lossy().replace(',', ",,");
    qemu.args([
        "-netdev",
        &format!("stream,id=cable,server={server},addr.type=unix,addr.path={path}"),
        "-device",
        &format!("virtio-net-pci,netdev=cable,mac=52:54:00:00:00:{last:02x},romfile="),
    ]);
}

/// Adds the port of the command channel, which QEMU connects to the socket at `socket`.
pub fn with_channel(qemu: &mut Command, socket: &Path) {
    qemu.args(["-chardev", &format!("socket,id=agent,path={}", socket.display())])
        .args(["-device", "virtio-serial-pci"])
        .args(["-device", &format!("virtserialport,chardev=agent,name={PORT_NAME}")]);
}
