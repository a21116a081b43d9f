//! What tells whether an image has been changed by somebody else: [`Stamp`]. Kept in the sidecar's header at a clean close,
//! compared when the image is opened. Called by the sidecar, the decorator and the tools.

use std::{fs::File, io, os::unix::fs::MetadataExt, path::Path};

use rustix::fs::{SeekFrom, seek};
use serde::Serialize;

/// What of a file changes when somebody writes to it and stays when `cp -p` or `rsync -a` copies it. A write within the
/// tick of the file system's clock (some milliseconds) in which the stamp was taken, and to the same size, is not seen
/// by it; nor is one to a block device, which has no time of modification of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Stamp {
    /// Bytes.
    pub size: u64,
    /// Time of the last modification: seconds since 1970, and nanoseconds. (0, 0) for a block device.
    pub mtime: (i64, u32),
}

impl Stamp {
    /// The stamp of a file or block device.
    ///
    /// # Errors
    /// Those of `stat`, or of opening a block device to ask for its size.
    pub fn of(path: &Path) -> io::Result<Stamp> {
        let meta = std::fs::metadata(path)?;
        if meta.is_file() {
            return Ok(Stamp { size: meta.len(), mtime: (meta.mtime(), meta.mtime_nsec() as u32) });
        }
        let size = seek(File::open(path)?, SeekFrom::End(0))?;
        Ok(Stamp { size, mtime: (0, 0) })
    }
}

impl Stamp {
    /// The stamp of an image of so many bytes that is at the other end of a wire: as a block device, it has no time of its own.
    pub fn of_size(size: u64) -> Stamp {
        Stamp { size, mtime: (0, 0) }
    }

    /// Whether what was left with this stamp is unchanged by the look of `found`. A block device has no time to compare.
    pub fn matches(&self, found: &Stamp) -> bool {
        self.size == found.size && (self.mtime == (0, 0) || self.mtime == found.mtime)
    }
}

impl std::fmt::Display for Stamp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes, modified at {}.{:09}", self.size, self.mtime.0, self.mtime.1)
    }
}
