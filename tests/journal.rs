//! The journal's lines have a field for each fact, on a socket in the journal's place: in a mount namespace, so as root.
#![allow(clippy::unwrap_used)] // A test may panic.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    os::unix::{fs::MetadataExt, net::UnixDatagram},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

/// One entry of the journal, by the native protocol: `FIELD=value` lines, or the name, a length of eight bytes, the value.
fn fields(mut entry: &[u8]) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    while !entry.is_empty() {
        let end = entry.iter().position(|b| *b == b'\n').unwrap();
        let line = std::str::from_utf8(&entry[..end]).unwrap();
        entry = &entry[end + 1..];
        if let Some((name, value)) = line.split_once('=') {
            found.insert(name.to_owned(), value.to_owned());
        } else {
            let (len, rest) = entry.split_at(8);
            let len = u64::from_le_bytes(len.try_into().unwrap()) as usize;
            found.insert(line.to_owned(), String::from_utf8(rest[..len].to_vec()).unwrap());
            entry = &rest[len + 1..];
        }
    }
    found
}

/// Runs `tcmu-dif --log debug` with a journal, of which `stream` says where it is; gives the entries and the text.
fn run(words: &[&str], stream: impl Fn(&File) -> String) -> (Vec<BTreeMap<String, String>>, String) {
    let dir = tempfile::tempdir().unwrap();
    let socket = UnixDatagram::bind(dir.path().join("socket")).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    let over = Arc::new(AtomicBool::new(false));
    let stop = over.clone();
    let listener = std::thread::spawn(move || {
        let mut entries = Vec::new();
        let mut buffer = vec![0; 1 << 20];
        loop {
            let last = stop.load(Ordering::Acquire);
            match socket.recv(&mut buffer) {
                // The first one is empty: whether somebody listens.
                Ok(n) if n > 0 => entries.push(fields(&buffer[..n])),
                Err(_) if last => return entries,
                _ => {}
            }
        }
    });
    let text = dir.path().join("stderr");
    let stderr = File::create(&text).unwrap();
    let inside = "mount -t tmpfs tmpfs /run && mkdir -p /run/systemd/journal && \
                  mount --bind \"$0\" /run/systemd/journal && exec \"$@\"";
    let status = Command::new("unshare")
        .args(["--mount", "sh", "-c", inside, dir.path().to_str().unwrap()])
        .args([env!("CARGO_BIN_EXE_tcmu-dif"), "--log", "tcmu_dif=debug"])
        .args(words)
        .env("JOURNAL_STREAM", stream(&stderr))
        .stdout(Stdio::null())
        .stderr(stderr)
        .status()
        .unwrap();
    over.store(true, Ordering::Release);
    let entries = listener.join().unwrap();
    let text = fs::read_to_string(&text).unwrap();
    assert!(status.success(), "{text}");
    (entries, text)
}

#[test]
#[ignore = "needs root: a mount namespace of its own"]
fn the_journal_gets_the_lun_the_sense_and_the_lba_as_fields_and_standard_error_no_text() {
    let (entries, text) = run(&["demo"], |stderr| {
        let stat = stderr.metadata().unwrap();
        format!("{}:{}", stat.dev(), stat.ino())
    });
    assert_eq!(text, "");
    let with = |name: &str| entries.iter().filter(|e| e.contains_key(name)).collect::<Vec<_>>();
    let up = entries.iter().find(|e| e["MESSAGE"] == "online").unwrap();
    assert!(!up["LUN"].is_empty() && !up["IMAGE"].is_empty(), "{up:?}");
    assert_eq!((up["PRIORITY"].as_str(), up["SYSLOG_IDENTIFIER"].as_str()), ("6", "tcmu-dif"));
    // The demo damages a block behind the LUN's back, and reads it.
    let bad = with("SENSE").into_iter().find(|e| e.contains_key("LBA")).expect("no bad block was told of");
    assert_eq!((bad["SENSE"].as_str(), bad["PRIORITY"].as_str()), ("0Bh/10h/01h", "4"), "{bad:?}");
    assert!(bad["LBA"].parse::<u64>().is_ok() && bad["LUN"] == up["LUN"], "{bad:?}");
}

#[test]
#[ignore = "needs root: a mount namespace of its own"]
fn a_program_whose_standard_error_is_not_the_journal_writes_text_there() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("a.qcow2");
    let words = ["image", "create", "-f", "qcow2", image.to_str().unwrap(), "1M"];
    let (entries, text) = run(&words, |_| "1:1".to_owned());
    assert!(entries.is_empty(), "{entries:?}");
    assert!(text.contains("opened an image") && text.contains("path="), "{text}");
}
