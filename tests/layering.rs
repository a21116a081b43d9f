//! Keeps the architecture true: which room may use which, where unsafe code may stand, that every file says what it is
//! for, and that none grows beyond reading. `docs/architecture.md` has the same table in words.
#![allow(clippy::unwrap_used)] // A test may panic.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

/// Every room under `src/`, and the rooms that its code may name. A room may always name itself. Test modules inside
/// a room may name any room below the one that tests them, so they are not looked at.
const ROOMS: &[(&str, &[&str])] = &[
    ("sys", &[]),
    ("units", &[]),
    ("files", &[]),
    ("sync", &[]),
    ("volume", &["sys", "units"]),
    ("storage", &["sync", "sys", "units"]),
    ("ring", &["sys", "units", "sync"]),
    ("kernel", &["sys", "units"]),
    ("nbd", &["units"]),
    ("tls", &[]),
    ("image", &["nbd", "tls", "volume", "storage", "sync", "sys", "units"]),
    ("pi", &["nbd", "volume", "storage", "files", "sync", "sys", "units"]),
    ("scsi", &["volume", "pi", "sync", "sys", "units"]),
    ("job", &["volume", "pi", "sync", "sys", "units"]),
    ("handover", &["units"]),
    (
        "lun",
        &[
            "kernel", "ring", "scsi", "pi", "image", "job", "handover", "volume", "storage", "files", "sync",
            "sys", "units",
        ],
    ),
    ("export", &["lun", "scsi", "nbd", "tls", "volume", "units"]),
    ("control", &["export", "lun", "volume", "files", "sys", "units"]),
    ("peer", &["ring", "sys", "units", "sync"]),
    ("conformance", &["peer", "sys", "units"]),
    ("demo", &["peer", "lun", "ring", "pi", "image", "volume", "sys", "units"]),
    (
        "daemon",
        &[
            "control", "lun", "kernel", "ring", "scsi", "pi", "image", "job", "handover", "volume",
            "storage", "files", "sync", "sys", "units",
        ],
    ),
    (
        "admin",
        &[
            "daemon", "control", "handover", "lun", "kernel", "nbd", "tls", "pi", "image", "volume", "files",
            "sys", "units",
        ],
    ),
    ("dbus", &[]),
    (
        "cli",
        &[
            "admin",
            "dbus",
            "daemon",
            "control",
            "conformance",
            "demo",
            "peer",
            "lun",
            "kernel",
            "ring",
            "scsi",
            "pi",
            "image",
            "job",
            "handover",
            "tls",
            "volume",
            "storage",
            "sync",
            "sys",
            "units",
        ],
    ),
];

/// The only places with unsafe code.
const UNSAFE: &[&str] = &["src/sys/", "src/pi/guard/"];

const MAX_LINES: usize = 600;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every Rust file of ours (`vendor/` is bindgen's), by its path from the root.
fn sources() -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut folders: Vec<PathBuf> =
        ["src", "tests", "benches", "examples", "xtask", "fuzz"].iter().map(|d| root().join(d)).collect();
    while let Some(folder) = folders.pop() {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for entry in entries.map(|e| e.unwrap().path()) {
            if entry.is_dir() && entry.file_name().is_some_and(|n| n != "target") {
                folders.push(entry);
            } else if entry.extension().is_some_and(|e| e == "rs") {
                let name = entry.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
                found.push((name, fs::read_to_string(&entry).unwrap()));
            }
        }
    }
    assert!(found.len() > 20, "found only {} files", found.len());
    found.sort();
    found
}

/// The room of a file in `src/`; `lib.rs` and `main.rs` are in none.
fn room(path: &str) -> Option<&str> {
    let inside = path.strip_prefix("src/")?;
    let name = inside.split('/').next()?.trim_end_matches(".rs");
    (name != "lib" && name != "main").then_some(name)
}

