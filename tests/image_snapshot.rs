//! `image snapshot`, `image resize` and the snapshots in `image info`, side by side with qemu-img on the same images.
#![allow(clippy::unwrap_used)] // A test may panic.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
};

use serde_json::Value;

const BIN: &str = env!("CARGO_BIN_EXE_tcmu-dif");

struct Dir(tempfile::TempDir);

impl Dir {
    fn new() -> Dir {
        Dir(tempfile::tempdir().unwrap())
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn run(&self, program: &str, words: &str) -> Output {
        // QEMU's list is in local time: a zone that is not the one dates are counted in.
        let out = Command::new(program)
            .args(words.split_whitespace())
            .current_dir(self.0.path())
            .env("TZ", "Asia/Kolkata")
            .env_remove("TCMU_DIF_LOG")
            .output();
        out.unwrap_or_else(|e| panic!("{program} cannot be run ({e}); these tests need qemu-utils"))
    }

    #[track_caller]
    fn must(&self, program: &str, words: &str) -> String {
        let out = self.run(program, words);
        assert!(out.status.success(), "{program} {words}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    }

    #[track_caller]
    fn ours(&self, words: &str) -> String {
        self.must(BIN, &format!("image {words}"))
    }

    #[track_caller]
    fn qemu(&self, words: &str) -> String {
        self.must("qemu-img", words)
    }

    /// Runs ours; gives what it says when it refuses.
    #[track_caller]
    fn refused(&self, words: &str, status: i32) -> String {
        let before = contents(self.0.path());
        let out = self.run(BIN, &format!("image {words}"));
        let said = String::from_utf8(out.stderr).unwrap();
        assert_eq!(out.status.code(), Some(status), "{words}: {said}");
        assert!(said.starts_with("tcmu-dif: ") && said.contains("\n  next: "), "{words}: {said}");
        assert!(contents(self.0.path()) == before, "{words} changed something");
        said
    }
}

fn contents(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut all: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().path())
        .map(|p| (p.clone(), std::fs::read(p).unwrap()))
        .collect();
    all.sort();
    all
}

fn trimmed(text: &str) -> Vec<&str> {
    text.lines().map(str::trim_end).collect()
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

#[test]
fn lists_and_infos_are_those_of_qemu_img_whoever_made_the_snapshots() {
    let dir = Dir::new();
    dir.ours("create -f qcow2 a.qcow2 4M");
    assert_eq!((dir.ours("snapshot -l a.qcow2"), dir.qemu("snapshot -l a.qcow2")), Default::default());
    assert_eq!(json(&dir.ours("info --json a.qcow2")).get("snapshots"), None);
    dir.ours("snapshot -c ours a.qcow2");
    dir.qemu("snapshot -c theirs a.qcow2");
    dir.ours("snapshot -c a-name-that-is-longer-than-its-column a.qcow2");
    for words in ["snapshot -l a.qcow2", "snapshot a.qcow2"] {
        let (ours, theirs) = (dir.ours(words), dir.qemu("snapshot -l a.qcow2"));
        assert_eq!(trimmed(&ours), trimmed(&theirs));
        assert_eq!(ours.lines().count(), 5);
    }
    let (ours, theirs) = (dir.ours("info --json a.qcow2"), dir.qemu("info --output=json a.qcow2"));
    assert_eq!(json(&ours)["snapshots"], json(&theirs)["snapshots"]);
    assert_eq!(json(&ours)["snapshots"], json(&dir.ours("snapshot --json a.qcow2")));
    let (ours, theirs) = (dir.ours("info a.qcow2"), dir.qemu("info a.qcow2"));
    let part = |text: &str| {
        let lines = trimmed(text).into_iter().map(str::to_owned);
        lines
            .skip_while(|l| l != "Snapshot list:")
            .take_while(|l| !l.contains("specific"))
            .collect::<Vec<_>>()
    };
    assert_eq!(part(&ours), part(&theirs));
    assert_eq!(part(&ours).len(), 5);
    // Each takes the other's away.
    dir.qemu("snapshot -d ours a.qcow2");
    dir.ours("snapshot -d theirs a.qcow2");
    dir.ours("snapshot -a 3 a.qcow2");
    dir.ours("snapshot -d snapshot.id=3 a.qcow2");
    assert_eq!(dir.ours("snapshot --json a.qcow2").trim(), "[]");
    dir.qemu("check a.qcow2");
}

#[test]
fn what_does_not_fit_is_refused_with_the_next_step() {
    let dir = Dir::new();
    dir.ours("create -f qcow2 a.qcow2 4M");
    dir.ours("create -f raw r.raw 1M");
    dir.ours("snapshot -c one a.qcow2");
    let said = dir.refused("snapshot -a two a.qcow2", 1);
    assert!(
        said.contains("could not apply snapshot 'two'") && said.contains("snapshot -l a.qcow2"),
        "{said}"
    );
    assert!(dir.refused("snapshot -d two a.qcow2", 1).contains("there is no snapshot 'two'"));
    assert!(dir.refused("snapshot -c one a.qcow2", 1).contains("the ID 1"));
    assert!(dir.refused("snapshot -c one r.raw", 1).contains("raw image"));
    assert_eq!(dir.ours("snapshot -l r.raw"), "");
    dir.refused("snapshot -l -c two a.qcow2", 2);
    dir.refused("snapshot -U -c two a.qcow2", 2);
    dir.refused("snapshot -l none.qcow2", 1);
    // Two of one name, as qemu-img makes them.
    dir.qemu("snapshot -c one a.qcow2");
    let said = dir.refused("snapshot -d one a.qcow2", 1);
    assert!(said.contains("1, 2") && said.contains("snapshot.id=1"), "{said}");
    dir.ours("snapshot -d snapshot.id=1 a.qcow2");
    dir.ours("snapshot -d one a.qcow2");
    dir.qemu("check a.qcow2");
}

#[test]
fn sizes_change_as_with_qemu_img() {
    let dir = Dir::new();
    for (name, format) in [("a.qcow2", "qcow2"), ("a.raw", "raw")] {
        dir.ours(&format!("create -f {format} {name} 4M"));
        let size =
            || json(&dir.qemu(&format!("info -f {format} --output=json {name}")))["virtual-size"].clone();
        assert_eq!(dir.ours(&format!("resize {name} +1M")), "Image resized.\n");
        assert_eq!(size(), 5 << 20);
        let said = dir.refused(&format!("resize {name} 3M"), 1);
        assert!(said.contains("--shrink") && said.contains("deletes all data"), "{said}");
        dir.refused(&format!("resize {name} -1M"), 1);
        assert_eq!(dir.ours(&format!("resize --shrink {name} -1M")), "Image resized.\n");
        assert_eq!(size(), 4 << 20);
        dir.ours(&format!("resize --shrink -f {format} {name} 1536"));
        assert_eq!(size(), 1536);
        dir.ours(&format!("resize {name} 64K"));
        assert!(dir.refused(&format!("resize {name} 70000"), 1).contains("multiple of 512"));
        assert!(dir.refused(&format!("resize --shrink {name} -64K"), 1).contains("must be positive"));
        dir.refused(&format!("resize {name} 0"), 2);
        dir.refused(&format!("resize {name} +1x"), 2);
        assert_eq!(size(), 64 << 10);
    }
    dir.qemu("check a.qcow2");
    // What QEMU refuses too.
    dir.qemu("create -q -f qcow2 -o compat=0.10 old.qcow2 4M");
    dir.ours("snapshot -c one old.qcow2");
    assert!(!dir.run("qemu-img", "resize --shrink old.qcow2 1M").status.success());
    assert!(dir.refused("resize --shrink old.qcow2 1M", 1).contains("version 2"));
}

#[test]
fn an_image_in_use_is_listed_with_force_share_and_not_changed() {
    let dir = Dir::new();
    dir.ours("create -f qcow2 a.qcow2 4M");
    dir.ours("snapshot -c one a.qcow2");
    // qemu-io holds the image as long as its standard input is open.
    let hold = || {
        let mut command = Command::new("qemu-io");
        command.args(["-f", "qcow2", dir.at("a.qcow2").to_str().unwrap()]);
        command.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::null()).spawn().unwrap()
    };
    let mut holder = hold();
    let locked = || !dir.run("qemu-img", "snapshot -l a.qcow2").status.success();
    let began = std::time::Instant::now();
    while !locked() {
        // Who asks whether it is locked has a lock for a moment, which qemu-io may meet.
        if holder.try_wait().unwrap().is_some() {
            holder = hold();
        }
        assert!(began.elapsed().as_secs() < 60, "qemu-io does not take its lock");
        std::thread::sleep(std::time::Duration::from_millis(200));
    }
    for words in ["snapshot -l", "snapshot -c two", "snapshot -a one", "snapshot -d one"] {
        let said = dir.refused(&format!("{words} a.qcow2"), 1);
        assert!(said.contains("in use"), "{said}");
    }
    assert!(dir.refused("resize a.qcow2 8M", 1).contains("in use"));
    assert_eq!(trimmed(&dir.ours("snapshot -U a.qcow2")), trimmed(&dir.qemu("snapshot -l -U a.qcow2")));
    drop(holder.stdin.take());
    holder.wait().unwrap();
    dir.ours("snapshot -d one a.qcow2");
}

#[test]
fn protection_information_beside_the_image_is_spoken_of() {
    let dir = Dir::new();
    dir.ours("create -f qcow2 a.qcow2 4M");
    std::fs::write(dir.at("a.qcow2.pi"), "").unwrap();
    let out = dir.run(BIN, "image snapshot -c one a.qcow2");
    let said = String::from_utf8(out.stderr).unwrap();
    assert!(out.status.success() && said.contains("pi adopt a.qcow2"), "{said}");
}
