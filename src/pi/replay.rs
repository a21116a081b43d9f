//! After a crash, in mode "journal": every block that the journal knows of gets that one of its tuples that matches its data.
//!
//! A block whose data match none of them has been torn by the crash. It keeps a tuple that does not match, so that reading it
//! is an error: nothing is ever made anew from data that nobody vouches for. After a failed write the same is done for its
//! range alone.
//!
//! Called by [`super::protected`], and by the tools when they look at a sidecar that was not closed.

use std::ops::Range;

use super::{
    check::Checker,
    recompute::{CHUNK, ReadBlocks, bytes, next_run, read_blocks},
    store::{Claim, Claims, Sidecar},
    tuple::{PiType, TUPLE_LEN, Tuple},
};
use crate::{
    storage::Storage,
    sys::exec::join,
    units::Lba,
    volume::{IoError, IoOp, Result, Volume},
};

/// Where the tuples go that are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sink {
    /// Into the sidecar.
    File,
    /// Into its memory, because it may not be written.
    Memory,
}

/// What became of the blocks that the journal knows of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Replayed {
    /// Blocks looked at.
    pub looked_at: u64,
    /// Blocks whose tuple is another one of theirs now.
    pub settled: u64,
    /// Blocks whose data match none of their tuples: they are errors.
    pub torn: u64,
    /// Blocks that could not be read; they have their newest tuple.
    pub unreadable: u64,
}

/// Gives every block that the claims are about, inside `within`, its tuple. What the volume gives must be durable.
pub(super) async fn replay<V: Volume, S: Storage>(
    volume: &V,
    sidecar: &Sidecar<S>,
    checker: &Checker,
    claims: &Claims,
    within: Range<u64>,
    sink: Sink,
) -> Result<Replayed> {
    let mut done = Replayed::default();
    let most = CHUNK >> checker.block_size.shift();
    let inside = |r: &Range<u64>| r.start.max(within.start)..r.end.min(within.end);
    let mut zeros: Vec<Range<u64>> = claims.zeros.iter().map(inside).filter(|r| r.start < r.end).collect();
    zeros.sort_unstable_by_key(|r| r.start);
    for range in &zeros {
        let mut from = range.start;
        while let Some(run) = next_run(volume, sidecar, from, range.end).await? {
            from = run.blocks.end;
            one_run(volume, sidecar, checker, claims, run.blocks, sink, &mut done).await?;
        }
    }
    // What was zeroed as well has been seen by now, or is a hole without tuples.
    let rest = |lba: &u64| within.contains(lba) && !zeros.iter().any(|r| r.contains(lba));
    let mut blocks = claims.blocks.iter().map(|c| c.lba).filter(rest).peekable();
    while let Some(start) = blocks.next() {
        let mut end = start + 1;
        while let Some(next) = blocks.next_if(|lba| *lba <= end && *lba - start < most) {
            end = next + 1;
        }
        one_run(volume, sidecar, checker, claims, start..end, sink, &mut done).await?;
    }
    Ok(done)
}

async fn one_run<V: Volume, S: Storage>(
    volume: &V,
    sidecar: &Sidecar<S>,
    checker: &Checker,
    claims: &Claims,
    blocks: Range<u64>,
    sink: Sink,
    done: &mut Replayed,
) -> Result<()> {
    let (first, count) = (Lba(blocks.start), blocks.end - blocks.start);
    let (at, _) = bytes(checker.block_size, blocks.clone())?;
    let (read, tuples) =
        join(read_blocks(volume, checker.block_size, blocks), sidecar.read_tuples(first, count)).await;
    let ReadBlocks { data: sg, unreadable } = read?;
    let mut tuples = tuples.map_err(|e| IoError::from_io(IoOp::Read, e).at(at))?;
    let mut changed = false;
    checker.guards(&sg, |i, guard| {
        let lba = first.0 + i as u64;
        let slot = &mut tuples[i * TUPLE_LEN..][..TUPLE_LEN];
        let stored: [u8; TUPLE_LEN] = std::array::from_fn(|k| slot[k]);
        let size = checker.block_size.bytes() as usize;
        let was_zeroed = claims.zeros.iter().any(|r| r.contains(&lba));
        let evidence = Evidence {
            kind: checker.kind,
            stored,
            claims: of(&claims.blocks, lba),
            zeroed: was_zeroed && sg.slice(i * size, size).is_zero(),
            guard: if unreadable.binary_search(&i).is_ok() { None } else { Some(guard) },
        };
        done.looked_at += 1;
        let (tuple, found) = evidence.judge();
        match found {
            Found::Whole => done.settled += u64::from(tuple != stored),
            Found::Torn => done.torn += 1,
            Found::Unknown => done.unreadable += 1,
        }
        if tuple != stored {
            changed = true;
            slot.copy_from_slice(&tuple);
        }
    });
    match sink {
        _ if !changed => Ok(()),
        Sink::Memory => {
            sidecar.overlay(first, &tuples);
            Ok(())
        }
        Sink::File => {
            let wrote = sidecar.write_tuples(first, tuples, false).await;
            wrote.map_err(|e| IoError::from_io(IoOp::Write, e).at(at))
        }
    }
}

