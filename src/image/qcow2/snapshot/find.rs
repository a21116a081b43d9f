//! Which snapshot is meant, and what a new one may be called.

use super::Snapshot;
use crate::volume::IoError;

/// The longest name, in bytes: QEMU keeps 256 with the final zero.
pub const MAX_NAME: usize = 255;

/// Why nothing was done with a snapshot.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// No ID and no name is that.
    #[error("there is no snapshot '{0}'")]
    Unknown(String),
    /// It may mean several; these are their IDs.
    #[error("'{which}' may mean any of the snapshots with the IDs {}", ids.join(", "))]
    Ambiguous {
        /// What was said.
        which: String,
        /// The IDs.
        ids: Vec<String>,
    },
    /// A new one cannot be called that.
    #[error("a snapshot cannot be called '{name}': {reason}")]
    Name {
        /// The name.
        name: String,
        /// Why not.
        reason: String,
    },
    /// The image has as many as it can have.
    #[error("the image has {0} snapshots, and has no room for more")]
    Full(usize),
    /// The image could not be changed.
    #[error(transparent)]
    Io(#[from] IoError),
}

impl SnapshotError {
    /// What the administrator does next, if there is something.
    pub fn next_step(&self) -> Option<String> {
        match self {
            SnapshotError::Ambiguous { ids, .. } => {
                Some(format!("say which: snapshot.id={}", ids.first().map_or("ID", |id| id)))
            }
            SnapshotError::Full(_) => Some("delete a snapshot first".to_owned()),
            SnapshotError::Name { .. } => Some("choose another name".to_owned()),
            SnapshotError::Unknown(_) | SnapshotError::Io(_) => None,
        }
    }
}

/// The index of the snapshot that a word means: its ID or its name, as `qemu-img snapshot` and `qemu-img convert -l` take them, or
/// just one of the two with `snapshot.id=` or `snapshot.name=` before it.
///
/// # Errors
/// `Unknown`, and `Ambiguous` where several fit: QEMU would take one of them, and not always the same.
pub fn find(all: &[Snapshot], which: &str) -> Result<usize, SnapshotError> {
    let fits = |s: &Snapshot| match (which.strip_prefix("snapshot.id="), which.strip_prefix("snapshot.name="))
    {
        (Some(id), _) => s.id == id,
        (_, Some(name)) => s.name == name,
        _ => s.id == which || s.name == which,
    };
    let found: Vec<usize> = (0..all.len()).filter(|i| fits(&all[*i])).collect();
    match found.as_slice() {
        [] => Err(SnapshotError::Unknown(which.to_owned())),
        [one] => Ok(*one),
        several => Err(SnapshotError::Ambiguous {
            which: which.to_owned(),
            ids: several.iter().map(|i| all[*i].id.clone()).collect(),
        }),
    }
}

/// The ID that QEMU would give a new one: the highest number so far, and one.
pub fn next_id(all: &[Snapshot]) -> String {
    let highest = all.iter().filter_map(|s| s.id.parse::<u64>().ok()).max().unwrap_or(0);
    highest.saturating_add(1).to_string()
}

/// Whether a new snapshot may be called so.
pub fn check_name(all: &[Snapshot], name: &str) -> Result<(), SnapshotError> {
    let wrong = |reason: String| SnapshotError::Name { name: name.to_owned(), reason };
    if name.is_empty() || name.len() > MAX_NAME {
        return Err(wrong(format!("a name has 1 to {MAX_NAME} bytes")));
    }
    if name.chars().any(char::is_control) {
        return Err(wrong("control characters do not belong in a name".to_owned()));
    }
    match all.iter().find(|s| s.name == name) {
        Some(other) => Err(wrong(format!("the one with the ID {} is called that", other.id))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::table::NewEntry, *};

    fn all(entries: &[(&str, &str)]) -> Vec<Snapshot> {
        let entry = |(id, name): &(&str, &str)| {
            let zero =
                NewEntry { id, name, seconds: 0, nanoseconds: 0, disk_size: 0, l1_offset: 0, l1_entries: 0 };
            zero.build()
        };
        entries.iter().map(entry).collect()
    }

    #[test]
    fn a_word_means_one_snapshot_or_is_refused() {
        let all = all(&[("1", "one"), ("2", "twin"), ("3", "twin"), ("4", "2"), ("5", "5")]);
        assert_eq!(find(&all, "one").unwrap(), 0);
        assert_eq!(find(&all, "1").unwrap(), 0);
        assert_eq!(find(&all, "5").unwrap(), 4);
        assert_eq!(find(&all, "snapshot.id=2").unwrap(), 1);
        assert_eq!(find(&all, "snapshot.name=2").unwrap(), 3);
        for (which, expected) in [("twin", ["2", "3"]), ("2", ["2", "4"])] {
            let e = find(&all, which).unwrap_err();
            assert!(matches!(&e, SnapshotError::Ambiguous { ids, .. } if *ids == expected), "{e}");
            assert!(e.next_step().is_some());
        }
        assert!(matches!(find(&all, "six"), Err(SnapshotError::Unknown(_))));
        assert_eq!(next_id(&all), "6");
        assert_eq!(next_id(&[]), "1");
    }

    #[test]
    fn new_names_are_short_visible_and_not_taken() {
        let all = all(&[("1", "one")]);
        assert!(check_name(&all, "two").is_ok() && check_name(&all, "1").is_ok());
        for bad in ["", "one", "a\nb", &"x".repeat(256)] {
            assert!(check_name(&all, bad).is_err(), "{bad:?}");
        }
    }
}
