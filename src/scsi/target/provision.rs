//! Thin provisioning and pattern writes: UNMAP, WRITE SAME, GET LBA STATUS (SBC-4 4.7, 5.5, 5.35, 5.50).

use super::{
    Command, Failure, Outcome, Target,
    protect::{Asked, Sent, first_tuple},
    rw::CHUNK,
};
use crate::{
    scsi::{
        cdb::Cdb,
        sense::Sense,
        vpd::{MAX_UNMAP_BLOCKS, MAX_UNMAP_DESCRIPTORS},
    },
    sys::mem::Buffer,
    units::{ByteOffset, Lba},
    volume::{ExtentKind, Volume, WriteFlags},
};

/// Calls of `map_extents` that one GET LBA STATUS makes at most, and descriptors that it gives at most: a fragmented image
/// shall not keep the thread busy for one command.
const MAX_MAP_CALLS: usize = 256;
const MAX_STATUS_DESCRIPTORS: u64 = 1024;

/// PROVISIONING STATUS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Provisioning {
    Mapped = 0,
    Deallocated = 1,
}

impl<V: Volume> Target<V> {
    pub(super) async fn unmap(&self, cdb: Cdb<'_>, command: &Command<'_>) -> Outcome {
        if cdb.bit(1, 0) {
            return Err(Sense::invalid_field(1, 0).into()); // ANCHOR, with ANC_SUP = 0
        }
        let len = usize::from(cdb.u16(7));
        if len == 0 {
            return Ok(0);
        }
        let list = self.parameters(command, len)?;
        if len < 8 {
            return Err(Sense::parameter_list_length().into());
        }
        // What the list says of its own length counts as far as there is a list; an incomplete descriptor does not count.
        let said = usize::from(u16::from_be_bytes([list[2], list[3]]));
        let descriptors = &list[8..8 + said.min(len - 8)];
        let mut ranges = Vec::new();
        let mut total = 0u64;
        for (i, d) in descriptors.chunks_exact(16).enumerate() {
            let wrong = Sense::invalid_parameter((8 + 16 * i) as u16);
            if i >= MAX_UNMAP_DESCRIPTORS as usize {
                return Err(wrong.into());
            }
            let lba = Lba(be64(&d[..8]));
            let blocks = be64(&d[4..12]) & 0xffff_ffff;
            total += blocks;
            if total > u64::from(MAX_UNMAP_BLOCKS) {
                return Err(wrong.into());
            }
            let (at, bytes) = self.place(lba, blocks)?;
            if bytes > 0 {
                ranges.push((lba, blocks, at, bytes));
            }
        }
        for (lba, blocks, at, bytes) in ranges {
            let _pass = self.gate.pass(lba.0, blocks).await;
            self.volume.discard(at, bytes).await.map_err(|e| self.failure(e))?;
        }
        self.settle().await?;
        Ok(0)
    }

    pub(super) async fn write_same(&self, cdb: Cdb<'_>, command: &Command<'_>) -> Outcome {
        let range = cdb.range();
        let asked = self.asked_to_write(cdb, range.lba)?;
        let byte = cdb.flags_at();
        let flags = cdb.u8(usize::from(byte));
        let (unmap, no_data) = (flags & 0x08 != 0, flags & 0x01 != 0);
        if flags & 0x10 != 0 {
            return Err(Sense::invalid_field(byte, 4).into()); // ANCHOR, with ANC_SUP = 0
        }
        if flags & 0x06 != 0 {
            return Err(Sense::invalid_field(byte, 2).into()); // PBDATA and LBDATA of SBC-2
        }
        if no_data && (cdb.bytes().len() < 16 || asked.travels()) {
            return Err(Sense::invalid_field(byte, 0).into()); // NDOB: not in the 10-byte form, nor with tuples to send
        }
        let geometry = self.geometry.get();
        if unmap && !geometry.thin {
            return Err(Sense::invalid_field(byte, 3).into());
        }
        self.place(range.lba, range.blocks.0)?;
        let blocks = match range.blocks.0 {
            0 => geometry.blocks - range.lba.0, // WSNZ = 0: to the end
            n => n,
        };
        if blocks > geometry.max_write_same() {
            return Err(Sense::invalid_field(range.length_at, 7).into());
        }
        let sent = if no_data {
            None
        } else {
            // One block; more or less is not what the command says, and would be guessed at.
            let interleaved = asked.travels() && command.dif.is_empty();
            if !interleaved && command.data.len() as u64 != self.block_size.bytes() {
                return Err(Sense::invalid_field(range.length_at, 7).into());
            }
            Some(self.sent(command, &asked, range.lba, 1, range.length_at)?)
        };
        let (at, len) = self.place(range.lba, blocks)?;
        if len == 0 {
            return Ok(0);
        }
        // Unmapped blocks read as zeros, without protection information: what is anything else has to be written (SBC-4
        // 5.50.1). Where nobody sees tuples, zeros need none either.
        let written = sent.filter(|sent| {
            let escape = sent.tuples.as_deref().is_none_or(|t| t.iter().all(|b| *b == 0xff));
            let has_tuples = asked.kind.is_some() && !unmap;
            !sent.data.is_zero() || !escape || has_tuples
        });
        let _pass = self.gate.pass(range.lba.0, blocks).await;
        match written {
            Some(sent) => self.write_copies(at, len, sent, &asked).await?,
            None if unmap => self.volume.discard(at, len).await.map_err(|e| self.failure(e))?,
            None => self.volume.write_zeroes(at, len, false).await.map_err(|e| self.failure(e))?,
        }
        self.settle().await?;
        Ok(0)
    }

