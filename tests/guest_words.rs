//! What `show --libvirt` and `show --qemu` print, by the judgement of those who are to read it.
//!
//! libvirt's schema takes the element in a domain, so `virsh define` does not refuse it for its form; QEMU's device knows every property. What is
//! not shown here: that libvirt starts the domain, and that QEMU opens the target: both need the kernel's vhost-scsi. (The second is shown by the VM
//! suite, where a guest of QEMU writes to such a device and is rebooted.)
#![allow(clippy::unwrap_used)] // A test may panic.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

#[path = "common/configfs.rs"]
mod configfs;

use configfs::Configfs;

const WWPN: &str = "naa.50014055a675866c";

/// `show` of a LUN with a vhost export, in a made-up configfs.
fn show(word: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    let configfs = Configfs::in_dir(dir.path());
    let lun = configfs.lun(0, "vm1");
    configfs.export(&lun, "loopback", "naa.5001405aa1b2c3d4");
    configfs.export(&lun, "vhost", WWPN);
    let out = Command::new(env!("CARGO_BIN_EXE_tcmu-dif"))
        .args(["show", "vm1", word, "--run-dir"])
        .arg(dir.path().join("run"))
        .arg("--configfs")
        .arg(&configfs.root)
        .env_remove("TCMU_DIF_LOG")
        .output()
        .unwrap();
    assert!(out.status.success(), "{out:?}");
    String::from_utf8(out.stdout).unwrap()
}

fn run(program: &str, package: &str, args: &[&str]) -> Output {
    Command::new(program).args(args).output().unwrap_or_else(|e| {
        panic!("{program} cannot be run ({e}); Debian has it in {package}: apt-get install {package}")
    })
}

/// libvirt's schema on the smallest domain around that device.
fn validate(dir: &Path, device: &str) -> Output {
    let path = dir.join("domain.xml");
    let domain = format!(
        "<domain type='kvm'>\n<name>vm1</name>\n<memory>1048576</memory>\n<vcpu>1</vcpu>\n\
         <os><type arch='x86_64' machine='q35'>hvm</type></os>\n<devices>\n{device}\n</devices>\n</domain>\n"
    );
    fs::write(&path, domain).unwrap();
    run("virt-xml-validate", "libvirt-clients", &[path.to_str().unwrap(), "domain"])
}

#[test]
fn libvirt_s_schema_takes_the_printed_element_in_a_domain() {
    let dir = tempfile::tempdir().unwrap();
    let xml = show("--libvirt");
    assert!(xml.contains(WWPN), "{xml}");
    let out = validate(dir.path(), &xml);
    assert!(out.status.success(), "{out:?}");
}

#[test]
fn a_fault_in_the_element_would_be_found() {
    let dir = tempfile::tempdir().unwrap();
    let xml = show("--libvirt");
    for (right, wrong) in
        [("wwpn=", "wwn="), (WWPN, "naa.5"), ("'vhost'", "'virtio'"), ("scsi_host", "scsi_hosts")]
    {
        let faulty = xml.replace(right, wrong);
        assert_ne!(faulty, xml);
        assert!(!validate(dir.path(), &faulty).status.success(), "{faulty}");
    }
}

#[test]
fn qemu_s_device_has_every_printed_property() {
    let words = show("--qemu");
    let words: Vec<&str> = words.split_whitespace().collect();
    let ["-device", device] = words[..] else { panic!("{words:?}") };
    let mut parts = device.split(',');
    let driver = parts.next().unwrap();
    let help = format!("{driver},help");
    let out = run("qemu-system-x86_64", "qemu-system-x86", &["-machine", "none", "-device", &help]);
    let said = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success() && said.starts_with(driver), "{out:?}");
    let known = |property: &str| {
        said.lines().any(|l| l.trim_start().split('=').next().is_some_and(|name| name == property))
    };
    let properties: Vec<&str> = parts.filter_map(|p| p.split('=').next()).collect();
    assert_eq!(properties, ["wwpn"]);
    for property in properties {
        assert!(known(property), "{property}: {said}");
    }
    assert!(!known("wwn") && !known("wwpns"), "the help is read by whole names");
}

#[test]
fn a_lun_without_such_an_export_is_refused_with_the_next_step() {
    let dir = tempfile::tempdir().unwrap();
    let configfs = Configfs::in_dir(dir.path());
    let lun = configfs.lun(0, "vm1");
    configfs.export(&lun, "loopback", "naa.5001405aa1b2c3d4");
    for word in ["--libvirt", "--qemu"] {
        let out = Command::new(env!("CARGO_BIN_EXE_tcmu-dif"))
            .args(["show", "vm1", word, "--run-dir"])
            .arg(dir.path().join("run"))
            .arg("--configfs")
            .arg(&configfs.root)
            .output()
            .unwrap();
        assert_eq!(out.status.code(), Some(1), "{out:?}");
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(said.contains("vm1") && said.contains("next: ") && said.contains("--export vhost"), "{said}");
    }
}
