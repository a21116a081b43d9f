//! Commands that compare or combine what is on the medium with what is sent: VERIFY, WRITE AND VERIFY, COMPARE AND WRITE,
//! ORWRITE (SBC-4 5.3, 5.9, 5.36, 5.46 and kin).

use super::{
    Command, Failure, Once, Outcome, Target,
    protect::{Asked, Sent, compare_tuples, first_tuple},
    rw::CHUNK,
};
use crate::{
    pi::tuple::TUPLE_LEN,
    scsi::{
        cdb::Cdb,
        sense::{self, Asc, Sense, SenseKey},
        vpd::MAX_COMPARE_AND_WRITE,
    },
    sys::mem::{Buffer, Sg},
    units::{ByteOffset, Lba},
    volume::{PiMismatch, Volume},
};

/// BYTCHK of VERIFY and WRITE AND VERIFY.
fn byte_check(cdb: Cdb<'_>) -> u8 {
    cdb.u8(usize::from(cdb.flags_at())) >> 1 & 3
}

/// MISCOMPARE DURING VERIFY OPERATION. INFORMATION is the byte that differs for COMPARE AND WRITE (SBC-4 5.3), and the
/// block that differs for the others (SPC-4 4.5.4).
fn miscompare(information: u64) -> Failure {
    Sense::new(SenseKey::Miscompare, Asc::MISCOMPARE_DURING_VERIFY).info(information).into()
}

/// Tuples that differ: MISCOMPARE too, with the code of the tag (SBC-4 5.36).
fn tuples_miscompare(m: PiMismatch) -> Failure {
    Sense::new(SenseKey::Miscompare, sense::check_failed(m.tag)).info(m.lba.0).into()
}

impl<V: Volume> Target<V> {
    pub(super) async fn verify(&self, cdb: Cdb<'_>, command: &Command<'_>) -> Outcome {
        let range = cdb.range();
        let asked = self.asked(cdb, range.lba)?;
        let (at, len) = self.place(range.lba, range.blocks.0)?;
        // BYTCHK = 01b sends every block, 11b one block to compare all of them with; with 00b there is nothing to send.
        let (one, every) = (1, range.blocks.0);
        let sent = match byte_check(cdb) {
            0 => None,
            1 | 3 if len == 0 => None,
            1 => {
                self.transfer(range)?;
                Some(self.sent(command, &asked, range.lba, every, range.length_at)?)
            }
            3 => Some(self.sent(command, &asked, range.lba, one, range.length_at)?),
            _ => return Err(Sense::invalid_field(cdb.flags_at(), 2).into()),
        };
        if len == 0 {
            return Ok(0);
        }
        let _pass = self.gate.pass(range.lba.0, range.blocks.0).await;
        match sent {
            None => self.look_at(at, len, &asked).await?,
            Some(sent) => self.compare(range.lba, at, len, &sent, &asked).await?,
        }
        Ok(0)
    }

    /// Reads a range as the protection field asks for, and throws the data away.
    async fn look_at(&self, at: ByteOffset, len: u64, asked: &Asked) -> Result<(), Failure> {
        let buffer = Buffer::zeroed(len.min(CHUNK) as usize).sg();
        let checks = asked.field.on_medium(self.dpicz());
        let mut done = 0;
        while done < len {
            let n = (len - done).min(CHUNK);
            let ahead = done / self.block_size.bytes();
            self.fetch(ByteOffset(at.0 + done), &buffer.slice(0, n as usize), asked, checks, ahead).await?;
            done += n;
        }
        Ok(())
    }

    /// Compares the medium with what was sent, which is repeated if it is one block alone.
    async fn compare(
        &self,
        lba: Lba,
        at: ByteOffset,
        len: u64,
        sent: &Sent,
        asked: &Asked,
    ) -> Result<(), Failure> {
        let block = self.block_size.bytes();
        let period = sent.data.len() as u64;
        let buffer = Buffer::zeroed(len.min(CHUNK) as usize).sg();
        let checks = asked.field.on_medium_compared(self.dpicz());
        let mut done = 0;
        while done < len {
            let n = (len - done).min(CHUNK);
            let got = buffer.slice(0, n as usize);
            let ahead = done / block;
            let tuples = self.fetch(ByteOffset(at.0 + done), &got, asked, checks, ahead).await?;
            // Chunks and periods are whole blocks.
            let mut compared = 0;
            while compared < n {
                let from = (done + compared) % period;
                let m = (period - from).min(n - compared);
                let theirs = sent.data.slice(from as usize, m as usize);
                if let Some(i) = got.slice(compared as usize, m as usize).mismatch(&theirs) {
                    return Err(miscompare(lba.0 + (done + compared + i as u64) / block));
                }
                compared += m;
            }
            if let (Some(kind), Some(theirs)) = (asked.kind, &sent.tuples) {
                let (first, blocks) = (ahead as usize * TUPLE_LEN, n / block);
                let repeated;
                let theirs = match theirs.get(first..first + tuples.len()) {
                    Some(part) if period > block => part,
                    _ => {
                        let one = first_tuple(theirs);
                        repeated = Self::repeat_tuple(kind, one, ahead, blocks);
                        &repeated[..]
                    }
                };
                let which = asked.field.compared(kind, self.ato());
                if let Some(m) = compare_tuples(&tuples, theirs, Lba(lba.0 + ahead), which) {
                    return Err(tuples_miscompare(m));
                }
            }
            done += n;
        }
        Ok(())
    }

