//! Another backing file, or none, while the image is open: the header names it, and the next opening follows.
//!
//! The header is changed in place, in an order that a crash may cut anywhere: a new name is written where nothing is yet, and synced; then
//! its place, its length and the format change together, within the first sector, which a disk writes whole. So a header names the old
//! backing file or the new one. It is not for the image to judge whether what a guest sees stays the same.

use super::{
    HeaderInfo, Qcow2, Storage,
    header::{EXT_BACKING_FORMAT, field, probe_header},
    layout::{be32, be64},
};
use crate::{
    sys::mem::Buffer,
    volume::{IoErrorKind, IoOp, Result},
};

const OP: IoOp = IoOp::Write;
/// What every disk writes whole.
const SECTOR: usize = 512;
/// Bytes of an extension's head: type and length.
pub(super) const HEAD: usize = 8;

/// How a header is changed.
#[derive(Debug, PartialEq, Eq)]
struct Plan {
    /// The new name, and where it is written first.
    name: Option<(usize, Vec<u8>)>,
    /// The first sector as it is then.
    sector: Vec<u8>,
}

impl<S: Storage> Qcow2<S> {
    /// Makes durable that the image has another backing file (its name and format, as the header shall have them), or none. All that was
    /// written before is durable first. What is open stays as it is: the image has to be closed and opened anew.
    ///
    /// # Errors
    /// `Unsupported` if the header cannot be changed in place; the image's own.
    pub async fn set_backing(&self, to: Option<(&str, &str)>) -> Result<()> {
        self.alone(OP, async {
            let len = self.geometry.cluster().min(self.storage.size().map_err(|e| self.io_error(OP, e))?);
            let first = Buffer::zeroed(len as usize);
            self.storage.read(0, &first.sg()).await.map_err(|e| self.io_error(OP, e))?;
            let plan = plan(&first.to_vec(), to).map_err(|why| {
                let detail = format!(
                    "its header has no place for another backing file ({why}); with the LUN deleted: qemu-img rebase -u"
                );
                self.error(IoErrorKind::Unsupported, OP, detail)
            })?;
            let Some(plan) = plan else { return Ok(()) };
            if let Some((at, name)) = plan.name {
                let name = Buffer::from_slice(&name).sg();
                self.storage.write(at as u64, &name).await.map_err(|e| self.io_error(OP, e))?;
                self.sync(OP).await?;
            }
            let sector = Buffer::from_slice(&plan.sector).sg();
            self.storage.write(0, &sector).await.map_err(|e| self.io_error(OP, e))?;
            self.sync(OP).await
        })
        .await
    }
}

/// The extensions of a header, each with where it begins, its type, and its bytes; and where the list ends.
pub(super) fn extensions(first: &[u8], from: usize, end: usize) -> (Vec<(usize, u32, usize)>, usize) {
    let mut found = Vec::new();
    let mut at = from;
    while at + HEAD <= end {
        let (kind, len) = (be32(first, at), be32(first, at + 4) as usize);
        if kind == 0 {
            return (found, at + HEAD);
        }
        found.push((at, kind, len));
        at += HEAD + len.next_multiple_of(8);
    }
    (found, at)
}

/// What is to be written; nothing if it stands there already.
fn plan(first: &[u8], to: Option<(&str, &str)>) -> std::result::Result<Option<Plan>, String> {
    let old = probe_header(first).map_err(|e| e.to_string())?;
    let has = old.backing_file.as_deref().map(|name| (name, old.backing_format.as_deref()));
    if has == to.map(|(name, format)| (name, Some(format))) {
        return Ok(None);
    }
    let at = field::BACKING_FILE as usize;
    let (name_at, name_len) = (be64(first, at) as usize, be32(first, at + 8) as usize);
    let end = if name_at == 0 { first.len() } else { name_at.min(first.len()) };
    let (extensions, after) = extensions(first, old.header_length as usize, end);
    let mut sector = first.get(..SECTOR).ok_or("it ends within its first sector")?.to_vec();
    let format = extensions.iter().find(|(_, kind, _)| *kind == EXT_BACKING_FORMAT);
    let name = match to {
        None => {
            sector[at..at + 12].fill(0);
            // Where it is the last, it goes; otherwise it says nothing without a name.
            if let Some((from, _, len)) = format.filter(|f| extensions.last() == Some(f)) {
                let until = from + HEAD + len.next_multiple_of(8);
                if until <= SECTOR {
                    sector[*from..until].fill(0);
                }
            }
            None
        }
        Some((name, format_name)) => {
            let (from, _, len) = format.ok_or("it does not say the format of its backing file")?;
            let room = len.next_multiple_of(8);
            if format_name.len() > room || from + HEAD + room > SECTOR {
                return Err("the format of its backing file stands elsewhere".into());
            }
            let place = after.max(name_at + name_len).next_multiple_of(8);
            // Before the old name, if there is no room behind it: nothing may be written over that yet.
            let place = match place + name.len() <= first.len() {
                true => place,
                false if after + name.len() <= name_at => after,
                false => return Err("its first cluster is full".into()),
            };
            if place < SECTOR && place + name.len() > SECTOR {
                // It begins in the sector that changes last.
                sector[place..].copy_from_slice(&name.as_bytes()[..SECTOR - place]);
            } else if place < SECTOR {
                sector[place..place + name.len()].copy_from_slice(name.as_bytes());
            }
            sector[at..at + 8].copy_from_slice(&(place as u64).to_be_bytes());
            sector[at + 8..at + 12].copy_from_slice(&(name.len() as u32).to_be_bytes());
            sector[from + 4..from + 8].copy_from_slice(&(format_name.len() as u32).to_be_bytes());
            sector[from + HEAD..from + HEAD + room].fill(0);
            sector[from + HEAD..from + HEAD + format_name.len()].copy_from_slice(format_name.as_bytes());
            Some((place, name.as_bytes().to_vec()))
        }
    };
    let plan = Plan { name, sector };
    check(first, &plan, &old, to)?;
    Ok(Some(plan))
}

