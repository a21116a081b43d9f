//! READ, WRITE, WRITE ATOMIC, PRE-FETCH, SYNCHRONIZE CACHE (SBC-4 5.13 to 5.16, 5.32, 5.41, 5.44 and their 6-, 12- and 16-byte kin).

use super::{Command, Failure, Outcome, Target, protect::Asked};
use crate::{
    scsi::{
        cdb::{Cdb, Range},
        sense::Sense,
    },
    sys::{exec::boxed, mem::Buffer},
    units::{Blocks, ByteOffset, Lba},
    volume::{Volume, WriteFlags},
};

/// Bytes of the bounce buffer for what is read without being given back.
pub(super) const CHUNK: u64 = 1 << 20;
/// Bytes that PRE-FETCH reads ahead at most.
const PREFETCH: u64 = 8 << 20;

impl<V: Volume> Target<V> {
    pub(super) async fn read(&self, cdb: Cdb<'_>, command: &Command<'_>) -> Outcome {
        let range = cdb.range();
        let asked = self.asked(cdb, range.lba)?;
        let fua = cdb.bytes().len() > 6 && cdb.flag(3);
        let (at, len) = self.transfer(range)?;
        if asked.kind.is_some() || fua || len == 0 || len != command.data.len() as u64 {
            return boxed(|| self.read_any(range, (at, len), fua, command, asked)).await;
        }
        let _pass = self.gate.pass(range.lba.0, range.blocks.0).await;
        self.volume.read(at, command.data).await.map_err(|e| self.failure(e))?;
        Ok(len as usize)
    }

    /// [`Target::read`] with protection information, with FUA, or into a buffer of another length.
    async fn read_any(
        &self,
        range: Range,
        (at, len): (ByteOffset, u64),
        fua: bool,
        command: &Command<'_>,
        asked: Asked,
    ) -> Outcome {
        // A buffer that is too short gets what fits: the rest is the initiator's residual.
        let give = len.min(command.data.len() as u64);
        if give == 0 && (len == 0 || !asked.travels()) {
            return Ok(0);
        }
        let travelling = match asked.travels() {
            true => Some(self.parts(command, &asked, range.blocks.0, range.length_at)?),
            false => None,
        };
        let _pass = self.gate.pass(range.lba.0, range.blocks.0).await;
        if fua {
            // What is read is what the medium has: so the medium gets it first.
            self.volume.flush().await.map_err(|e| self.failure(e))?;
        }
        let checks = asked.field.on_medium(self.dpicz());
        if let Some(parts) = travelling {
            let tuples = self.fetch(at, &parts.data, &asked, checks, 0).await?;
            parts.give(&tuples);
            // Interleaved, the buffer is as long as blocks and tuples; separate, the data are at its start.
            let interleaved = command.dif.is_empty();
            return Ok(if interleaved { command.data.len() } else { parts.data.len() });
        }
        let whole = give & !(self.block_size.bytes() - 1);
        if whole > 0 {
            let to = command.data.slice(0, whole as usize);
            self.fetch(at, &to, &asked, checks, 0).await?;
        }
        if whole < give {
            let last = Buffer::zeroed(self.block_size.bytes() as usize).sg();
            let ahead = whole / self.block_size.bytes();
            self.fetch(ByteOffset(at.0 + whole), &last, &asked, checks, ahead).await?;
            command.data.copy_from(whole as usize, &last.slice(0, (give - whole) as usize));
        }
        Ok(give as usize)
    }

    pub(super) async fn write(&self, cdb: Cdb<'_>, command: &Command<'_>) -> Outcome {
        let range = cdb.range();
        let asked = self.asked_to_write(cdb, range.lba)?;
        let fua = cdb.bytes().len() > 6 && cdb.flag(3);
        let (at, len) = self.transfer(range)?;
        if len == 0 {
            return Ok(0);
        }
        if asked.kind.is_some() || len != command.data.len() as u64 {
            return boxed(|| self.write_any(range, at, fua, command, asked)).await;
        }
        let _pass = self.gate.pass(range.lba.0, range.blocks.0).await;
        let flags = self.write_flags(fua);
        self.volume.write(at, command.data, flags).await.map_err(|e| self.failure(e))?;
        Ok(0)
    }

    /// [`Target::write`] with protection information, or from a buffer of another length.
    async fn write_any(
        &self,
        range: Range,
        at: ByteOffset,
        fua: bool,
        command: &Command<'_>,
        asked: Asked,
    ) -> Outcome {
        let sent = self.sent(command, &asked, range.lba, range.blocks.0, range.length_at)?;
        let _pass = self.gate.pass(range.lba.0, range.blocks.0).await;
        self.store(at, &sent.data, sent.tuples, self.write_flags(fua), &asked, 0).await?;
        Ok(0)
    }