/// The claims about one block, oldest first.
fn of(all: &[Claim], lba: u64) -> &[Claim] {
    let from = all.partition_point(|c| c.lba < lba);
    let len = all[from..].partition_point(|c| c.lba == lba);
    &all[from..from + len]
}

/// What is known of one block.
struct Evidence<'a> {
    kind: PiType,
    stored: [u8; TUPLE_LEN],
    claims: &'a [Claim],
    /// It was to become zeros, and is.
    zeroed: bool,
    /// Of its data; `None` if they cannot be read.
    guard: Option<u16>,
}

#[derive(Debug, PartialEq, Eq)]
enum Found {
    Whole,
    Torn,
    Unknown,
}

impl Evidence<'_> {
    fn judge(&self) -> ([u8; TUPLE_LEN], Found) {
        let is_escape = |t: [u8; TUPLE_LEN]| Tuple::from_bytes(t).is_escape(self.kind);
        let newest = self.claims.iter().rev().map(|c| c.tuple).find(|t| !is_escape(*t));
        let suspect = newest.unwrap_or(self.stored);
        let Some(guard) = self.guard else { return (suspect, Found::Unknown) };
        if !is_escape(self.stored) && Tuple::from_bytes(self.stored).guard == guard {
            return (self.stored, Found::Whole);
        }
        if let Some(claim) = self.claims.iter().rev().find(|c| c.guard == guard) {
            return (claim.tuple, Found::Whole);
        }
        if self.zeroed {
            return (Tuple::ESCAPE.to_bytes(), Found::Whole);
        }
        // Only zeroed, in part or not at all, and without protection before it.
        if is_escape(suspect) {
            return (self.stored, Found::Whole);
        }
        (suspect, Found::Torn)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: [u8; 8] = [0, 1, 0, 0, 0, 0, 0, 9];
    const NEW: [u8; 8] = [0, 2, 0, 0, 0, 0, 0, 9];
    const NONE: [u8; 8] = [0xff; 8];

    fn claim(order: u64, tuple: [u8; 8], guard: u16) -> Claim {
        Claim { lba: 9, order, tuple, guard }
    }

    fn judged(stored: [u8; 8], claims: &[Claim], guard: u16, zeroed: bool) -> ([u8; 8], Found) {
        Evidence { kind: PiType::Type1, stored, claims, zeroed, guard: Some(guard) }.judge()
    }

    #[test]
    fn a_whole_block_gets_the_tuple_of_its_data_whichever_has_reached_the_sidecar() {
        let written = [claim(0, OLD, 1), claim(1, NEW, 2)];
        for stored in [OLD, NEW] {
            assert_eq!(judged(stored, &written, 1, false), (OLD, Found::Whole));
            assert_eq!(judged(stored, &written, 2, false), (NEW, Found::Whole));
        }
        let first = [claim(0, NONE, 77), claim(1, NEW, 2)];
        for stored in [NONE, NEW] {
            assert_eq!(
                judged(stored, &first, 77, false),
                (NONE, Found::Whole),
                "never protected, never written"
            );
            assert_eq!(judged(stored, &first, 2, false), (NEW, Found::Whole));
        }
    }

    #[test]
    fn a_torn_block_keeps_a_tuple_that_does_not_match_even_where_there_was_none() {
        let written = [claim(0, OLD, 1), claim(1, NEW, 2)];
        assert_eq!(judged(OLD, &written, 3, false), (NEW, Found::Torn));
        let first = [claim(0, NONE, 77), claim(1, NEW, 2)];
        assert_eq!(judged(NONE, &first, 3, false), (NEW, Found::Torn));
        let then_escaped = [claim(0, OLD, 1), claim(1, NEW, 2), claim(2, NEW, 2), claim(3, NONE, 5)];
        assert_eq!(judged(NONE, &then_escaped, 3, false), (NEW, Found::Torn));
    }

    #[test]
    fn zeros_that_were_asked_for_are_no_damage_and_half_of_them_are() {
        assert_eq!(judged(OLD, &[], 0, true), (NONE, Found::Whole));
        assert_eq!(judged(OLD, &[], 1, false), (OLD, Found::Whole));
        assert_eq!(judged(OLD, &[], 3, false), (OLD, Found::Torn));
        assert_eq!(judged(NONE, &[], 3, false), (NONE, Found::Whole), "without protection before and after");
    }

    #[test]
    fn what_cannot_be_read_has_its_newest_tuple() {
        let claims = [claim(0, OLD, 1), claim(1, NEW, 2)];
        let evidence =
            Evidence { kind: PiType::Type1, stored: OLD, claims: &claims, zeroed: false, guard: None };
        assert_eq!(evidence.judge(), (NEW, Found::Unknown));
    }
}
