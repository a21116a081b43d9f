//! Debian's kernel, a small initramfs, Debian's root file system and an empty scratch disk, from the cache.
//!
//! The kernel is downloaded and unpacked, never installed. The initramfs only finds the root file system and the host's
//! share, and hands over to the init script that lies there, so that what happens in the guest is not baked into anything.

use super::{cache::Cache, module};
use crate::{debian, sh};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The kernel's meta package; the image package it names is the one that is unpacked.
const KERNEL_PACKAGE: &str = "linux-image-6.12-amd64";

/// Modules without which the guest finds neither its disks nor the host's share, in modprobe's names.
const BOOT_MODULES: &[&str] = &["virtio_blk", "ext4", "9p", "9pnet_virtio"];

/// The same for a guest inside the guest, whose disk is our LUN.
const INNER_MODULES: &[&str] = &["virtio_scsi", "sd_mod", "ext4"];

const RELEASE: &str = "bookworm";

/// What the tests call in the guest.
const GUEST_PACKAGES: &[&str] = &[
    "bash",
    "cpio",
    "curl",
    "dbus",
    "dmsetup",
    "e2fsprogs",
    "fio",
    "iproute2",
    "kmod",
    "libiscsi-bin",
    "lsscsi",
    "procps",
    "python3",
    "qemu-system-x86",
    "qemu-utils",
    "sdparm",
    "sg3-utils",
    "strace",
    "systemd",
    "targetcli-fb",
    "tcmu-runner",
    "udev",
    "util-linux",
];

/// Size of the scratch disk, in bytes; sparse, so only what a test writes takes room.
const SCRATCH_SIZE: u64 = 12 << 30;

const INITRAMFS_INIT: &str = include_str!("guest/initramfs-init.sh");
const INNER_INIT: &str = include_str!("guest/inner-init.sh");

/// Where everything lies that a boot needs.
#[derive(Clone, Debug)]
pub struct Artefacts {
    /// The kernel's image.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initramfs: PathBuf,
    /// The root file system, ext4; never written to.
    pub rootfs: PathBuf,
    /// An empty ext4 file system to copy for every boot.
    pub scratch: PathBuf,
    /// target_core_user.ko with our change, which a test loads in place of the stock one.
    pub module: PathBuf,
    /// Kernel and initramfs of a guest inside the guest: `vmlinux`, `initramfs`.
    pub inner: PathBuf,
}

/// Takes the artefacts from the cache, building what is not there.
pub fn prepare(cache: &Cache) -> Result<Artefacts> {
    debian::ensure(debian::FOR_VM)?;
    let kernel = kernel(cache)?;
    let kernel_name = kernel.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let initramfs = cache.artefact(
        "initramfs",
        &format!("1\n{kernel_name}\n{}\n{INITRAMFS_INIT}", BOOT_MODULES.join(" ")),
        |at| build_initramfs(&kernel, at, BOOT_MODULES, INITRAMFS_INIT, "zstd -q -6 > ../initramfs.zst"),
    )?;
    let inner = cache.artefact(
        "inner",
        &format!("2\n{kernel_name}\n{}\n{INNER_INIT}", INNER_MODULES.join(" ")),
        |at| build_inner(&kernel, at),
    )?;
    let rootfs = cache.artefact(
        "rootfs",
        &format!("1\n{kernel_name}\n{RELEASE}\n{}\n", GUEST_PACKAGES.join(" ")),
        |at| build_rootfs(&kernel, at),
    )?;
    let scratch = cache.artefact("scratch", &format!("1\n{SCRATCH_SIZE}\n"), build_scratch)?;
    let module = cache.artefact("module", &module::recipe(&kernel_name), |at| module::build(&kernel, at))?;
    Ok(Artefacts {
        module: module.join("target_core_user.ko"),
        inner,
        kernel: kernel.join("vmlinuz"),
        initramfs: initramfs.join("initramfs.zst"),
        rootfs: rootfs.join("rootfs.ext4"),
        scratch: scratch.join("scratch.ext4"),
    })
}

fn kernel(cache: &Cache) -> Result<PathBuf> {
    cache.artefact("kernel", &format!("1\n{KERNEL_PACKAGE}\n"), build_kernel)
}

