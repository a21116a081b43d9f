//! `tcmu-dif image snapshot`, and the list of snapshots in `image info`: qemu-img's words, table and JSON.

use std::{path::Path, process::ExitCode, time::SystemTime};

use super::{CliError, Done, image::warn_of_sidecar, image_args::ImageSnapshot, output};
use crate::{
    admin::images::open_failed,
    image::{
        Driver, Image,
        open::{OpenOptions, open_any_size},
        qcow2::{SnapshotError, SnapshotInfo},
    },
    sys::{self, clock},
    volume::{IoError, Volume},
};

/// The lines of qemu-img's list; none if there are no snapshots.
pub fn table(all: &[SnapshotInfo]) -> Vec<String> {
    let line = |id: &str, tag: &str, size: &str, date: &str, clock: &str, icount: &str| {
        let line = format!("{id:<9} {tag:<16} {size:>8} {date:>19} {clock:>12} {icount:>10}");
        line.trim_end().to_owned()
    };
    if all.is_empty() {
        return Vec::new();
    }
    let mut out = vec!["Snapshot list:".to_owned()];
    out.push(line("ID", "TAG", "VM SIZE", "DATE", "VM CLOCK", "ICOUNT"));
    for s in all {
        let date = clock::local(s.date_sec.into()).map_or_else(String::new, |local| {
            let ((year, month, day), (hour, minute, second)) = (local.date, local.time);
            format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}")
        });
        let (minutes, millis) = (s.vm_clock_sec / 60, s.vm_clock_nsec / 1_000_000);
        let clock = format!("{:02}:{:02}:{:02}.{millis:03}", minutes / 60, minutes % 60, s.vm_clock_sec % 60);
        // Names come from the file: nothing in them moves the cursor.
        let tag: String = s.name.chars().map(|c| if c.is_control() { '?' } else { c }).collect();
        let icount = s.icount.map_or_else(String::new, |n| n.to_string());
        out.push(line(&s.id, &tag, &three_digits(s.vm_state_size), &date, &clock, &icount));
    }
    out
}

/// A size in three digits, as qemu-img's lists have it: `0 B`, `1.5 KiB`, `210 MiB`.
fn three_digits(bytes: u64) -> String {
    let (mut value, mut unit) = (bytes as f64, 0);
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    while value >= 1000.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    let places = match value {
        v if v >= 100.0 => 0,
        v if v >= 10.0 => 1,
        v if v >= 1.0 => 2,
        _ => 3,
    };
    let digits = format!("{value:.places$}");
    let digits = match digits.contains('.') {
        true => digits.trim_end_matches('0').trim_end_matches('.'),
        false => &digits,
    };
    format!("{digits} {}", units[unit])
}

/// The snapshots of an image, read without its lock.
pub fn look(path: &Path) -> Result<Vec<SnapshotInfo>, CliError> {
    list(path, false)
}

fn list(path: &Path, lock: bool) -> Result<Vec<SnapshotInfo>, CliError> {
    let at = path.to_owned();
    let listed = sys::run(async move |io| {
        let options = OpenOptions { read_only: true, lock, ..OpenOptions::default() };
        let image = open_any_size(&io, &at, &options).await?;
        Ok(image.snapshots())
    });
    listed.map_err(|e| open_failed(path, &e))
}

/// What is to be done with which.
#[derive(Clone)]
enum Change {
    Create(String),
    Apply(String),
    Delete(String),
}

impl Change {
    fn words(&self) -> (&'static str, &str) {
        match self {
            Change::Create(name) => ("create", name),
            Change::Apply(name) => ("apply", name),
            Change::Delete(name) => ("delete", name),
        }
    }

    async fn make(&self, image: &Image) -> Result<(), Failed> {
        let Driver::Qcow2(qcow2) = image.driver() else { return Err(Failed::NoSnapshots) };
        match self {
            Change::Create(name) => qcow2.snapshot_create(name, SystemTime::now()).await.map(drop)?,
            Change::Apply(name) => qcow2.snapshot_apply(name).await?,
            Change::Delete(name) => qcow2.snapshot_delete(name).await?,
        }
        Ok(())
    }
}

/// Why a change was not made.
#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error("a raw image has no snapshots")]
    NoSnapshots,
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    #[error(transparent)]
    Close(#[from] IoError),
}

/// Runs `image snapshot`.
pub fn run(args: &ImageSnapshot) -> Done {
    let path = &args.path;
    let named = [
        args.create.clone().map(Change::Create),
        args.apply.clone().map(Change::Apply),
        args.delete.clone().map(Change::Delete),
    ];
    let Some(change) = named.into_iter().flatten().next() else {
        let listed = list(path, !args.force_share)?;
        if args.json {
            return output::json(&listed);
        }
        return match listed.is_empty() {
            true => Ok(ExitCode::SUCCESS),
            false => output::print(&table(&listed).join("\n")),
        };
    };
    let (at, asked) = (path.clone(), change.clone());
    let done = sys::run(async move |io| {
        let image = open_any_size(&io, &at, &OpenOptions::default()).await?;
        let made = asked.make(&image).await;
        // Whatever became of it, the image is given back as it should be.
        let closed = image.close().await.map_err(Failed::Close);
        Ok(made.and(closed))
    });
    let made = done.map_err(|e| open_failed(path, &e))?;
    made.map_err(|e| {
        let (verb, name) = change.words();
        let next = match &e {
            Failed::NoSnapshots => {
                Some(format!("convert it: qemu-img convert -O qcow2 {} NEW", path.display()))
            }
            Failed::Snapshot(SnapshotError::Unknown(_)) => {
                Some(format!("see what there is: tcmu-dif image snapshot -l {}", path.display()))
            }
            Failed::Snapshot(e) => e.next_step(),
            Failed::Close(_) => None,
        };
        let look = || format!("look at the image: tcmu-dif image info {}", path.display());
        let value = format!("{}: could not {verb} snapshot '{name}'", path.display());
        CliError::from("image", value, &e).then(next.unwrap_or_else(look))
    })?;
    warn_of_sidecar(path);
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_three_digits() {
        for (bytes, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (1536, "1.5 KiB"),
            (220_200_960, "210 MiB"),
            (3 << 30, "3 GiB"),
        ] {
            assert_eq!(three_digits(bytes), text);
        }
    }
}
