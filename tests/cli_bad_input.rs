//! Bad input on the command line: each a message with the value and the next step, nothing half-made left behind, and exit
//! status 1 (failed) or 2 (wrong words). No kernel module is needed: all of it is found before the kernel is touched.
#![allow(clippy::unwrap_used)] // A test may panic.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use tcmu_dif::daemon::rundir::RunDir;

const BIN: &str = env!("CARGO_BIN_EXE_tcmu-dif");

/// A directory of images that are wrong in every way.
struct Images {
    dir: tempfile::TempDir,
}

impl Images {
    fn new() -> Images {
        let dir = tempfile::tempdir().unwrap();
        // Whoever a test turns into must be able to look.
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("good.raw"), vec![0; 1 << 20]).unwrap();
        fs::write(at("empty.raw"), "").unwrap();
        fs::write(at("odd.raw"), vec![0; 1000]).unwrap();
        fs::write(at("odd4k.raw"), vec![0; 4096 + 512]).unwrap();
        fs::create_dir(at("dir")).unwrap();
        fs::write(at("settings.toml"), "log = 'warn'\ncolour = 'red'\n").unwrap();
        fs::write(at("log.toml"), "log = 'warnn'\n").unwrap();
        fs::write(at("open.toml"), "metrics-listen = '0.0.0.0:9967'\n").unwrap();
        let images = Images { dir };
        images.must("image create -f qcow2 good.qcow2 1M");
        images.must("image create -f qcow2 corrupt.qcow2 1M");
        // The L1 table's offset (bytes 40 to 47 of the header) is not aligned to a cluster.
        images.patch("corrupt.qcow2", 40, &77u64.to_be_bytes());
        images.must("image create -f qcow2 future.qcow2 1M");
        // Incompatible feature bit 20, which nobody has defined (bytes 72 to 79).
        images.patch("future.qcow2", 72, &(1u64 << 20).to_be_bytes());
        images.must("image create -f raw base.raw 1M");
        images.must("image create -f qcow2 -b base.raw -F raw orphan.qcow2 1M");
        fs::remove_file(images.at("base.raw")).unwrap();
        images.must("image create -f qcow2 loop-b.qcow2 1M");
        images.must("image create -f qcow2 -b loop-b.qcow2 -F qcow2 loop-a.qcow2 1M");
        images.must("image create -f qcow2 -b loop-a.qcow2 -F qcow2 new.qcow2 1M");
        fs::rename(images.at("new.qcow2"), images.at("loop-b.qcow2")).unwrap();
        images
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn patch(&self, name: &str, at: usize, bytes: &[u8]) {
        let mut all = fs::read(self.at(name)).unwrap();
        all[at..at + bytes.len()].copy_from_slice(bytes);
        fs::write(self.at(name), all).unwrap();
    }

    fn run(&self, words: &str) -> Output {
        Command::new(BIN)
            .args(words.split_whitespace())
            .args(["--run-dir", "run", "--configfs", "configfs"])
            .current_dir(self.dir.path())
            .env_remove("TCMU_DIF_LOG")
            .output()
            .unwrap()
    }

    #[track_caller]
    fn must(&self, words: &str) {
        let out = self.run(words);
        assert!(out.status.success(), "{words}: {}", String::from_utf8_lossy(&out.stderr));
    }

    /// Every file, and how long it is.
    fn listing(&self) -> Vec<(PathBuf, u64)> {
        let mut out: Vec<_> = fs::read_dir(self.dir.path())
            .unwrap()
            .map(|e| e.unwrap())
            .map(|e| (e.path(), e.metadata().unwrap().len()))
            .collect();
        out.sort();
        out
    }
}

fn stderr(out: &Output) -> String {
    String::from_utf8(out.stderr.clone()).unwrap()
}

