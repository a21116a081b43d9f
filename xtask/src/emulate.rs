//! `cargo xtask emulate-guard`: the guard kernels' tests on a processor that this machine may not have.
//!
//! Bochs interprets every instruction, AVX-512 and GFNI among them (QEMU's TCG has neither). Debian's kernel boots in it from a CD
//! with a small initramfs that holds the library's test program and what it is linked with; what it says comes over the serial
//! port. A few minutes on an idle machine.

use crate::{
    debian, sh,
    vm::{Cache, vmlinuz},
};
use anyhow::{Context, Result, bail};
use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

/// The kernels that are to be tested; one that cannot be run there is a failure.
const KERNELS: &str = "gfni,vpclmulqdq";

const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t devtmpfs dev /dev
export TCMU_DIF_SCALE=quick TCMU_DIF_GUARD_ONLY=KERNELS
/guard pi::guard:: --test-threads 1 --nocapture 2>&1
echo "STATUS $?"
/bin/busybox sleep 100000
"#;

/// Without what Bochs' processor does not have, or what only takes time.
const COMMAND_LINE: &str = "console=ttyS0 nokaslr mitigations=off nosmp noapic acpi=off pci=conf1 nopku clearcpuid=xsavec,xsaves quiet";

const MACHINE: &str = "\
cpu: model=MODEL, count=1, ips=50000000, reset_on_triple_fault=0
memory: guest=512, host=512
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
ata0-master: type=cdrom, path=boot.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=serial.txt
display_library: term
log: bochs.log
panic: action=fatal
error: action=report
info: action=ignore
debug: action=ignore
";

/// Builds, boots, waits, reports.
pub fn main(model: &str, profile: &str, patience: Duration) -> Result<ExitCode> {
    debian::ensure(debian::FOR_EMULATION)?;
    let at = &sh::target_dir().join("emulate-guard");
    if at.exists() {
        fs::remove_dir_all(at)?;
    }
    fs::create_dir_all(at)?;
    println!("building the tests ({profile})");
    let program = test_program(profile)?;
    let vmlinuz = vmlinuz(&Cache::open()?)?;
    disc(at, &program, &vmlinuz)?;
    fs::write(at.join("bochsrc"), MACHINE.replace("MODEL", model))?;
    // Debian's Bochs has its debugger built in, which waits to be told to go on.
    fs::write(at.join("go"), "c\n")?;
    println!("booting Debian's kernel in Bochs as {model}");
    let started = Instant::now();
    // Its display wants a terminal; `script` is one, and Bochs ends with it.
    let bochs = Command::new("script")
        .args(["-qfc", "bochs -q -f bochsrc -rc go", "/dev/null"])
        .env("TERM", "vt100")
        .current_dir(at)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot run script (of Debian's bsdutils)")?;
    let mut bochs = Running(bochs);
    let mut said = 0;
    loop {
        std::thread::sleep(Duration::from_millis(500));
        let serial =
            String::from_utf8_lossy(&fs::read(at.join("serial.txt")).unwrap_or_default()).into_owned();
        let whole = serial.rfind('\n').map_or(0, |end| end + 1);
        print!("{}", &serial[said.min(whole)..whole]);
        said = whole;
        if let Some(status) = serial[..whole].lines().find_map(|line| line.trim().strip_prefix("STATUS ")) {
            println!("after {} s", started.elapsed().as_secs());
            return Ok(if status == "0" { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        if let Some(status) = bochs.0.try_wait()? {
            let log = fs::read_to_string(at.join("bochs.log")).unwrap_or_default();
            bail!("Bochs ended with {status}: {}", log.lines().last().unwrap_or("no log"));
        }
        if started.elapsed() > patience {
            bail!("no result after {} s", patience.as_secs());
        }
    }
}

/// A process that ends with us.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Bochs loses its terminal with it, and ends.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Builds the library's tests and says where they lie.
fn test_program(profile: &str) -> Result<PathBuf> {
    let mut cargo = sh::cargo();
    cargo.args(["test", "--package", "tcmu-dif", "--lib", "--no-run", "--message-format", "json"]);
    cargo.args(["--profile", profile]);
    let messages = sh::quiet(&mut cargo)?;
    let program = messages.lines().find_map(|line| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        let ours = message["target"]["name"] == "tcmu_dif" && message["profile"]["test"] == true;
        ours.then(|| message["executable"].as_str().map(PathBuf::from))?
    });
    program.context("cargo names no program for the library's tests")
}

/// `boot.iso`: isolinux, the kernel, and an initramfs with the program and its libraries.
fn disc(at: &Path, program: &Path, vmlinuz: &Path) -> Result<()> {
    let (root, iso) = (at.join("root"), at.join("iso"));
    for dir in ["root/bin", "root/proc", "root/dev", "iso/isolinux"] {
        fs::create_dir_all(at.join(dir))?;
    }
    fs::copy("/bin/busybox", root.join("bin/busybox"))?;
    fs::write(root.join("init"), INIT.replace("KERNELS", KERNELS))?;
    fs::set_permissions(root.join("init"), fs::Permissions::from_mode(0o755))?;
    sh::quiet(Command::new("strip").arg("-o").arg(root.join("guard")).arg(program))?;
    let linked = sh::quiet(Command::new("ldd").arg(program))?;
    for library in linked.split_whitespace().filter(|word| word.starts_with('/')) {
        let to = root.join(library.trim_start_matches('/'));
        fs::create_dir_all(to.parent().unwrap_or(&root))?;
        fs::copy(library, to)?;
    }
    let pack =
        "set -e; find . -print0 | cpio --null --create --format=newc --quiet | gzip -1 > ../iso/initrd.gz";
    sh::quiet(Command::new("sh").args(["-c", pack]).current_dir(&root))?;
    fs::copy(vmlinuz, iso.join("vmlinuz"))?;
    for file in ["/usr/lib/ISOLINUX/isolinux.bin", "/usr/lib/syslinux/modules/bios/ldlinux.c32"] {
        let name = Path::new(file).file_name().unwrap_or_default();
        fs::copy(file, iso.join("isolinux").join(name)).with_context(|| format!("cannot copy {file}"))?;
    }
    let menu = format!("DEFAULT l\nLABEL l\nKERNEL /vmlinuz\nINITRD /initrd.gz\nAPPEND {COMMAND_LINE}\n");
    fs::write(iso.join("isolinux/isolinux.cfg"), menu)?;
    let mut make = Command::new("xorriso");
    make.args(["-as", "mkisofs", "-quiet", "-o", "boot.iso", "-b", "isolinux/isolinux.bin"]);
    make.args([
        "-c",
        "isolinux/boot.cat",
        "-no-emul-boot",
        "-boot-load-size",
        "4",
        "-boot-info-table",
        "iso",
    ]);
    sh::quiet(make.current_dir(at))?;
    Ok(())
}
