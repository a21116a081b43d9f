//! Where the bundle comes from. No source reads an image, a sidecar, or the records of commands in flight.
//!
//! Each source has a thread and a time limit: one that hangs, as configfs does while the kernel waits for a daemon, costs the bundle just itself.

use std::{
    fs, io,
    io::Read,
    path::{Path, PathBuf},
    process::Command,
    sync::mpsc,
    time::Duration,
};

use serde::Serialize;
use serde_json::Map;

use super::{File, secrets};
use crate::{
    cli::{args::Cli, check_host, show},
    control::{SOCKET, client::Client},
    kernel::{
        SYSFS, backstore, fabric,
        tree::{Real, Tree},
    },
    lun::{chain, config::SUBTYPE},
};

/// Settings of the administrator.
const SETTINGS: &str = "/etc/tcmu-dif";

/// The service.
const UNIT: &str = "tcmu-dif.service";

/// How many lines of the journal.
const JOURNAL_LINES: &str = "--lines=2000";

/// The kernel's modules that have a part in it.
const MODULES: &[&str] =
    &["configfs", "uio", "target_core_mod", "target_core_user", "tcm_loop", "vhost", "vhost_scsi", "sg"];

/// What the daemon is asked.
const QUESTIONS: &[&str] =
    &["query-version", "query-luns", "query-block", "query-blockstats", "query-pi", "query-jobs"];

/// How much of one file there is at most.
const MOST: u64 = 4 << 20;

/// How deep configfs is looked at below an object; its objects are not deeper.
const DEPTH: usize = 6;