/// Runs the words; says what stderr must contain. Everything must be as it was before.
#[track_caller]
fn refused(images: &Images, words: &str, status: i32, parts: &[&str]) {
    let before = images.listing();
    let out = images.run(words);
    let said = stderr(&out);
    assert_eq!(out.status.code(), Some(status), "{words}: {said}");
    assert_eq!(out.stdout, b"", "{words}");
    assert!(said.starts_with("tcmu-dif: "), "{words}: {said}");
    let (_, next) =
        said.split_once("\n  next: ").unwrap_or_else(|| panic!("{words} has no next step: {said}"));
    assert!(!next.trim().is_empty() && next.lines().count() == 1, "{words}: {said}");
    for part in parts {
        assert!(said.contains(part), "{words} does not say {part:?}: {said}");
    }
    // The chain is told once: no fact stands there twice.
    let facts: Vec<_> = said.lines().next().unwrap().split(": ").collect();
    let mut once = facts.clone();
    once.dedup();
    assert_eq!(facts, once, "{words}");
    assert_eq!(images.listing(), before, "{words} left something behind");
}

#[test]
fn a_wrong_image_is_refused_with_its_path_and_the_next_step() {
    let images = Images::new();
    for (image, parts) in [
        ("none.raw", &["none.raw", "no such file"][..]),
        ("none/none.raw", &["none/none.raw", "no such file"]),
        ("dir", &["is a directory"]),
        ("/dev/zero", &["/dev/zero", "character device"]),
        ("/dev/null", &["/dev/null", "no size of its own", "--size 1G"]),
        ("empty.raw", &["empty.raw", "truncate"]),
        ("odd.raw", &["1000", "512"]),
        ("corrupt.qcow2", &["corrupt.qcow2"]),
        ("future.qcow2", &["future.qcow2"]),
        ("orphan.qcow2", &["base.raw", "no such file", "orphan.qcow2"]),
        ("loop-a.qcow2", &["loop-a.qcow2", "backing"]),
    ] {
        refused(&images, &format!("create vm1 --image {image}"), 1, parts);
        if !["odd.raw", "empty.raw", "/dev/null"].contains(&image) {
            refused(&images, &format!("image info {image}"), 1, parts);
        }
    }
    refused(&images, "create vm1 --image odd4k.raw --block-size 4096", 1, &["odd4k.raw", "4608", "4096"]);
}