/// Sees that a header would be read as the old one at each step, and at the end as it is meant to be.
fn check(
    first: &[u8],
    plan: &Plan,
    old: &HeaderInfo,
    to: Option<(&str, &str)>,
) -> std::result::Result<(), String> {
    let mut bytes = first.to_vec();
    if let Some((at, name)) = &plan.name {
        bytes[*at..*at + name.len()].copy_from_slice(name);
    }
    if probe_header(&bytes).as_ref() != Ok(old) {
        return Err("the new name would stand where something else does".into());
    }
    bytes[..SECTOR].copy_from_slice(&plan.sector);
    let mut meant = HeaderInfo { backing_file: to.map(|(name, _)| name.to_owned()), ..old.clone() };
    let found = probe_header(&bytes).map_err(|e| e.to_string())?;
    meant.backing_format = match to {
        Some((_, format)) => Some(format.to_owned()),
        None => found.backing_format.clone(),
    };
    if found != meant {
        return Err("what else it says would change".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::header::NewHeader;
    use super::*;
    use crate::image::qcow2::layout::Geometry;

    fn header(cluster_bits: u32, version: u32, backing: Option<(&str, &str)>) -> Vec<u8> {
        let geometry =
            Geometry { version, cluster_bits, refcount_order: 4, extended_l2: false, data_file: false };
        let mut bytes = NewHeader {
            geometry,
            virtual_size: 1 << 20,
            backing_file: backing.map(|(name, _)| name),
            backing_format: backing.map(|(_, format)| format),
            data_file: None,
            raw_data_file: false,
            l1_entries: 1 << 8,
            l1_offset: 3 << cluster_bits,
            refcount_table_offset: 1 << cluster_bits,
            refcount_table_clusters: 1,
        }
        .encode()
        .unwrap();
        bytes.resize(1 << cluster_bits, 0);
        bytes
    }

    /// The header after all steps of a plan.
    fn done(first: &[u8], to: Option<(&str, &str)>) -> std::result::Result<HeaderInfo, String> {
        let Some(plan) = plan(first, to)? else { return probe_header(first).map_err(|e| e.to_string()) };
        let mut bytes = first.to_vec();
        if let Some((at, name)) = plan.name {
            bytes[at..at + name.len()].copy_from_slice(&name);
        }
        bytes[..SECTOR].copy_from_slice(&plan.sector);
        probe_header(&bytes).map_err(|e| e.to_string())
    }

    #[test]
    fn a_header_gets_another_backing_file_or_none_and_keeps_all_else() {
        let long = format!("/{}", "x".repeat(400));
        for version in [2, 3] {
            for to in [None, Some(("/b.raw", "raw")), Some((&*long, "qcow2")), Some(("/a", "qcow2"))] {
                let first = header(16, version, Some(("/a", "qcow2")));
                let old = probe_header(&first).unwrap();
                let new = done(&first, to).unwrap();
                let meant = HeaderInfo {
                    backing_file: to.map(|(name, _)| name.to_owned()),
                    backing_format: to.map(|(_, format)| format.to_owned()),
                    ..old
                };
                assert_eq!(new, meant, "{to:?}");
            }
        }
    }

    #[test]
    fn a_header_without_room_or_format_is_left_alone() {
        let small = header(9, 3, Some(("/a", "raw")));
        let long = format!("/{}", "x".repeat(400));
        assert!(plan(&small, Some((&long, "raw"))).unwrap_err().contains("full"));
        assert!(plan(&small, Some(("/b", "qcow2"))).is_ok());
        assert_eq!(plan(&small, Some(("/a", "raw"))), Ok(None));
        let alone = header(16, 3, None);
        assert_eq!(plan(&alone, None), Ok(None));
        assert!(plan(&alone, Some(("/a", "raw"))).unwrap_err().contains("format"));
    }

    #[test]
    fn what_stands_behind_the_format_stays() {
        // A feature name table, as QEMU writes it, behind the format: the format stays, and says nothing without a name.
        let mut first = header(16, 3, Some(("/a", "raw")));
        let (list, after) = extensions(&first, 112, be64(&first, 8) as usize);
        assert_eq!((list.len(), after), (1, 112 + 16 + 8));
        let mut table = Vec::new();
        table.extend(0x6803_f857u32.to_be_bytes());
        table.extend(48u32.to_be_bytes());
        table.extend([0u8, 0]);
        table.extend(b"dirty bit");
        table.resize(8 + 48, 0);
        first[128..128 + table.len()].copy_from_slice(&table);
        let name_at = 128 + table.len() + 8;
        first[name_at..name_at + 2].copy_from_slice(b"/a");
        first[8..16].copy_from_slice(&(name_at as u64).to_be_bytes());
        let new = done(&first, None).unwrap();
        assert_eq!((new.backing_file, new.backing_format.as_deref()), (None, Some("raw")));
        let new = done(&first, Some(("/other.qcow2", "qcow2"))).unwrap();
        assert_eq!(new.backing_file.as_deref(), Some("/other.qcow2"));
    }
}