/// The code of a file: comments and string literals blanked, a trailing test module cut off.
fn code(text: &str) -> String {
    let text = match text.find("\n#[cfg(test)]\nmod ") {
        // `mod tests;` in the middle only names a file.
        Some(at) if text[at..].lines().nth(2).is_some_and(|l| l.ends_with('{')) => &text[..at],
        _ => text,
    };
    let mut out = String::with_capacity(text.len());
    let mut chars = text.char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        let rest = &text[at..];
        if rest.starts_with("//") {
            while chars.next_if(|(_, c)| *c != '\n').is_some() {}
        } else if let Some(raw) = rest.strip_prefix("r#\"") {
            let len = raw.find("\"#").map_or(rest.len(), |n| n + 5);
            while chars.next_if(|(i, _)| *i < at + len).is_some() {}
        } else if rest.starts_with("'\"'") || rest.starts_with("b'\"'") {
            let len = if c == 'b' { 4 } else { 3 };
            while chars.next_if(|(i, _)| *i < at + len).is_some() {}
        } else if c == '"' {
            while let Some((_, c)) = chars.next() {
                match c {
                    '\\' => drop(chars.next()),
                    '"' => break,
                    _ => {}
                }
            }
        } else {
            out.push(c);
        }
    }
    out
}

fn identifier(text: &str) -> &str {
    &text[..text.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(text.len())]
}

/// The first names of all paths that begin at the crate's root.
fn rooms_named(code: &str) -> BTreeSet<String> {
    let mut named = BTreeSet::new();
    for (at, matched) in code.match_indices("crate::") {
        let rest = &code[at + matched.len()..];
        let Some(group) = rest.strip_prefix('{') else {
            named.insert(identifier(rest).to_owned());
            continue;
        };
        let mut depth = 0;
        let mut start = true;
        for (i, c) in group.char_indices() {
            match c {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                ',' if depth == 0 => start = true,
                c if start && depth == 0 && !c.is_whitespace() => {
                    named.insert(identifier(&group[i..]).to_owned());
                    start = false;
                }
                _ => {}
            }
        }
    }
    named
}

fn is_test_file(path: &str) -> bool {
    let stem = path.rsplit('/').next().unwrap_or(path).trim_end_matches(".rs");
    path.contains("/tests/") || stem == "tests" || stem.ends_with("_tests") || path == "src/storage/sim.rs"
}

#[test]
fn rooms_use_only_the_rooms_beneath_them() {
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        let Some(room) = room(&path) else { continue };
        let Some((_, allowed)) = ROOMS.iter().find(|(name, _)| *name == room) else {
            wrong.push(format!("{path}: the room '{room}' is not in the table"));
            continue;
        };
        if is_test_file(&path) {
            continue;
        }
        for name in rooms_named(&code(&text)) {
            if name != room && !allowed.contains(&name.as_str()) {
                wrong.push(format!("{path}: '{room}' may not use '{name}'"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn unsafe_code_stands_in_sys_and_the_guard_kernels_alone() {
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        let allowed =
            UNSAFE.iter().any(|p| path.starts_with(p)) || path == "src/sys.rs" || path == "src/pi/guard.rs";
        let code = code(&text);
        let names_it = code.match_indices("unsafe").any(|(at, _)| {
            let word = identifier(&code[at..]) == "unsafe";
            word && !code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_')
        });
        if !allowed && names_it {
            wrong.push(path);
        }
    }
    assert!(wrong.is_empty(), "unsafe code outside its rooms: {wrong:?}");
}

#[test]
fn every_file_opens_with_what_it_is_for() {
    let wrong: Vec<_> =
        sources().into_iter().filter(|(_, t)| !t.starts_with("//!")).map(|(p, _)| p).collect();
    assert!(wrong.is_empty(), "no module comment: {wrong:?}");
}

#[test]
fn no_file_is_longer_than_can_be_read() {
    let wrong: Vec<_> =
        sources().into_iter().map(|(p, t)| (t.lines().count(), p)).filter(|(n, _)| *n > MAX_LINES).collect();
    assert!(
        wrong.is_empty(),
        "more than {MAX_LINES} lines: split them along a seam that has a name: {wrong:?}"
    );
}

#[test]
fn the_parser_of_this_test_sees_what_it_must() {
    let text = "use crate::{a::{x, y}, b, c as d};\n// crate::comment\nlet s = \"crate::string\"; crate::e::f();\n\
                #[cfg(test)]\nmod tests {\n use crate::g;\n}\n";
    let named = rooms_named(&code(text));
    assert_eq!(named.iter().map(String::as_str).collect::<Vec<_>>(), ["a", "b", "c", "e"]);
    assert_eq!((room("src/pi/guard/mod.rs"), room("src/lib.rs")), (Some("pi"), None));
}