#[test]
fn wrong_words_are_refused_with_status_2_before_anything_is_looked_at() {
    let images = Images::new();
    for (words, parts) in [
        ("", &["usage"][..]),
        (
            "daemon --metrics-listen 0.0.0.0:9967",
            &["0.0.0.0:9967", "can be reached by others", "127.0.0.1:9967"],
        ),
        ("daemon --metrics-listen 9967", &["9967", "127.0.0.1:9967"]),
        (
            "daemon --config settings.toml",
            &["config", "settings.toml", "line 2", "colour", "`log`, `io`", "--help"],
        ),
        ("daemon --check --config settings.toml", &["line 2", "colour"]),
        ("daemon --config open.toml", &["open.toml", "line 1", "metrics-listen", "can be reached by others"]),
        ("daemon --io fast", &["--io", "fast"]),
        ("daemon --json", &["--check"]),
        ("trace", &["<NAME>"]),
        ("destroy vm1", &["destroy"]),
        ("create vm1", &["--image"]),
        ("create --image good.raw", &["<NAME>"]),
        ("create a/b --image good.raw", &["a/b", "'/'"]),
        ("create .hidden --image good.raw", &[".hidden", "'.'"]),
        ("create vm1 --image good.raw --colour red", &["--colour"]),
        ("create vm1 --image good.raw --pi type4", &["--pi", "type4", "type2 or type3"]),
        ("create vm1 --image good.raw --block-size 1024", &["--block-size", "1024", "512 or 4096"]),
        ("create vm1 --image new.raw --size 1X", &["--size", "1X"]),
        ("create vm1 --image new.raw --size 0", &["--size", "0"]),
        ("create vm1 --image new.raw --size 1000", &["--size", "1000", "512", "1024"]),
        ("create vm1 --image new.raw --size 512 --block-size 4096", &["--size", "4096"]),
        ("create vm1 --image good.raw --export iscsi", &["--export", "iscsi", "loopback and vhost"]),
        ("create vm1 --image good.raw --export vhost:naa.1", &["--export", "vhost:naa.1"]),
        ("create vm1 --image good.raw --export vhost --export vhost", &["--export", "vhost", "twice"]),
        ("create vm1 --image good.raw --serial é", &["--serial", "é"]),
        ("create vm1 --image good.raw --sidecar s.pi", &["--sidecar", "s.pi", "--pi"]),
        ("create vm1 --image good.raw --exposure all", &["--exposure", "all", "initiator"]),
        ("create vm1 --image good.raw --exposure initiator", &["--exposure", "--pi off", "--pi type1"]),
        (
            "create vm1 --image good.raw --pi type1 --pi-transfer interleaved",
            &["--pi-transfer", "interleaved", "--exposure initiator"],
        ),
        ("create vm1 --image new.raw --size 1M --format vmdk", &["--format", "vmdk", "raw and qcow2"]),
        ("image create -f raw -o cluster_size=65536 new.raw 1M", &["-o", "cluster_size=65536"]),
        ("image create -f qcow2 -o colour=red new.qcow2 1M", &["-o", "colour=red"]),
        ("image create -f raw -b good.raw -F raw new.raw 1M", &["-b", "good.raw"]),
        ("image create new.raw", &["SIZE"]),
        ("resize vm1 much", &["much"]),
        ("show vm1 --qemu --json", &["--qemu"]),
        ("pi rebuild good.raw --pi off", &["--pi", "off"]),
        ("list --log =", &["--log", "=", "warn, info"]),
        ("list --log warnn", &["--log", "warnn", "error, warn, info, debug, trace", "tcmu_dif::ring=debug"]),
        ("daemon --check --log warnn", &["--log", "warnn", "error, warn, info, debug, trace"]),
        ("daemon --check --log =", &["--log", "="]),
        ("daemon --check --log inof,debug", &["--log", "inof"]),
        ("daemon --check --config log.toml", &["log.toml", "line 1", "warnn", "error, warn, info"]),
        ("export vm1 --listen 0.0.0.0:10809", &["--listen", "0.0.0.0:10809", "others", "--tls-certificates"]),
        ("export vm1 --listen localhost", &["--listen", "localhost"]),
        ("handover vm1 --to b:1", &["--to", "b:1", "tls://HOST:PORT"]),
        ("handover vm1 --to tls://b", &["--to", "tls://b", "no port"]),
        ("handover vm1 --to tls://b:1", &["--tls-certificates", "a CA for handovers alone"]),
        ("handover vm1 --to unix:/x --tls-certificates /y", &["--tls-certificates", "/y", "no TLS"]),
        ("receive --listen unix:/x --format raw", &["--image"]),
        ("receive --listen unix:/x --image /y --format vmdk", &["vmdk", "raw, qcow2"]),
        ("receive --listen tls://127.0.0.1:1", &["--tls-certificates", "a CA for handovers alone"]),
    ] {
        refused(&images, words, 2, parts);
    }
    let long = format!("create vm1 --image /{} --size 1M", "x/".repeat(130));
    refused(&images, &long, 2, &["--image", "255"]);
    refused(&images, &format!("create {} --image good.raw", "n".repeat(65)), 2, &["65", "64"]);
}

#[test]
fn a_settings_file_that_is_named_has_to_be_there_and_check_says_what_counts_and_why() {
    let images = Images::new();
    refused(&images, "daemon --config none.toml", 1, &["none.toml", "no such file"]);
    fs::write(images.at("good.toml"), "io = 'threads'\ncache-size = '1M'\npolling = false\n").unwrap();
    let out = images.run("daemon --check --json --config good.toml --io uring --polling");
    assert!(out.status.success(), "{}", stderr(&out));
    let rows: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let row = |word: &str| rows.as_array().unwrap().iter().find(|r| r["word"] == word).unwrap().clone();
    let [io, polling, cache, log] = ["io", "polling", "cache-size", "log"].map(row);
    assert_eq!((&io["value"], &io["from"]), (&"uring".into(), &"command line".into()));
    assert_eq!((&polling["value"], &polling["from"]), (&true.into(), &"command line".into()));
    assert_eq!((&cache["value"], &cache["from"]), (&(1 << 20).into(), &"file".into()));
    assert_eq!((&log["value"], &log["from"]), (&"info".into(), &"default".into()));
    assert!(row("metrics-listen")["value"].is_null());
    let out = images.run("daemon --check --config good.toml --no-polling");
    let said = String::from_utf8(out.stdout).unwrap();
    assert!(said.contains("SETTING") && said.contains("polling         false"), "{said}");
}