/// How long a source may take: longer than the daemon is given for an answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// What came of all sources.
pub struct Collected {
    /// The files, `contents.txt` first.
    pub files: Vec<File>,
    /// Sources without a result, and why.
    pub failed: Vec<(&'static str, String)>,
}

type Result<T> = std::result::Result<T, String>;

struct Source {
    name: &'static str,
    what: &'static str,
    look: Box<dyn FnOnce() -> Result<Vec<File>> + Send>,
}

fn source(
    name: &'static str,
    what: &'static str,
    look: impl FnOnce() -> Result<Vec<File>> + Send + 'static,
) -> Source {
    Source { name, what, look: Box::new(look) }
}

/// Asks all sources.
pub fn collect(cli: &Cli) -> Collected {
    let (configfs, run_dir, state_dir) = (cli.configfs.clone(), cli.run_dir.clone(), cli.state_dir.clone());
    let places = cli.places();
    let (listed, checked, socket) = (places.clone(), places, run_dir.join(SOCKET));
    let (listed_at, checked_at) = (configfs.clone(), configfs.clone());
    all(vec![
        source("version.txt", "this program", || one("version.txt", version())),
        source("kernel.txt", "the kernel's release, and the distribution", || one("kernel.txt", kernel())),
        source("modules.txt", "modules of the kernel, with their parameters", || {
            one("modules.txt", modules(Path::new(SYSFS)))
        }),
        source("configfs.txt", "the kernel's objects of our LUNs, with their attributes", move || {
            one("configfs.txt", objects(&configfs)?)
        }),
        source("run", "what the daemon says of each LUN; of other files there just the sizes", move || {
            run_files(&run_dir)
        }),
        source("state.txt", "names and sizes of what outlives a reboot", move || {
            one("state.txt", listing(&state_dir).map_err(|e| said(&state_dir, &e))?)
        }),
        source("list.json", "tcmu-dif list --json", move || {
            let views = show::views(&listed, &listed_at).map_err(|e| format!("{}: {}", e.value, e.reason))?;
            Ok(vec![("list.json".to_owned(), json(&views)?)])
        }),
        source("qmp", "what the daemon answers to queries", move || answers(&socket)),
        source("check-host.json", "tcmu-dif check-host --json", move || {
            Ok(vec![(
                "check-host.json".to_owned(),
                json(&check_host::report(&checked_at, &checked, Path::new(".")))?,
            )])
        }),
        source("journal.txt", "the last lines of the service's log", || {
            let args = ["--unit", UNIT, JOURNAL_LINES, "--no-pager", "--quiet", "--output=short-iso"];
            one("journal.txt", program("journalctl", &args)?)
        }),
        source("unit.txt", "the service's unit, with what is set over it", || {
            one("unit.txt", secrets::without(&program("systemctl", &["cat", "--no-pager", UNIT])?))
        }),
        source("settings", "/etc/tcmu-dif: .toml and .conf, without secrets", || {
            settings(Path::new(SETTINGS))
        }),
    ])
}

/// Runs them, and writes down what came of each.
fn all(sources: Vec<Source>) -> Collected {
    let mut files = Vec::new();
    let mut failed = Vec::new();
    let mut contents = "What is in this bundle, and what is not there and why.\n\
                        No blocks of any disk are in it. It names images, hosts, serial numbers and WWNs.\n\n"
        .to_owned();
    for Source { name, what, look } in sources {
        let line = match in_time(look) {
            Ok(found) => {
                let bytes: usize = found.iter().map(|(_, bytes)| bytes.len()).sum();
                let line = format!("{name}: {what}; {} files, {bytes} bytes", found.len());
                files.extend(found);
                line
            }
            Err(why) => {
                let line = format!("{name}: {what}; NOT THERE: {why}");
                failed.push((name, why));
                line
            }
        };
        contents.push_str(&line);
        contents.push('\n');
    }
    files.insert(0, ("contents.txt".to_owned(), contents.into_bytes()));
    Collected { files, failed }
}

fn in_time(look: Box<dyn FnOnce() -> Result<Vec<File>> + Send>) -> Result<Vec<File>> {
    let (send, receive) = mpsc::channel();
    let thread = std::thread::Builder::new().name("support-bundle".to_owned());
    thread.spawn(move || send.send(look()).ok()).map_err(|e| e.to_string())?;
    receive.recv_timeout(PATIENCE).map_err(|e| match e {
        mpsc::RecvTimeoutError::Timeout => format!("nothing came within {} s", PATIENCE.as_secs()),
        mpsc::RecvTimeoutError::Disconnected => "it came to an unexpected end".to_owned(),
    })?
}

fn one(name: &str, text: String) -> Result<Vec<File>> {
    Ok(vec![(name.to_owned(), text.into_bytes())])
}

fn json(value: &impl Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec_pretty(value).map_err(|e| e.to_string())
}

fn said(path: &Path, e: &io::Error) -> String {
    format!("{}: {e}", path.display())
}

/// A regular file's text, cut at [`MOST`].
fn text(path: &Path) -> io::Result<String> {
    let mut bytes = Vec::new();
    fs::File::open(path)?.take(MOST).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// What a program prints.
fn program(name: &str, args: &[&str]) -> Result<String> {
    let out = Command::new(name).args(args).output().map_err(|e| format!("{name} cannot be run: {e}"))?;
    if !out.status.success() {
        let words = String::from_utf8_lossy(&out.stderr).trim().replace('\n', "; ");
        return Err(format!("{name}: {}: {words}", out.status));
    }
    let most = out.stdout.len().min(MOST as usize);
    Ok(String::from_utf8_lossy(&out.stdout[..most]).into_owned())
}

fn version() -> String {
    let program = std::env::current_exe().map_or_else(|e| e.to_string(), |path| path.display().to_string());
    let root = if rustix::process::geteuid().is_root() { "yes" } else { "no" };
    format!("tcmu-dif {}\nprogram: {program}\nroot: {root}\n", env!("CARGO_PKG_VERSION"))
}

fn kernel() -> String {
    let uname = rustix::system::uname();
    let [system, release, version, machine] =
        [uname.sysname(), uname.release(), uname.version(), uname.machine()].map(|s| s.to_string_lossy());
    let mut out = format!("{system} {release} {version} {machine}\n");
    for path in ["/proc/sys/kernel/tainted", "/proc/sys/kernel/io_uring_disabled", "/etc/os-release"] {
        let text = text(Path::new(path)).unwrap_or_else(|e| e.to_string());
        out.push_str(&format!("\n{path}:\n{}\n", text.trim_end()));
    }
    out
}

/// Which modules are there, and how they were told to be.
fn modules(sysfs: &Path) -> String {
    let mut out = String::new();
    for module in MODULES {
        let dir = sysfs.join("module").join(module);
        if !dir.is_dir() {
            out.push_str(&format!("{module}: not loaded\n"));
            continue;
        }
        out.push_str(&format!("{module}: there\n"));
        for attribute in ["version", "srcversion", "taint"] {
            if let Ok(text) = text(&dir.join(attribute)) {
                out.push_str(&format!("  {attribute}: {}\n", text.trim_end()));
            }
        }
        for parameter in names(&dir.join("parameters")).unwrap_or_default() {
            let value = text(&dir.join("parameters").join(&parameter)).unwrap_or_else(|e| e.to_string());
            out.push_str(&format!("  parameter {parameter}: {}\n", value.trim_end()));
        }
    }
    out
}

/// The names in a directory, sorted.
fn names(dir: &Path) -> io::Result<Vec<String>> {
    let names = fs::read_dir(dir)?.map(|e| Ok(e?.file_name().to_string_lossy().into_owned()));
    let mut names = names.collect::<io::Result<Vec<_>>>()?;
    names.sort();
    Ok(names)
}

/// Our backstores and their exports. Of a fabric that is not ours to make only the path is told: its attributes may hold passwords (CHAP).
fn objects(configfs: &Path) -> Result<String> {
    let tree = Real::at(configfs);
    if !tree.is_dir(Path::new("target")) {
        return Err(format!("{}: there is no target", configfs.display()));
    }
    let mut out = String::new();
    let stores = backstore::all(&tree).map_err(|e| chain(&e))?;
    for store in stores.iter().filter(|s| s.is_of(SUBTYPE)) {
        attributes(configfs, &store.path, DEPTH, &mut out);
        for export in fabric::of(&tree, store).map_err(|e| chain(&e))? {
            out.push_str(&format!(
                "{}/{} -> {}\n",
                export.lun_path().display(),
                export.link,
                store.path.display()
            ));
            if export.kind().is_some() {
                for attribute in ["nexus", "address"] {
                    let path = export.tpg_path().join(attribute);
                    if configfs.join(&path).exists() {
                        out.push_str(&attribute_line(configfs, &path));
                    }
                }
            }
        }
    }
    if out.is_empty() {
        out.push_str("no LUNs\n");
    }
    Ok(out)
}

/// Every attribute of an object and of those in it.
fn attributes(root: &Path, dir: &Path, depth: usize, out: &mut String) {
    let listed = match names(&root.join(dir)) {
        Ok(names) => names,
        Err(e) => return out.push_str(&format!("{}: unreadable: {e}\n", dir.display())),
    };
    for name in listed {
        let path = dir.join(name);
        match root.join(&path).symlink_metadata() {
            Ok(meta) if meta.is_dir() && depth > 0 => attributes(root, &path, depth - 1, out),
            Ok(meta) if meta.is_file() => out.push_str(&attribute_line(root, &path)),
            _ => {}
        }
    }
}

fn attribute_line(root: &Path, path: &Path) -> String {
    match text(&root.join(path)) {
        Ok(value) => format!("{}: {}\n", path.display(), value.trim_end().replace('\n', "\n    ")),
        Err(e) => format!("{}: unreadable: {e}\n", path.display()),
    }
}

/// Names and sizes of everything in a directory.
fn listing(dir: &Path) -> io::Result<String> {
    let mut out = String::new();
    let mut folders = vec![PathBuf::new()];
    while let Some(folder) = folders.pop() {
        for name in names(&dir.join(&folder))? {
            let path = folder.join(name);
            // It may have gone meanwhile.
            let Ok(meta) = dir.join(&path).symlink_metadata() else { continue };
            out.push_str(&format!("{:>10} {}\n", meta.len(), path.display()));
            if meta.is_dir() {
                folders.push(path);
            }
        }
    }
    Ok(out)
}

/// The daemon's number and the LUNs' files; the records of commands in flight and the socket by name and size.
fn run_files(dir: &Path) -> Result<Vec<File>> {
    let mut files =
        vec![("run/listing.txt".to_owned(), listing(dir).map_err(|e| said(dir, &e))?.into_bytes())];
    let luns = names(&dir.join("luns")).unwrap_or_default();
    let luns = luns.into_iter().filter(|name| name.ends_with(".json")).map(|name| format!("luns/{name}"));
    for name in ["daemon.pid".to_owned()].into_iter().chain(luns) {
        let path = dir.join(&name);
        if path.symlink_metadata().is_ok_and(|meta| meta.is_file()) {
            let text = text(&path).unwrap_or_else(|e| format!("unreadable: {e}"));
            files.push((format!("run/{name}"), text.into_bytes()));
        }
    }
    Ok(files)
}

/// The daemon's answers. One that it refuses is in its answer's place.
fn answers(socket: &Path) -> Result<Vec<File>> {
    let mut client = Client::connect(socket).map_err(|e| chain(&e))?;
    let answer = |question: &&str| {
        let text = match client.execute(question, Map::new()) {
            Ok(value) => json(&value)?,
            Err(e) => format!("no answer: {}", chain(&e)).into_bytes(),
        };
        Ok((format!("qmp/{question}.json"), text))
    };
    QUESTIONS.iter().map(answer).collect()
}

/// Files of settings without their secrets; of others, keys among them, the names.
fn settings(dir: &Path) -> Result<Vec<File>> {
    let listed = listing(dir).map_err(|e| said(dir, &e))?;
    let mut files = vec![("settings/listing.txt".to_owned(), listed.into_bytes())];
    let mut folders = vec![PathBuf::new()];
    while let Some(folder) = folders.pop() {
        for name in names(&dir.join(&folder)).map_err(|e| said(dir, &e))? {
            let path = folder.join(name);
            let Ok(meta) = dir.join(&path).symlink_metadata() else { continue };
            if meta.is_dir() {
                folders.push(path);
            } else if meta.is_file() && path.extension().is_some_and(|e| e == "toml" || e == "conf") {
                let text = text(&dir.join(&path)).unwrap_or_else(|e| format!("unreadable: {e}"));
                files.push((format!("settings/{}", path.display()), secrets::without(&text).into_bytes()));
            }
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_that_fails_or_dies_is_noted_and_the_others_are_there() {
        let collected = all(vec![
            source("good.txt", "good", || one("good.txt", "1".to_owned())),
            source("bad.txt", "bad", || Err("it is broken".to_owned())),
            source("dead.txt", "dead", || panic!("for the test")),
        ]);
        let names: Vec<&str> = collected.files.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["contents.txt", "good.txt"]);
        let contents = String::from_utf8(collected.files[0].1.clone()).unwrap();
        assert!(contents.contains("bad.txt: bad; NOT THERE: it is broken\n"), "{contents}");
        assert_eq!(
            collected.failed.iter().map(|(name, _)| *name).collect::<Vec<_>>(),
            ["bad.txt", "dead.txt"]
        );
    }

    #[test]
    fn settings_are_there_without_secrets_and_keys_by_name_alone() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("luns.d")).unwrap();
        fs::write(dir.path().join("luns.d/vm1.toml"), "image = \"/a\"\npassword = \"hunter2\"\n").unwrap();
        fs::write(dir.path().join("tcmu-dif.toml"), "log = \"debug\"\n").unwrap();
        fs::write(dir.path().join("server.pem"), "hunter2").unwrap();
        let files = settings(dir.path()).unwrap();
        let all: String =
            files.iter().map(|(n, b)| format!("{n}\n{}\n", String::from_utf8_lossy(b))).collect();
        assert!(all.contains("settings/luns.d/vm1.toml") && all.contains("image = \"/a\""), "{all}");
        assert!(all.contains("settings/tcmu-dif.toml") && all.contains("log = \"debug\""), "{all}");
        assert!(all.contains("server.pem") && !all.contains("hunter2"), "{all}");
    }
}