/// The kernel's image alone.
pub fn vmlinuz(cache: &Cache) -> Result<PathBuf> {
    Ok(kernel(cache)?.join("vmlinuz"))
}

fn build_kernel(at: &Path) -> Result<()> {
    let depends = || sh::run("apt-cache", ["depends", "--no-suggests", KERNEL_PACKAGE]);
    let named = |text: &str| {
        text.lines()
            .filter_map(|line| line.trim().strip_prefix("Depends: "))
            .find(|name| name.starts_with("linux-image-"))
            .map(str::to_owned)
    };
    let mut package = depends().ok().as_deref().and_then(named);
    if package.is_none() && rustix::process::geteuid().is_root() {
        sh::run("apt-get", ["update", "-qq"])?;
        package = named(&depends()?);
    }
    let Some(package) = package else {
        bail!("apt knows no package {KERNEL_PACKAGE}; `apt-get update` as root may mend that");
    };
    unpack_kernel(&package, at)?;
    fs::write(at.join("package"), &package)?;
    Ok(())
}

/// Downloads a kernel's package; gives a folder its image as `vmlinuz`, and its modules.
fn unpack_kernel(package: &str, at: &Path) -> Result<()> {
    sh::quiet(Command::new("apt-get").args(["download", "-qq", package]).current_dir(at))?;
    let archive = only_entry(at, ".deb")?;
    let unpacked = at.join("unpacked");
    sh::quiet(Command::new("dpkg-deb").arg("-x").arg(&archive).arg(&unpacked))?;
    fs::rename(only_entry(&unpacked.join("boot"), "vmlinuz-")?, at.join("vmlinuz"))?;
    fs::rename(unpacked.join("lib"), at.join("lib"))?;
    fs::remove_dir_all(&unpacked)?;
    fs::remove_file(&archive)?;
    sh::quiet(Command::new("depmod").arg("-b").arg(at).arg(version(at)?))?;
    Ok(())
}

/// What a guest inside the guest boots: Debian's kernel for virtual machines, of the same version, which has less to set up; and
/// nothing of it compressed, since unpacking takes minutes where an emulator runs in an emulator.
fn build_inner(kernel: &Path, at: &Path) -> Result<()> {
    let package = fs::read_to_string(kernel.join("package"))?.replace("-amd64", "-cloud-amd64");
    unpack_kernel(&package, at)?;
    unpack_vmlinux(at)?;
    build_initramfs(at, at, INNER_MODULES, INNER_INIT, "cat > ../initramfs")?;
    fs::remove_dir_all(at.join("lib"))?;
    Ok(())
}

/// Takes the ELF file out of a kernel's image (Documentation/arch/x86/boot.rst: `setup_sects`, `payload_offset`,
/// `payload_length`; the payload ends with its unpacked length).
fn unpack_vmlinux(at: &Path) -> Result<()> {
    let image = fs::read(at.join("vmlinuz"))?;
    let word = |at: usize| {
        image.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes) as usize
    };
    let setup_sectors = image.get(0x1f1).copied().map_or(0, usize::from);
    let start = (setup_sectors + 1) * 512 + word(0x248);
    let end = (start + word(0x24c)).saturating_sub(4);
    let Some(payload) = image.get(start..end) else {
        bail!("the kernel's image has no payload where its header says")
    };
    let program = match payload {
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "zstd",
        [0xfd, b'7', b'z', b'X', ..] => "xz",
        [0x1f, 0x8b, ..] => "gzip",
        _ => bail!("the kernel is packed in a way that is not known here"),
    };
    fs::write(at.join("payload"), payload)?;
    let unpack = format!("{program} -dc < payload > vmlinux && rm payload vmlinuz");
    sh::quiet(Command::new("sh").args(["-c", &unpack]).current_dir(at))?;
    Ok(())
}

/// The kernel's version: the one folder under `lib/modules`.
pub fn version(kernel: &Path) -> Result<String> {
    let modules = only_entry(&kernel.join("lib/modules"), "")?;
    Ok(modules.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default())
}