    /// Writes one block that was sent, with its tuple if it has one, over a range, from a buffer of bounded size.
    async fn write_copies(&self, at: ByteOffset, len: u64, sent: Sent, asked: &Asked) -> Result<(), Failure> {
        let (one, block) = (sent.data, self.block_size.bytes());
        let buffer = Buffer::zeroed(len.min(CHUNK) as usize).sg();
        for i in 0..buffer.len() / one.len() {
            buffer.copy_from(i * one.len(), &one);
        }
        let mut done = 0;
        while done < len {
            let n = (len - done).min(CHUNK);
            let (ahead, from) = (done / block, buffer.slice(0, n as usize));
            let tuples = match (asked.kind, &sent.tuples) {
                (Some(kind), Some(t)) => Some(Self::repeat_tuple(kind, first_tuple(t), ahead, n / block)),
                _ => None,
            };
            let to = ByteOffset(at.0 + done);
            self.store(to, &from, tuples, WriteFlags::default(), asked, ahead).await?;
            done += n;
        }
        Ok(())
    }

    pub(super) async fn get_lba_status(&self, cdb: Cdb<'_>, command: &Command<'_>) -> Outcome {
        let start = Lba(cdb.u64(2));
        let allocation = u64::from(cdb.u32(10));
        let end = self.geometry.get().blocks;
        if start.0 >= end {
            return Err(Sense::out_of_range(start).into());
        }
        let room = allocation.min(command.data.len() as u64).saturating_sub(8) / 16;
        let runs = self.status_runs(start.0, end, room.clamp(1, MAX_STATUS_DESCRIPTORS) as usize).await?;
        let mut out = vec![0; 8];
        for (lba, blocks, status) in runs {
            out.extend(lba.to_be_bytes());
            out.extend(blocks.to_be_bytes());
            out.extend([status as u8, 0, 0, 0]);
        }
        let len = (out.len() - 4) as u32;
        out[..4].copy_from_slice(&len.to_be_bytes());
        self.reply(command, &out, allocation)
    }

    /// The first `max` runs of equal provisioning from `start` on, neighbours joined. A block counts as deallocated if all of it
    /// is a hole; what the volume keeps space for is mapped, since there are no anchored blocks (ANC_SUP = 0).
    async fn status_runs(
        &self,
        start: u64,
        end: u64,
        max: usize,
    ) -> Result<Vec<(u64, u32, Provisioning)>, Failure> {
        let block = self.block_size.bytes();
        let (mut at, end_byte) = (start * block, end * block);
        let mut runs = Runs { runs: Vec::new(), next: start };
        // Holes are joined before they are cut to whole blocks: two parts of one block may lie in two extents.
        let mut hole_from = None;
        for _ in 0..MAX_MAP_CALLS {
            let extents =
                self.volume.map_extents(ByteOffset(at), end_byte - at).await.map_err(|e| self.failure(e))?;
            let mut known_to = at;
            for extent in extents {
                known_to = (extent.start.0 + extent.len).clamp(known_to, end_byte);
                match extent.kind {
                    ExtentKind::Hole | ExtentKind::Unallocated => {
                        hole_from.get_or_insert(extent.start.0.max(at));
                    }
                    ExtentKind::Data | ExtentKind::Zero => {
                        if let Some(from) = hole_from.take() {
                            runs.hole(from.div_ceil(block), extent.start.0 / block);
                        }
                        runs.to(known_to.div_ceil(block), Provisioning::Mapped);
                    }
                }
            }
            let stuck = known_to == at;
            at = known_to;
            if at >= end_byte || stuck || runs.runs.len() > max {
                break;
            }
        }
        if let Some(from) = hole_from {
            runs.hole(from.div_ceil(block), at / block);
        }
        if runs.runs.is_empty() {
            // The volume knows nothing: then there is something.
            runs.to(end, Provisioning::Mapped);
        }
        let mut out = Vec::new();
        for (from, to, status) in runs.runs {
            let mut from = from;
            while from < to {
                // A longer run is cut where the next one starts at a round number.
                let n = (to - from).min(0xffff_f000);
                out.push((from, n as u32, status));
                from += n;
            }
        }
        out.truncate(max);
        Ok(out)
    }
}

/// Runs of blocks without gaps.
struct Runs {
    runs: Vec<(u64, u64, Provisioning)>,
    next: u64,
}

impl Runs {
    /// Everything that is not yet covered up to `end` has that status.
    fn to(&mut self, end: u64, status: Provisioning) {
        if end <= self.next {
            return;
        }
        match self.runs.last_mut() {
            Some(last) if last.2 == status => last.1 = end,
            _ => self.runs.push((self.next, end, status)),
        }
        self.next = end;
    }

    /// Deallocated from `from` to `to`, mapped before.
    fn hole(&mut self, from: u64, to: u64) {
        if to > from {
            self.to(from, Provisioning::Mapped);
            self.to(to, Provisioning::Deallocated);
        }
    }
}

fn be64(bytes: &[u8]) -> u64 {
    bytes.iter().take(8).fold(0, |n, b| n << 8 | u64::from(*b))
}
