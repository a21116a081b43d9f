//! `tcmu-dif support-bundle`: what a report of a fault needs, in one file.
//!
//! [`sources`] says where it comes from, [`secrets`] what of it is left out. Everything is collected in memory and then written at once, so that an interruption leaves
//! nothing half-made. A source that fails is noted in `contents.txt`, and the rest goes on.

mod secrets;
mod sources;

use std::{
    fs,
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process::ExitCode,
};

use flate2::{Compression, write::GzEncoder};

use super::{
    CliError, Done,
    args::{Cli, SupportBundle},
    output, size,
};
use crate::lun::state_file::now_ms;

/// The folder in the archive.
const FOLDER: &str = "tcmu-dif-support";

/// A file of the bundle: its path in the folder, and what is in it.
type File = (String, Vec<u8>);

/// Collects, packs, writes, and says where to.
pub fn run(cli: &Cli, args: &SupportBundle) -> Done {
    let seconds = now_ms() / 1000;
    let path = match &args.output {
        Some(path) => path.clone(),
        None => PathBuf::from(format!("{FOLDER}-{seconds}.tar.gz")),
    };
    // Said before the work; `store` makes sure of it.
    if path.symlink_metadata().is_ok() {
        return Err(refused(&path, &io::ErrorKind::AlreadyExists.into()));
    }
    let collected = sources::collect(cli);
    let failed = |e: &io::Error| refused(&path, e);
    let packed = pack(&collected.files, seconds).map_err(|e| failed(&e))?;
    store(&path, &packed).map_err(|e| failed(&e))?;

    if args.json.json {
        let reason = |(name, why): &(&str, String)| serde_json::json!({ "name": name, "reason": why });
        return output::json(&serde_json::json!({
            "output": path.display().to_string(), "bytes": packed.len(),
            "missing": collected.failed.iter().map(reason).collect::<Vec<_>>(),
        }));
    }
    let mut text =
        format!("{} ({}), to be read by its owner alone", path.display(), size::human(packed.len() as u64));
    for (name, why) in &collected.failed {
        text.push_str(&format!("\nnot in it: {name}: {why}"));
    }
    output::print(&text)?;
    Ok(ExitCode::SUCCESS)
}

fn refused(path: &Path, e: &io::Error) -> CliError {
    if e.kind() == io::ErrorKind::AlreadyExists {
        return CliError::new(
            "support-bundle",
            path.display(),
            "it is there already, and is not overwritten",
        )
        .then("give another name: tcmu-dif support-bundle --output FILE.tar.gz");
    }
    CliError::from("support-bundle", path.display(), e).then(
        "give a file in a directory that can be written to: tcmu-dif support-bundle --output FILE.tar.gz",
    )
}

/// A tar archive of these files, compressed.
fn pack(files: &[File], seconds: u64) -> io::Result<Vec<u8>> {
    let mut archive = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::default()));
    for (name, bytes) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o600);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(seconds);
        archive.append_data(&mut header, Path::new(FOLDER).join(name), bytes.as_slice())?;
    }
    archive.into_inner()?.finish()
}

/// Writes a new file with mode 0600; on failure nothing is left.
fn store(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all());
    if written.is_err() {
        fs::remove_file(path).ok();
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn what_is_packed_comes_out_again() {
        let files =
            vec![("a.txt".to_owned(), b"one".to_vec()), ("run/luns/vm1.json".to_owned(), b"{}".to_vec())];
        let packed = pack(&files, 1_700_000_000).unwrap();
        let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(packed.as_slice()));
        let mut out = Vec::new();
        for entry in archive.entries().unwrap() {
            let mut entry = entry.unwrap();
            let name = entry.path().unwrap().to_str().unwrap().to_owned();
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).unwrap();
            out.push((name.strip_prefix("tcmu-dif-support/").unwrap().to_owned(), bytes));
        }
        assert_eq!(out, files);
    }

    #[test]
    fn a_file_that_cannot_be_written_whole_is_removed_and_one_that_was_there_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let there = dir.path().join("there");
        fs::write(&there, "mine").unwrap();
        assert_eq!(store(&there, b"new").unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&there).unwrap(), b"mine");
        let new = dir.path().join("new");
        store(&new, b"new").unwrap();
        let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&new).unwrap().permissions());
        assert_eq!((fs::read(&new).unwrap(), mode & 0o777), (b"new".to_vec(), 0o600));
    }
}
