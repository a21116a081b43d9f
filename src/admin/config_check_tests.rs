//! Every kind of configuration string that cannot be served is refused in words that say what to do; what passes changes nothing.

use std::{
    fs,
    sync::{Arc, Barrier},
};

use super::*;
use crate::{
    admin::images,
    image::{
        Format,
        open::{OpenOptions, open},
    },
    volume::Volume,
};

struct Dir(tempfile::TempDir);

impl Dir {
    fn path(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }

    fn check(&self, text: &str) -> Result<DeviceConfig, Refusal> {
        check(&text.replace("DIR", &self.0.path().display().to_string()), &self.0.path().join("sys"))
    }
}

fn dir() -> Dir {
    let dir = Dir(tempfile::tempdir().unwrap());
    images::create_new(Path::new(&dir.path("a.qcow2")), Format::Qcow2, 1 << 20).unwrap();
    images::create_new(Path::new(&dir.path("a.raw")), Format::Raw, 1 << 20).unwrap();
    dir
}

#[test]
fn every_string_that_cannot_be_served_is_refused_with_what_to_do() {
    let dir = dir();
    fs::write(dir.path("bad.qcow2"), b"QFI\xfb\0\0\0\x09 and nothing more").unwrap();
    fs::create_dir(dir.path("folder")).unwrap();
    fs::write(dir.path("kept.raw"), vec![0; 4096]).unwrap();
    fs::write(dir.path("kept.raw.pi"), b"something").unwrap();
    let long = format!("dif//{}", "a".repeat(300));
    for (text, reason, next) in [
        ("qcow/DIR/a.raw", "does not begin with dif/", "dif//PATH"),
        ("dif/a.raw", "is not absolute", "help create"),
        ("dif/", "is not absolute", "help create"),
        ("dif/DIR/a.raw;pi=type4", "\"type4\" is no value for pi", "help create"),
        ("dif/DIR/a.raw;colour=red", "unknown setting \"colour=red\"", "help create"),
        ("dif/DIR/a.raw;cache=some", "\"some\" is no value for cache", "help create"),
        ("dif/DIR/a.raw;ro;ro", "ro is set twice", "help create"),
        ("dif/DIR/a.raw,ro", "','", "%2c"),
        ("dif/DIR/a b.raw", "' '", "%20"),
        ("dif/DIR/a:b.raw", "':'", "%3a"),
        (long.as_str(), "305 characters", "shorter path"),
        ("dif/DIR/none.qcow2", "no such file", "tcmu-dif image create"),
        ("dif/DIR/none.qcow2;pi=type1", "no such file", "tcmu-dif image create"),
        ("dif/DIR/folder", "directory", "regular file"),
        ("dif/DIR/a.raw;format=qcow2", "is raw", ""),
        ("dif/DIR/a.raw;pi=type1", "there is no sidecar", "tcmu-dif pi rebuild"),
        ("dif/DIR/kept.raw", "has protection information", "add --pi"),
        ("dif/DIR/kept.raw;pi=type1", "protection information", ""),
        ("dif/DIR/bad.qcow2", "version", ""),
    ] {
        let refusal = dir.check(text).unwrap_err();
        assert!(refusal.to_string().contains(reason), "{text}: {refusal}");
        assert!(refusal.next.as_deref().unwrap_or_default().contains(next), "{text}: {refusal}");
    }
}

#[test]
fn what_passes_is_parsed_as_the_daemon_will_and_nothing_is_made() {
    let dir = dir();
    for text in ["dif/DIR/a.qcow2", "dif/DIR/a.qcow2;format=qcow2;cachesize=1M", "dif/DIR/a.raw;ro"] {
        let config = dir.check(text).unwrap();
        let again = format!("dif/{config}");
        assert_eq!(again, text.replace("DIR", &dir.0.path().display().to_string()).replace("1M", "1048576"));
    }
    let mut names: Vec<_> = fs::read_dir(dir.0.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["a.qcow2", "a.raw"]);
}

#[test]
fn an_image_in_use_is_refused() {
    let dir = dir();
    let path = dir.0.path().join("a.raw");
    let (held, release) = (Arc::new(Barrier::new(2)), Arc::new(Barrier::new(2)));
    let (holds, until) = (held.clone(), release.clone());
    let holder = std::thread::spawn(move || {
        sys::run(async move |io| {
            let image = open(&io, &path, &OpenOptions::default()).await?;
            holds.wait();
            until.wait();
            Ok::<_, OpenError>(image.close().await)
        })
    });
    held.wait();
    let refusal = dir.check("dif/DIR/a.raw").unwrap_err();
    release.wait();
    holder.join().unwrap().unwrap().unwrap();
    assert!(refusal.reason.contains("is in use"), "{refusal}");
    dir.check("dif/DIR/a.raw").unwrap();
}
