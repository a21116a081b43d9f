//! `image check`, `repair`, `map` and `measure` beside the program whose words they take: the same JSON, the same exit status.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use serde_json::Value;

use crate::{
    gallery::Gallery,
    support::{check_clean, qemu_img, qemu_io, qemu_reads, run},
};

const BIN: &str = env!("CARGO_BIN_EXE_tcmu-dif");

fn ours(words: &[&str]) -> Output {
    Command::new(BIN).arg("image").args(words).env_remove("TCMU_DIF_LOG").output().unwrap()
}

fn json(out: &Output) -> Value {
    let mut value: Value = serde_json::from_slice(&out.stdout)
        .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&out.stderr)));
    // The one key that is ours alone.
    if let Some(object) = value.as_object_mut() {
        object.remove("findings");
    }
    value
}

#[track_caller]
fn same(words: &[&str]) {
    let (theirs, ours) = (run("qemu-img", words), ours(words));
    assert_eq!(json(&ours), json(&theirs), "{words:?}");
    assert_eq!(ours.status.code(), theirs.status.code(), "{words:?}");
}

#[test]
fn json_and_exit_status_are_those_of_qemu_img() {
    let gallery = Gallery::new(false);
    for path in &gallery.images {
        let name = path.to_str().unwrap();
        if name.ends_with("qcow2") {
            same(&["check", "--output=json", name]);
        }
        same(&["map", "--output=json", name]);
        for options in [
            "compat=1.1",
            "cluster_size=512",
            "compat=0.10",
            "cluster_size=2M,refcount_bits=1",
            "preallocation=full",
        ] {
            same(&["measure", "--output=json", "-O", "qcow2", "-o", options, name]);
        }
        same(&["measure", "--output=json", "-O", "raw", name]);
    }
    for part in [["--start-offset=100k", "--max-length=1000k"], ["--start-offset=1536", "--max-length=512"]] {
        let top = gallery.at("top.qcow2");
        same(&["map", "--output=json", part[0], part[1], top.to_str().unwrap()]);
    }
    for size in ["512", "1G", "123456789k", "100T"] {
        for options in ["cluster_size=64k", "cluster_size=2M,refcount_bits=1", "refcount_bits=64"] {
            same(&["measure", "--output=json", "--size", size, "-O", "qcow2", "-o", options]);
        }
    }
}

#[test]
fn what_people_read_is_what_qemu_img_prints() {
    let gallery = Gallery::new(false);
    let text = |out: Output| String::from_utf8(out.stdout).unwrap().trim_end().to_owned();
    for path in gallery.images.iter().filter(|p| p.extension().is_some_and(|e| e == "qcow2")) {
        let name = path.to_str().unwrap();
        for words in [&["check", name][..], &["measure", "-O", "qcow2", name]] {
            assert_eq!(text(ours(words)), text(run("qemu-img", words)), "{words:?}");
        }
        let (theirs, ours) = (run("qemu-img", &["map", name]), ours(&["map", name]));
        assert_eq!(ours.status.code(), theirs.status.code(), "map {name}");
        // qemu-img stops at the first compressed cluster, and we do not.
        assert!(text(ours).starts_with(&text(theirs)), "map {name}");
    }
}

#[test]
fn exit_statuses_tell_clean_from_errors_leaks_and_what_cannot_be_checked() {
    let gallery = Gallery::new(true);
    let status = |words: &[&str]| ours(words).status.code();
    let path = gallery.at("plain0.qcow2");
    let name = path.to_str().unwrap();
    assert_eq!(status(&["check", name]), Some(0));
    assert_eq!(status(&["check", gallery.at("base.raw").to_str().unwrap()]), Some(63));
    assert_eq!(status(&["check", gallery.at("none").to_str().unwrap()]), Some(1));
    assert_eq!(status(&["check", "--no-such-word", name]), Some(1), "wrong words are no corruption");
    assert_eq!(status(&["repair", "--no-such-word", name]), Some(1));
    let good = fs::read(&path).unwrap();
    let be64 = |at: usize| u64::from_be_bytes(good[at..at + 8].try_into().unwrap()) as usize;
    let block = be64(be64(48));
    let damaged = |refcount: u16, index: usize| {
        let mut bytes = good.clone();
        bytes[block + index * 2..][..2].copy_from_slice(&refcount.to_be_bytes());
        fs::write(&path, bytes).unwrap();
    };
    let last = good.len() / 65536 - 1;
    damaged(2, last);
    assert_eq!(status(&["check", "-r", "leaks", name]), Some(0));
    damaged(9, 3);
    assert_eq!(status(&["check", name]), run("qemu-img", &["check", name]).status.code());
    damaged(0, last);
    assert_eq!(status(&["check", name]), Some(2));
    let out = ours(&["check", name]);
    let text = String::from_utf8(out.stdout).unwrap();
    assert!(text.contains(&format!("next: mend it: tcmu-dif image repair {name}")), "{text}");
    assert_eq!(status(&["repair", name]), Some(0));
    check_clean(&path);
    let mut cut = good.clone();
    cut[40..48].copy_from_slice(&77u64.to_be_bytes());
    fs::write(&path, cut).unwrap();
    assert_eq!(status(&["check", name]), Some(1));
}