    /// Writes to the medium, past any cache, and reads back: with BYTCHK = 01b compared with what was sent.
    pub(super) async fn write_and_verify(&self, cdb: Cdb<'_>, command: &Command<'_>) -> Outcome {
        let range = cdb.range();
        let asked = self.asked_to_write(cdb, range.lba)?;
        let check = match byte_check(cdb) {
            0 => false,
            1 => true,
            _ => return Err(Sense::invalid_field(cdb.flags_at(), 2).into()),
        };
        let (at, len) = self.transfer(range)?;
        if len == 0 {
            return Ok(0);
        }
        let sent = self.sent(command, &asked, range.lba, range.blocks.0, range.length_at)?;
        // Held, so that what is compared is not another command's write.
        let _guard = self.gate.hold(range.lba.0, range.blocks.0).await;
        let tuples = sent.tuples.clone();
        self.store(at, &sent.data, tuples, self.write_flags(true), &asked, 0).await?;
        if check {
            self.compare(range.lba, at, len, &sent, &asked).await?;
        } else {
            self.look_at(at, len, &asked).await?;
        }
        Ok(0)
    }

    /// The buffer holds what to compare with, then what to write; with WRPROTECT other than 0 both with their tuples, and
    /// both are checked. Data are compared, and tuples are not.
    pub(super) async fn compare_and_write(&self, cdb: Cdb<'_>, command: &Command<'_>) -> Outcome {
        let (lba, blocks) = (Lba(cdb.u64(2)), u64::from(cdb.u8(13)));
        let asked = self.asked_to_write(cdb, lba)?;
        let (at, len) = self.place(lba, blocks)?;
        if blocks > u64::from(MAX_COMPARE_AND_WRITE) {
            return Err(Sense::invalid_field(13, 7).into());
        }
        if blocks == 0 {
            return Ok(0);
        }
        let both = self.parts(command, &asked, 2 * blocks, 13)?;
        // A buffer of another size holds its two halves who knows where: it is refused, be it too long or too short.
        let interleaved = asked.travels() && command.dif.is_empty();
        if !interleaved && command.data.len() as u64 != 2 * len {
            return Err(Sense::invalid_field(13, 7).into());
        }
        let expected = self.verify_sent(&asked, lba, both.part(self.block_size, 0, blocks))?.data;
        let new = self.verify_sent(&asked, lba, both.part(self.block_size, blocks, blocks))?;
        let _guard = self.gate.hold(lba.0, blocks).await;
        // Once it has begun to write, the blocks hold what it wrote, or a part of it: compared again they would differ.
        let once = command.once.as_deref();
        if !once.is_some_and(Once::is_marked) {
            let got = Buffer::zeroed(len as usize).sg();
            self.fetch(at, &got, &asked, asked.field.on_medium(self.dpicz()), 0).await?;
            if let Some(byte) = got.mismatch(&expected) {
                return Err(miscompare(byte as u64));
            }
            if let Some(once) = once {
                once.mark();
            }
        }
        self.store(at, &new.data, new.tuples, self.write_flags(cdb.flag(3)), &asked, 0).await?;
        Ok(0)
    }

    /// With ORPROTECT other than 0 the tags that were sent are kept, and the guard is that of the result.
    pub(super) async fn or_write(&self, cdb: Cdb<'_>, command: &Command<'_>) -> Outcome {
        let range = cdb.range();
        let asked = self.asked_to_write(cdb, range.lba)?;
        let (at, len) = self.transfer(range)?;
        if len == 0 {
            return Ok(0);
        }
        let sent = self.sent(command, &asked, range.lba, range.blocks.0, range.length_at)?;
        let _guard = self.gate.hold(range.lba.0, range.blocks.0).await;
        let both = Buffer::zeroed(len as usize).sg();
        self.fetch(at, &both, &asked, asked.field.on_medium(self.dpicz()), 0).await?;
        or_into(&both, &sent.data);
        let tuples = match (asked.kind, sent.tuples) {
            (Some(kind), Some(mut tuples)) => {
                self.checker(kind).guards(&both, |i, guard| {
                    tuples[i * TUPLE_LEN..][..2].copy_from_slice(&guard.to_be_bytes());
                });
                Some(tuples)
            }
            _ => None,
        };
        self.store(at, &both, tuples, self.write_flags(cdb.flag(3)), &asked, 0).await?;
        Ok(0)
    }
}

/// Sets the bits of `from` in `into`, which is as long. Not inside the future: that would carry the chunk about.
fn or_into(into: &Sg, from: &Sg) {
    let mut chunk = [0u8; 4096];
    let mut done = 0;
    from.for_each(0, from.len(), |bytes| {
        for bytes in bytes.chunks(chunk.len()) {
            let old = &mut chunk[..bytes.len()];
            into.copy_out(done, old);
            old.iter_mut().zip(bytes).for_each(|(o, b)| *o |= b);
            into.copy_in(done, old);
            done += bytes.len();
        }
    });
}