#[test]
fn check_tries_the_port_for_metrics_and_a_port_of_the_daemon_that_runs_is_no_fault() {
    let images = Images::new();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let at = taken.local_addr().unwrap();
    fs::write(images.at("taken.toml"), format!("metrics-listen = '{at}'\n")).unwrap();
    let check = format!("--run-dir {} daemon --check --config taken.toml", images.at("run").display());
    let port = at.port().to_string();
    refused(&images, &check, 1, &["metrics-listen", &at.to_string(), "in use", "ss -ltnp sport", &port]);
    // A daemon that runs, and has noted that it serves metrics there.
    let run = RunDir::at(images.at("run"));
    let lock = run.lock().unwrap().unwrap();
    run.note_metrics_at(Some(at)).unwrap();
    let out = images.run(&check);
    assert!(out.status.success(), "{}", stderr(&out));
    drop(lock);
    refused(&images, &check, 1, &["in use"]);
    drop(taken);
    assert!(images.run(&check).status.success());
}

#[test]
fn images_that_are_made_and_resized_are_told_as_json_too() {
    let images = Images::new();
    let json = |words: &str| -> serde_json::Value {
        let out = images.run(words);
        assert!(out.status.success(), "{words}: {}", stderr(&out));
        serde_json::from_slice(&out.stdout).unwrap()
    };
    let made = json("image create -f qcow2 json.qcow2 1M --json");
    let wanted = serde_json::json!({ "filename": "json.qcow2", "format": "qcow2", "virtual-size": 1 << 20 });
    assert_eq!(made, wanted);
    let grown = json("image resize --json json.qcow2 +1M");
    assert_eq!((&grown["before"], &grown["virtual-size"]), (&(1 << 20).into(), &(2 << 20).into()));
    assert_eq!(json("image resize json.qcow2 3M --json")["virtual-size"], 3 << 20);
}

#[test]
fn certificates_that_are_not_there_are_named_with_what_is_needed() {
    let images = Images::new();
    for (words, role) in [
        ("receive --listen tls://127.0.0.1:1 --tls-certificates none", "server"),
        ("image info nbds://localhost:1/?tls-certificates=/nonexistent/none", "client"),
        ("create vm1 --image nbds://localhost:1/?tls-certificates=/nonexistent/none", "client"),
    ] {
        refused(
            &images,
            words,
            1,
            &["none", "cannot be used", &format!("{role}-cert.pem and {role}-key.pem")],
        );
    }
}

#[test]
fn what_is_there_is_not_overwritten() {
    let images = Images::new();
    refused(&images, "create vm1 --image good.raw --size 1M", 1, &["good.raw", "there already"]);
    refused(&images, "image create good.raw 1M", 1, &["good.raw", "exists"]);
    refused(&images, "create vm1 --image good.qcow2 --format raw", 1, &["--format", "raw", "qcow2"]);
}

#[test]
fn images_that_cannot_be_made_leave_nothing_behind() {
    let images = Images::new();
    for (words, parts) in [
        ("image create none/new.raw 1M", &["none/new.raw", "mkdir"][..]),
        ("image create -f qcow2 -o cluster_size=1000 new.qcow2 1M", &["cluster_size", "1000"]),
        ("image create -f qcow2 -b none.raw -F raw new.qcow2 1M", &["none.raw"]),
        ("image create new.raw 1000", &["1000"]),
    ] {
        let before = images.listing();
        let out = images.run(words);
        assert_eq!(out.status.code(), Some(1), "{words}");
        for part in parts {
            assert!(stderr(&out).contains(part), "{words} does not say {part:?}: {}", stderr(&out));
        }
        assert_eq!(images.listing(), before, "{words}");
    }
}