/// qemu-io with the image open for writing until it is dropped.
struct InUse(std::process::Child);

impl InUse {
    fn new(path: &Path) -> InUse {
        use std::io::{Read, Write};
        let mut child = Command::new("qemu-io")
            .args(["-f", "qcow2", path.to_str().unwrap()])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.as_mut().unwrap().write_all(b"write 0 512\n").unwrap();
        let mut said = Vec::new();
        let mut byte = [0];
        while !said.ends_with(b"wrote 512/512") {
            assert_eq!(child.stdout.as_mut().unwrap().read(&mut byte).unwrap(), 1, "qemu-io ended");
            said.push(byte[0]);
        }
        InUse(child)
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

#[test]
fn an_image_in_use_is_left_alone_unless_a_look_is_asked_for() {
    let gallery = Gallery::new(true);
    let path = gallery.at("plain0.qcow2");
    let name = path.to_str().unwrap();
    let user = InUse::new(&path);
    for words in [
        &["check", name][..],
        &["check", "-r", "leaks", name],
        &["repair", name],
        &["map", name],
        &["measure", name],
    ] {
        let out = ours(words);
        assert_eq!(out.status.code(), Some(1), "{words:?}");
        let said = String::from_utf8(out.stderr).unwrap();
        assert!(said.contains("is in use by qemu-io"), "{words:?}: {said}");
    }
    assert_eq!(ours(&["check", "-U", name]).status.code(), Some(0));
    assert_eq!(ours(&["map", "-U", name]).status.code(), Some(1), "compressed clusters have no place");
    let refused = ours(&["check", "-U", "-r", "all", name]);
    assert_eq!(refused.status.code(), Some(1));
    drop(user);
    assert_eq!(ours(&["check", name]).status.code(), run("qemu-img", &["check", name]).status.code());
}

#[test]
fn a_check_needs_no_backing_file() {
    let gallery = Gallery::new(true);
    fs::remove_file(gallery.at("base.raw")).unwrap();
    let top = gallery.at("top.qcow2");
    assert_eq!(ours(&["check", top.to_str().unwrap()]).status.code(), Some(0));
    assert_eq!(ours(&["map", top.to_str().unwrap()]).status.code(), Some(1));
}

#[test]
fn an_image_left_dirty_by_qemu_is_repaired_when_it_is_opened_for_writing() {
    let dir = tempfile::tempdir().unwrap();
    for options in
        ["lazy_refcounts=on", "lazy_refcounts=on,cluster_size=512", "lazy_refcounts=on,refcount_bits=1"]
    {
        let path = dir.path().join("lazy.qcow2");
        let name = path.to_str().unwrap();
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, name, "4M"]);
        qemu_io(&path, &["write -P 1 0 100k"]);
        let abort = [
            "-f",
            "qcow2",
            "-c",
            "write -P 7 50k 1M",
            "-c",
            "write -z 300k 64k",
            "-c",
            "flush",
            "-c",
            "abort",
            name,
        ];
        assert!(!run("qemu-io", &abort).status.success());
        let dirty = fs::read(&path).unwrap();
        assert_eq!(dirty[79] & 1, 1, "{options}: qemu-io has left it clean");
        let verdict = run("qemu-img", &["check", name]).status.code();
        assert_eq!(ours(&["check", name]).status.code(), verdict);
        // As QEMU reads it, which leaves it as it is.
        let guest = qemu_reads(&path);
        assert!(fs::read(&path).unwrap() == dirty);
        let opened = path.clone();
        tcmu_dif::sys::run(async move |io| {
            use tcmu_dif::volume::Volume;
            let image = crate::support::open(&io, &opened).await;
            let data = tcmu_dif::sys::mem::Buffer::from_slice(&[3; 512]).sg();
            image.write(tcmu_dif::units::ByteOffset(2 << 20), &data, Default::default()).await.unwrap();
            image.close().await.unwrap();
        });
        check_clean(&path);
        assert_eq!(fs::read(&path).unwrap()[79] & 3, 0);
        let mut want = guest;
        want[2 << 20..][..512].fill(3);
        assert!(qemu_reads(&path) == want, "{options}");
        // And by hand.
        fs::write(&path, &dirty).unwrap();
        let out = ours(&["repair", "--json", name]);
        assert_eq!(out.status.code(), Some(0));
        assert!(json(&out)["corruptions-fixed"].as_u64() > Some(0), "{}", json(&out));
        check_clean(&path);
        assert_eq!(fs::read(&path).unwrap()[79] & 3, 0);
    }
}
