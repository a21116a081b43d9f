//! Commands that compare or combine what is on the medium with what is sent: VERIFY, WRITE AND VERIFY, COMPARE AND WRITE,
//! ORWRITE (SBC-4 5.3, 5.9, 5.36, 5.46 and kin).

use super::{Command, Failure, Outcome, Target, rw::CHUNK};
use crate::{
    scsi::{
        cdb::Cdb,
        sense::{Asc, Sense, SenseKey},
        vpd::MAX_COMPARE_AND_WRITE,
    },
    sys::mem::{Buffer, Sg},
    units::{ByteOffset, Lba},
    volume::Volume,
};

/// BYTCHK of VERIFY and WRITE AND VERIFY.
fn byte_check(cdb: Cdb<'_>) -> u8 {
    cdb.u8(1) >> 1 & 3
}

/// MISCOMPARE DURING VERIFY OPERATION. INFORMATION is the byte that differs for COMPARE AND WRITE (SBC-4 5.3), and the
/// block that differs for the others (SPC-4 4.5.4).
fn miscompare(information: u64) -> Failure {
    Sense::new(SenseKey::Miscompare, Asc::MISCOMPARE_DURING_VERIFY).info(information).into()
}

impl<V: Volume> Target<V> {
    pub(super) async fn verify(&self, cdb: Cdb<'_>, command: &Command) -> Outcome {
        self.no_protection(cdb)?;
        let range = cdb.range();
        let (at, len) = self.place(range.lba, range.blocks.0)?;
        let block = self.block_size.bytes();
        // BYTCHK = 01b sends every block, 11b one block to compare all of them with; with 00b there is nothing to send.
        let sent = match byte_check(cdb) {
            0 => None,
            1 => {
                self.transfer(range)?;
                Some(self.data_out(command, len, range.length_at)?)
            }
            3 if len == 0 => None,
            3 => Some(self.data_out(command, block, range.length_at)?),
            _ => return Err(Sense::invalid_field(1, 2).into()),
        };
        if len == 0 {
            return Ok(0);
        }
        let _pass = self.gate.pass(range.lba.0, range.blocks.0).await;
        match sent {
            None => self.scan(at, len).await?,
            Some(sent) => self.compare(range.lba, at, len, &sent).await?,
        }
        Ok(0)
    }

    /// Compares the medium with `sent`, which is repeated if it is shorter.
    async fn compare(&self, lba: Lba, at: ByteOffset, len: u64, sent: &Sg) -> Result<(), Failure> {
        let block = self.block_size.bytes();
        let period = sent.len() as u64;
        let buffer = Buffer::zeroed(len.min(CHUNK) as usize).sg();
        let mut done = 0;
        while done < len {
            let n = (len - done).min(CHUNK);
            let got = buffer.slice(0, n as usize);
            self.volume.read(ByteOffset(at.0 + done), &got).await.map_err(|e| self.failure(e))?;
            // Chunks and periods are whole blocks.
            let mut compared = 0;
            while compared < n {
                let from = (done + compared) % period;
                let m = (period - from).min(n - compared);
                let theirs = sent.slice(from as usize, m as usize);
                if let Some(i) = got.slice(compared as usize, m as usize).mismatch(&theirs) {
                    return Err(miscompare(lba.0 + (done + compared + i as u64) / block));
                }
                compared += m;
            }
            done += n;
        }
        Ok(())
    }

    /// Writes to the medium, past any cache, and reads back: with BYTCHK = 01b compared with what was sent.
    pub(super) async fn write_and_verify(&self, cdb: Cdb<'_>, command: &Command) -> Outcome {
        self.no_protection(cdb)?;
        let range = cdb.range();
        let check = match byte_check(cdb) {
            0 => false,
            1 => true,
            _ => return Err(Sense::invalid_field(1, 2).into()),
        };
        let (at, len) = self.transfer(range)?;
        let data = self.data_out(command, len, range.length_at)?;
        if len == 0 {
            return Ok(0);
        }
        // Held, so that what is compared is not another command's write.
        let _guard = self.gate.hold(range.lba.0, range.blocks.0).await;
        self.volume.write(at, &data, self.write_flags(true)).await.map_err(|e| self.failure(e))?;
        if check {
            self.compare(range.lba, at, len, &data).await?;
        } else {
            self.scan(at, len).await?;
        }
        Ok(0)
    }

    pub(super) async fn compare_and_write(&self, cdb: Cdb<'_>, command: &Command) -> Outcome {
        self.no_protection(cdb)?;
        let (lba, blocks) = (Lba(cdb.u64(2)), u64::from(cdb.u8(13)));
        let (at, len) = self.place(lba, blocks)?;
        if blocks > u64::from(MAX_COMPARE_AND_WRITE) {
            return Err(Sense::invalid_field(13, 7).into());
        }
        if blocks == 0 {
            return Ok(0);
        }
        // A buffer of another size holds its two halves who knows where: it is refused, be it too long or too short.
        if command.data.len() as u64 != 2 * len {
            return Err(Sense::invalid_field(13, 7).into());
        }
        let expected = command.data.slice(0, len as usize);
        let data = command.data.slice(len as usize, len as usize);
        let _guard = self.gate.hold(lba.0, blocks).await;
        let got = Buffer::zeroed(len as usize).sg();
        self.volume.read(at, &got).await.map_err(|e| self.failure(e))?;
        if let Some(byte) = got.mismatch(&expected) {
            return Err(miscompare(byte as u64));
        }
        self.volume.write(at, &data, self.write_flags(cdb.bit(1, 3))).await.map_err(|e| self.failure(e))?;
        Ok(0)
    }

    pub(super) async fn or_write(&self, cdb: Cdb<'_>, command: &Command) -> Outcome {
        self.no_protection(cdb)?;
        let range = cdb.range();
        let (at, len) = self.transfer(range)?;
        let data = self.data_out(command, len, range.length_at)?;
        if len == 0 {
            return Ok(0);
        }
        let _guard = self.gate.hold(range.lba.0, range.blocks.0).await;
        let both = Buffer::zeroed(len as usize).sg();
        self.volume.read(at, &both).await.map_err(|e| self.failure(e))?;
        or_into(&both, &data);
        self.volume.write(at, &both, self.write_flags(cdb.bit(1, 3))).await.map_err(|e| self.failure(e))?;
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