#[test]
fn luns_that_are_not_there_are_named() {
    let images = Images::new();
    for words in ["show vm1", "delete vm1", "resize vm1 1G"] {
        refused(&images, words, 1, &["vm1", "no such LUN", "tcmu-dif list"]);
    }
}

#[test]
fn protection_that_is_not_there_is_made_by_the_next_step() {
    let images = Images::new();
    for words in ["pi verify good.raw", "pi status good.raw"] {
        refused(&images, words, 1, &["good.raw", "tcmu-dif pi rebuild good.raw"]);
    }
    images.must("pi rebuild good.raw --pi type3");
    images.must("pi verify good.raw");
    // Written without its protection: refused where it would be left behind, and found by verify.
    refused(&images, "create vm1 --image good.raw", 1, &["good.raw.pi", "--pi"]);
    images.patch("good.raw", 5000, b"x");
    let out = images.run("pi verify good.raw --json");
    assert_eq!(out.status.code(), Some(1));
    let report: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!((&report["mismatches"], &report["bad"][0]["lba"]), (&1.into(), &(5000 / 512).into()));
    assert!(stderr(&out).contains("next: "));
}

#[test]
fn an_image_in_use_is_refused_with_its_holder() {
    let images = Images::new();
    let image = images.at("good.raw");
    let (hold, me) = (image.clone(), std::process::id().to_string());
    tcmu_dif::sys::run(async move |io| {
        let options = tcmu_dif::image::open::OpenOptions::default();
        let _held = tcmu_dif::image::open::open(&io, Path::new(&hold), &options).await.unwrap();
        refused(&images, "create vm1 --image good.raw", 1, &["good.raw", "in use", &me]);
        refused(&images, "pi rebuild good.raw", 1, &["good.raw", "in use"]);
        // A look needs no lock.
        images.must("image info good.raw");
    });
}

/// The binary as another user: nobody, if this is root.
fn as_nobody(images: &Images, words: &str) -> Output {
    use std::os::unix::process::CommandExt;
    let bin = images.at("tcmu-dif-for-nobody");
    fs::copy(BIN, &bin).unwrap();
    let mut command = Command::new(&bin);
    command.args(words.split_whitespace()).args(["--configfs", "configfs"]).current_dir(images.dir.path());
    if rustix::process::geteuid().is_root() {
        command.uid(65534).gid(65534);
    }
    let out = command.output().unwrap();
    fs::remove_file(bin).unwrap();
    out
}

#[test]
fn an_unreadable_image_and_a_caller_who_is_not_root_are_told_what_to_do() {
    let images = Images::new();
    fs::write(images.at("secret.raw"), vec![0; 1 << 20]).unwrap();
    fs::set_permissions(images.at("secret.raw"), fs::Permissions::from_mode(0o000)).unwrap();
    let out = as_nobody(&images, "create vm1 --image secret.raw");
    assert_eq!(out.status.code(), Some(1));
    assert!(stderr(&out).contains("secret.raw") && stderr(&out).contains("  next: "), "{}", stderr(&out));
    let out = as_nobody(&images, "create vm1 --image good.raw --read-only");
    assert_eq!(out.status.code(), Some(1));
    assert!(stderr(&out).contains("root") && stderr(&out).contains("  next: "), "{}", stderr(&out));
    let out = as_nobody(&images, "daemon");
    assert!(stderr(&out).contains("next: run it as root"), "{}", stderr(&out));
}

#[test]
fn a_good_image_without_a_daemon_is_refused_and_a_new_one_is_not_left_behind() {
    let images = Images::new();
    if rustix::process::geteuid().is_root() {
        for words in [
            "create vm1 --image good.raw",
            "create vm1 --image new.qcow2 --size 1G --format qcow2 --pi type1",
        ] {
            refused(&images, words, 1, &["daemon", "isn't running", "tcmu-dif daemon"]);
        }
    } else {
        refused(&images, "create vm1 --image new.raw --size 1M", 1, &["needs root"]);
    }
}