/// The first entry of a folder whose name contains `part`.
pub fn only_entry(dir: &Path, part: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))?;
    for entry in entries {
        let entry = entry?;
        if entry.file_name().to_string_lossy().contains(part) {
            return Ok(entry.path());
        }
    }
    bail!("nothing called *{part}* in {}", dir.display())
}

/// Packs an initramfs with `pack`, a command whose input is the archive and which writes beside the folder that it runs in.
fn build_initramfs(kernel: &Path, at: &Path, modules: &[&str], init: &str, pack: &str) -> Result<()> {
    let root = at.join("root");
    for dir in ["bin", "dev", "proc", "sys", "newroot", "modules"] {
        fs::create_dir_all(root.join(dir))?;
    }
    fs::copy("/bin/busybox", root.join("bin/busybox"))?;
    fs::write(root.join("init"), init)?;
    sh::quiet(Command::new("chmod").arg("755").arg(root.join("init")))?;
    let mut shown = Command::new("modprobe");
    shown.arg("-d").arg(kernel).args(["-S", &version(kernel)?, "--show-depends", "--all"]).args(modules);
    let mut seen = Vec::new();
    for line in sh::quiet(&mut shown)?.lines() {
        let Some(path) = line.strip_prefix("insmod ").map(str::trim) else {
            continue;
        };
        if seen.iter().any(|had| had == path) {
            continue;
        }
        // Numbered, because init loads them in the order of their names.
        let to = root.join(format!("modules/{:02}.ko", seen.len()));
        unpack_module(Path::new(path), &to)?;
        seen.push(path.to_owned());
    }
    let script = format!("set -e; find . -print0 | cpio --null --create --format=newc --quiet | {pack}");
    sh::quiet(Command::new("sh").args(["-c", &script]).current_dir(&root))?;
    fs::remove_dir_all(&root)?;
    Ok(())
}

fn unpack_module(from: &Path, to: &Path) -> Result<()> {
    let packed = from.extension().is_some_and(|end| end == "xz");
    if !packed {
        fs::copy(from, to)?;
        return Ok(());
    }
    let file = fs::File::create(to)?;
    let status = Command::new("xz").arg("-dc").arg(from).stdout(file).status()?;
    if !status.success() {
        bail!("xz cannot unpack {}", from.display());
    }
    Ok(())
}

fn build_rootfs(kernel: &Path, at: &Path) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("debootstrap needs root: run `sudo -E cargo xtask vm prepare` once");
    }
    let root = at.join("root");
    sh::quiet(
        Command::new("debootstrap")
            .arg("--variant=minbase")
            .arg(format!("--include={}", GUEST_PACKAGES.join(",")))
            .arg(RELEASE)
            .arg(&root),
    )?;
    for emptied in ["var/cache/apt/archives", "var/lib/apt/lists"] {
        fs::remove_dir_all(root.join(emptied))?;
        fs::create_dir_all(root.join(emptied))?;
    }
    for dir in ["host", "scratch", "etc/target/pr", "var/target/pr", "var/target/alua"] {
        fs::create_dir_all(root.join(dir))?;
    }
    fs::write(root.join("etc/hostname"), "guest\n")?;
    fs::write(root.join("etc/hosts"), "127.0.0.1 localhost guest\n")?;
    sh::quiet(Command::new("cp").arg("-a").arg(kernel.join("lib/modules")).arg(root.join("usr/lib/")))?;
    let image = at.join("rootfs.ext4");
    fs::File::create(&image)?.set_len(3 << 30)?;
    sh::quiet(
        Command::new("mkfs.ext4")
            .args(["-q", "-F", "-L", "root", "-O", "^has_journal", "-d"])
            .arg(&root)
            .arg(&image),
    )?;
    fs::remove_dir_all(&root)?;
    Ok(())
}

fn build_scratch(at: &Path) -> Result<()> {
    let image = at.join("scratch.ext4");
    fs::File::create(&image)?.set_len(SCRATCH_SIZE)?;
    sh::quiet(
        Command::new("mkfs.ext4").args(["-q", "-F", "-L", "scratch", "-O", "^has_journal"]).arg(&image),
    )?;
    Ok(())
}