    /// As many blocks as VPD page B0 says: all of them are written or nothing, whoever reads meanwhile and whenever power
    /// fails (SBC-4 4.29, 5.44). Nobody else is at the blocks, nor at the rest of their pages; the volume does what is left.
    pub(super) async fn write_atomic(&self, cdb: Cdb<'_>, command: &Command<'_>) -> Outcome {
        let range = Range { lba: Lba(cdb.u64(2)), blocks: Blocks(u64::from(cdb.u16(12))), length_at: 12 };
        let asked = self.asked_to_write(cdb, range.lba)?;
        let (at, len) = self.place(range.lba, range.blocks.0)?;
        let geometry = self.geometry.get();
        let (most, granule) = (u64::from(geometry.atomic), u64::from(geometry.atomic_granule));
        if cdb.u16(10) != 0 {
            return Err(Sense::invalid_field(10, 7).into()); // ATOMIC BOUNDARY: none is supported
        }
        if len == 0 {
            return Ok(0);
        }
        if range.blocks.0 > most || !range.blocks.0.is_multiple_of(granule) {
            return Err(Sense::invalid_field(range.length_at, 7).into());
        }
        if !range.lba.0.is_multiple_of(granule) {
            return Err(Sense::invalid_field(2, 7).into());
        }
        // A job may have put another image in place of the one that initiators have been told of.
        if !self.volume.limits().keeps_whole(at, len) {
            return Err(Sense::invalid_field(range.length_at, 7).into());
        }
        let sent = self.sent(command, &asked, range.lba, range.blocks.0, range.length_at)?;
        let page = 1 << geometry.physical_exponent();
        let (first, end) = (range.lba.0 / page * page, (range.lba.0 + range.blocks.0).next_multiple_of(page));
        let _guard = self.gate.hold(first, end - first).await;
        let flags = WriteFlags { atomic: true, ..self.write_flags(cdb.flag(3)) };
        self.store(at, &sent.data, sent.tuples, flags, &asked, 0).await?;
        Ok(0)
    }

    /// Without a write cache every write is to stable storage.
    pub(super) fn write_flags(&self, fua: bool) -> WriteFlags {
        WriteFlags { fua: fua || !self.write_cache(), ..WriteFlags::default() }
    }

    /// Ends a command that changed the medium by discarding or zeroing: without a write cache it has to be durable.
    pub(super) async fn settle(&self) -> Result<(), Failure> {
        if self.write_cache() {
            return Ok(());
        }
        self.volume.flush().await.map_err(|e| self.failure(e))
    }

    /// Reads ahead, so that the host's cache has the blocks, up to a bound. Ends with GOOD and never with CONDITION MET: that
    /// all of it is and stays in a cache is not ours to say.
    pub(super) async fn pre_fetch(&self, cdb: Cdb<'_>) -> Outcome {
        let range = cdb.range();
        let (at, mut len) = self.place(range.lba, range.blocks.0)?;
        if range.blocks.0 == 0 {
            // To the end of the medium.
            len = self.geometry.get().blocks * self.block_size.bytes() - at.0;
        }
        let immediate = cdb.bit(1, 1);
        if !immediate {
            let _pass = self.gate.pass(range.lba.0, len.div_ceil(self.block_size.bytes())).await;
            self.scan(at, len.min(PREFETCH)).await?;
        }
        Ok(0)
    }

    /// Reads a range and throws the data away: the volume finds what cannot be read.
    pub(super) async fn scan(&self, at: ByteOffset, len: u64) -> Result<(), Failure> {
        let buffer = Buffer::zeroed(len.min(CHUNK) as usize).sg();
        let mut done = 0;
        while done < len {
            let n = (len - done).min(CHUNK);
            let to = buffer.slice(0, n as usize);
            self.volume.read(ByteOffset(at.0 + done), &to).await.map_err(|e| self.failure(e))?;
            done += n;
        }
        Ok(())
    }

    /// With IMMED too the status comes after the flush: nothing is gained by an error that nobody hears of.
    pub(super) async fn synchronize_cache(&self, cdb: Cdb<'_>) -> Outcome {
        let range = cdb.range();
        self.place(range.lba, range.blocks.0)?;
        self.volume.flush().await.map_err(|e| self.failure(e))?;
        Ok(0)
    }
}
