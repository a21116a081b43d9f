//! Metadata contexts: which an export offers, which of them a client asks for, and the extents of its answers (proto.md, "Metadata querying";
//! QEMU's docs/interop/nbd.txt for the namespace `qemu`).

use super::Export;
use crate::{
    nbd::{BASE_ALLOCATION, QEMU_ALLOCATION_DEPTH, QEMU_DIRTY_BITMAP, allocation, dirty},
    volume::ExtentKind,
};

/// Extents of one reply, of each context.
const MAX_EXTENTS: usize = 4096;

/// A context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Context {
    /// Holes, zeros and data.
    Allocation,
    /// Which image of the chain has it.
    Depth,
    /// What a dirty bitmap has marked, by its place among those of the export.
    Dirty(usize),
}

/// A run of a map: bytes, what they hold, and which image of the chain has it.
pub(super) type Run = (u64, ExtentKind, u32);

impl Context {
    fn all(export: &Export) -> impl Iterator<Item = Context> {
        let depth = export.allocation_depth.then_some(Context::Depth);
        let dirty = (0..export.lun.bitmaps().len()).map(Context::Dirty);
        [Context::Allocation].into_iter().chain(depth).chain(dirty)
    }

    /// Its number on the wire, the same to all clients of an export.
    pub fn number(self) -> u32 {
        match self {
            Context::Allocation => 1,
            Context::Depth => 2,
            Context::Dirty(at) => 3 + at as u32,
        }
    }

    /// Its name.
    pub fn name(self, export: &Export) -> String {
        match self {
            Context::Allocation => BASE_ALLOCATION.to_owned(),
            Context::Depth => QEMU_ALLOCATION_DEPTH.to_owned(),
            Context::Dirty(at) => {
                let name = export.lun.bitmaps().get(at).map(String::as_str);
                format!("{QEMU_DIRTY_BITMAP}{}", name.unwrap_or_default())
            }
        }
    }

    /// Those that are meant by queries. Who only wants a list (`list`) may ask for a whole namespace, all dirty bitmaps, or, with no query,
    /// everything; who chooses has to name each.
    pub fn asked(export: &Export, queries: &[String], list: bool) -> Vec<Context> {
        let meant = |context: &Context| {
            let name = context.name(export);
            let of_a_kind = |query: &str| match query {
                "base:" | "qemu:" | QEMU_DIRTY_BITMAP => name.starts_with(query),
                _ => false,
            };
            (list && queries.is_empty())
                || queries.iter().any(|query| *query == name || (list && of_a_kind(query)))
        };
        Context::all(export).filter(meant).collect()
    }

    /// What a run of the map is in this context.
    pub fn of_run(self, (len, kind, depth): Run) -> (u64, u32) {
        let flags = match (self, kind) {
            (Context::Depth, ExtentKind::Unallocated) => 0,
            (Context::Depth, _) => depth.saturating_add(1),
            (_, ExtentKind::Data) => 0,
            (_, ExtentKind::Zero) => allocation::ZERO,
            (_, ExtentKind::Hole | ExtentKind::Unallocated) => allocation::HOLE | allocation::ZERO,
        };
        (len, flags)
    }
}

/// What a run of a dirty bitmap is in its context.
pub(super) fn of_marks((len, marked): (u64, bool)) -> (u64, u32) {
    (len, if marked { dirty::DIRTY } else { 0 })
}

/// The extents of a reply about `len` bytes: runs that are alike together; with `one` the first of them.
pub(super) fn extents(runs: impl Iterator<Item = (u64, u32)>, len: u64, one: bool) -> Vec<(u32, u32)> {
    let (mut out, mut left) = (Vec::<(u32, u32)>::new(), len);
    for (run, flags) in runs {
        // No longer than the request, which has 32 bits.
        let n = u32::try_from(run.min(left)).unwrap_or(u32::MAX);
        let full = out.len() >= MAX_EXTENTS;
        match out.last_mut() {
            Some(last) if last.1 == flags => last.0 += n,
            _ if n == 0 || full => break,
            _ => out.push((n, flags)),
        }
        left -= u64::from(n);
        if left == 0 {
            break;
        }
    }
    if one {
        out.truncate(1);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lun::{Remote, exported::Exported};

    fn export(allocation_depth: bool) -> Export {
        Export {
            id: "e".into(),
            device: "vm1".into(),
            name: "vm1".into(),
            description: String::new(),
            writable: false,
            allocation_depth,
            lun: Exported::as_it_is(Remote::of_nobody()),
        }
    }

    #[test]
    fn a_namespace_is_an_answer_to_who_wants_a_list_and_a_name_to_who_chooses() {
        let export = export(true);
        let asked = |queries: &[&str], list| {
            let queries: Vec<String> = queries.iter().map(|q| (*q).to_owned()).collect();
            Context::asked(&export, &queries, list)
        };
        let (allocation, depth) = (Context::Allocation, Context::Depth);
        assert_eq!(asked(&[], true), [allocation, depth]);
        assert_eq!(asked(&["base:"], true), [allocation]);
        assert_eq!(asked(&["qemu:"], true), [depth]);
        assert_eq!(asked(&[QEMU_DIRTY_BITMAP], true), []);
        assert_eq!(asked(&["qemu:allocation-depth", BASE_ALLOCATION], true), [allocation, depth]);
        assert_eq!(asked(&[BASE_ALLOCATION, BASE_ALLOCATION, "x", ""], false), [allocation]);
        for nothing in [&["base:"][..], &["qemu:"], &[QEMU_DIRTY_BITMAP], &["qemu:dirty-bitmap:x"], &[]] {
            assert_eq!(asked(nothing, false), [], "{nothing:?}");
        }
    }

    #[test]
    fn runs_that_are_alike_are_one_extent_and_none_is_longer_than_what_was_asked_for() {
        let of = |runs: &[(u64, u32)], len, one| extents(runs.iter().copied(), len, one);
        assert_eq!(of(&[(10, 0), (5, 0), (5, 1), (100, 0)], 30, false), [(15, 0), (5, 1), (10, 0)]);
        assert_eq!(of(&[(10, 0), (5, 0), (5, 1)], 30, true), [(15, 0)]);
        assert_eq!(of(&[(100, 3)], 30, false), [(30, 3)]);
        assert_eq!(of(&[], 30, false), []);
        let many: Vec<(u64, u32)> = (0..10_000).map(|n| (1, n % 2)).collect();
        assert_eq!(of(&many, 10_000, false).len(), MAX_EXTENTS);
        let (data, hole) = ((8, ExtentKind::Data, 2), (8, ExtentKind::Unallocated, 3));
        assert_eq!((Context::Depth.of_run(data), Context::Depth.of_run(hole)), ((8, 3), (8, 0)));
        assert_eq!((Context::Allocation.of_run(data), Context::Allocation.of_run(hole)), ((8, 0), (8, 3)));
    }
}
