//! `tcmu-dif support-bundle` on made-up folders: no kernel, no service, no root is needed.
#![allow(clippy::unwrap_used)] // A test may panic.

use std::{
    collections::BTreeMap,
    fs,
    io::Read,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use serde_json::Value;
use tcmu_dif::control::{Registry, server::Server};

#[path = "common/configfs.rs"]
mod configfs;

use configfs::Configfs;

/// What must never be in a bundle.
const DATA: &str = "what-a-guest-wrote";

struct Host {
    dir: tempfile::TempDir,
    configfs: Configfs,
}

impl Host {
    /// A LUN in configfs, exported twice; state files of a daemon, the record of a ring among them.
    fn new() -> Host {
        let dir = tempfile::tempdir().unwrap();
        let configfs = Configfs::in_dir(dir.path());
        let lun = configfs.lun(0, "vm1");
        configfs.export(&lun, "vhost", "naa.50014055a675866c");
        let iscsi = configfs.export(&lun, "iscsi", "iqn.2003-01.org.example:vm1");
        fs::create_dir_all(configfs.root.join(&iscsi).join("auth")).unwrap();
        fs::write(configfs.root.join(&iscsi).join("auth/password"), "hunter2\n").unwrap();
        for folder in ["run/luns", "run/rings", "state/scrub"] {
            fs::create_dir_all(dir.path().join(folder)).unwrap();
        }
        fs::write(dir.path().join("run/luns/vm1.json"), "{ \"name\": \"vm1\" }").unwrap();
        fs::write(dir.path().join("run/rings/uio0"), DATA).unwrap();
        fs::write(dir.path().join("run/daemon.pid"), "12345\n").unwrap();
        fs::write(dir.path().join("state/scrub/abc-1.json"), "{}").unwrap();
        Host { dir, configfs }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn bundle(&self, output: &str) -> Output {
        Command::new(env!("CARGO_BIN_EXE_tcmu-dif"))
            .args(["support-bundle", "--output", output, "--run-dir", "run", "--state-dir", "state"])
            .arg("--configfs")
            .arg(&self.configfs.root)
            .current_dir(self.dir.path())
            .env_remove("TCMU_DIF_LOG")
            .output()
            .unwrap()
    }
}

/// The files of a bundle, by their names in its folder.
fn unpacked(path: &Path) -> BTreeMap<String, String> {
    let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(fs::File::open(path).unwrap()));
    let mut out = BTreeMap::new();
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let name = entry.path().unwrap().to_str().unwrap().to_owned();
        let mut text = String::new();
        entry.read_to_string(&mut text).unwrap();
        out.insert(name.strip_prefix("tcmu-dif-support/").unwrap().to_owned(), text);
    }
    out
}

#[test]
fn a_bundle_has_what_the_help_promises_and_no_data() {
    let host = Host::new();
    let server = Server::listen(&host.at("run/qmp.sock"), Registry::default()).unwrap();
    let out = host.bundle("b.tar.gz");
    drop(server);
    assert!(out.status.success(), "{out:?}");
    assert!(String::from_utf8_lossy(&out.stdout).starts_with("b.tar.gz ("), "{out:?}");
    let mode = fs::metadata(host.at("b.tar.gz")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    let files = unpacked(&host.at("b.tar.gz"));
    let contents = &files["contents.txt"];
    assert!(files["version.txt"].contains(env!("CARGO_PKG_VERSION")));
    assert!(files["kernel.txt"].starts_with("Linux "));
    assert!(files["modules.txt"].contains("target_core_user: "));
    let objects = &files["configfs.txt"];
    for line in [
        "target/core/user_0/vm1/attrib/dev_config: dif//images/vm1.raw\n",
        "target/core/user_0/vm1/enable: 1\n",
        "target/vhost/naa.50014055a675866c/tpgt_1/lun/lun_0/vm1 -> target/core/user_0/vm1\n",
        "target/iscsi/iqn.2003-01.org.example:vm1/tpgt_1/lun/lun_0/vm1 -> target/core/user_0/vm1\n",
    ] {
        assert!(objects.contains(line), "{line}: {objects}");
    }
    assert_eq!(files["run/luns/vm1.json"], "{ \"name\": \"vm1\" }");
    assert_eq!(files["run/daemon.pid"], "12345\n");
    assert!(files["run/listing.txt"].contains(&format!("{:>10} rings/uio0\n", DATA.len())));
    assert!(files["state.txt"].contains("scrub/abc-1.json"));
    let list: Value = serde_json::from_str(&files["list.json"]).unwrap();
    assert_eq!((&list[0]["name"], &list[0]["serial"]), (&"vm1".into(), &"abc-1".into()));
    let checks: Value = serde_json::from_str(&files["check-host.json"]).unwrap();
    assert!(checks["checks"].as_array().unwrap().iter().any(|c| c["what"] == "kernel"), "{checks}");
    for question in ["version", "luns", "block", "blockstats", "pi", "jobs"] {
        let answer = &files[&format!("qmp/query-{question}.json")];
        assert!(serde_json::from_str::<Value>(answer).is_ok(), "{question}: {answer}");
        assert!(contents.contains("qmp: "), "{contents}");
    }
    // These depend on the machine: they are there, or it is said why not.
    for name in ["journal.txt", "unit.txt", "settings"] {
        let there = files.keys().any(|k| k == name || k.starts_with(&format!("{name}/")));
        assert!(
            there || contents.lines().any(|l| l.starts_with(name) && l.contains("NOT THERE: ")),
            "{contents}"
        );
    }
    for (name, text) in &files {
        assert!(!text.contains(DATA) && !text.contains("hunter2"), "{name}: {text}");
    }
}

#[test]
fn what_fails_is_noted_and_the_rest_is_there() {
    let host = Host::new();
    fs::remove_dir_all(host.at("run")).unwrap();
    fs::remove_dir_all(&host.configfs.root).unwrap();
    let out = host.bundle("b.tar.gz");
    assert!(out.status.success(), "{out:?}");
    let files = unpacked(&host.at("b.tar.gz"));
    let (contents, said) = (&files["contents.txt"], String::from_utf8(out.stdout).unwrap());
    for name in ["configfs.txt", "run", "qmp"] {
        assert!(
            contents.lines().any(|l| l.starts_with(&format!("{name}: ")) && l.contains("NOT THERE: ")),
            "{contents}"
        );
        assert!(said.contains(&format!("\nnot in it: {name}: ")), "{said}");
    }
    assert!(contents.contains("no daemon listens") && files.contains_key("kernel.txt"), "{contents}");
}

#[test]
fn what_is_there_is_not_overwritten_and_nothing_half_made_remains() {
    let host = Host::new();
    fs::write(host.at("mine"), "mine").unwrap();
    std::os::unix::fs::symlink("nowhere", host.at("link")).unwrap();
    let before = fs::read_dir(host.dir.path()).unwrap().count();
    for (output, why) in [
        ("mine", "there already"),
        ("link", "there already"),
        ("none/b.tar.gz", "No such file"),
        ("run", "there already"),
    ] {
        let out = host.bundle(output);
        let said = String::from_utf8(out.stderr).unwrap();
        assert_eq!((out.status.code(), out.stdout.len()), (Some(1), 0), "{output}: {said}");
        assert!(
            said.contains(output) && said.contains(why) && said.contains("\n  next: "),
            "{output}: {said}"
        );
    }
    assert_eq!(fs::read(host.at("mine")).unwrap(), b"mine");
    assert_eq!(fs::read_dir(host.dir.path()).unwrap().count(), before);
    assert!(!host.at("nowhere").exists());
}
