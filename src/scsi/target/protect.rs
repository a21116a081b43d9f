//! Protection information on its way through a command: what its protection field asks for, where its tuples lie, and
//! that nothing is written before every tuple that was sent has been checked (SBC-4 4.21, 5.13, 5.41 and kin).
//!
//! With PROTECT = 0 (`exposure = target`) a protection field other than 0 is refused, and everything here is a plain
//! read or write.

use tracing::warn;

use super::{Command, Failure, Target};
use crate::{
    pi::{
        Counters, Transfer,
        check::Checker,
        exposure::Exposure,
        tuple::{TUPLE_LEN, Tuple, tuples},
        wire::{Parts, WireError},
    },
    scsi::{
        cdb::Cdb,
        protect::{Checks, Field},
        sense::{Asc, Sense, SenseKey},
    },
    sys::mem::Sg,
    units::{ByteOffset, Lba},
    volume::{
        AppTags, IoError, IoErrorKind, IoOp, PiMismatch, PiTag, PiType, TupleCheck, Volume, WriteFlags,
    },
};

/// What a command asks for, once it is known to be allowed.
#[derive(Debug, Clone)]
pub(super) struct Asked {
    /// The type that the logical unit is formatted with, if any.
    pub kind: Option<PiType>,
    /// The protection field.
    pub field: Field,
    /// What is known of the application tags.
    app: AppTags,
    /// The reference tag of the command's first block, if the type and the command define it.
    reference: Option<u32>,
    /// Byte of the CDB with the protection field.
    field_at: u16,
}

/// What an initiator sent.
pub(super) struct Sent {
    /// The blocks, in the command's own memory.
    pub data: Sg,
    /// Their tuples, checked, if any came.
    pub tuples: Option<Vec<u8>>,
}

impl Asked {
    /// Whether tuples travel with the blocks.
    pub fn travels(&self) -> bool {
        self.kind.is_some() && self.field.travels()
    }

    /// Those checks for the blocks from `ahead` blocks into the command on.
    pub fn told(&self, checks: Checks, ahead: u64) -> TupleCheck {
        TupleCheck {
            guard: checks.guard,
            app: if checks.app { self.app.clone() } else { AppTags::Unknown },
            reference: self.reference.filter(|_| checks.reference).map(|r| r.wrapping_add(ahead as u32)),
        }
    }

    /// Whether tuples made for this command need tags that the volume would not give them by itself.
    fn has_own_tags(&self) -> bool {
        self.app != AppTags::Unknown || self.kind == Some(PiType::Type2) && self.reference.is_some()
    }

    /// Gives tuples made for the blocks from `lba` on, `ahead` blocks into the command, the tags that are expected of them.
    pub(super) fn put_tags(&self, lba: Lba, ahead: u64, made: &mut [u8]) {
        for (i, slot) in made.as_chunks_mut::<TUPLE_LEN>().0.iter_mut().enumerate() {
            let mut tuple = Tuple::from_bytes(*slot);
            if let Some((tag, mask)) = self.app.of(Lba(lba.0 + i as u64)) {
                // FFFFh would turn checking off for a block whose guard is known.
                tuple.app = if tag & mask == 0xffff { 0 } else { tag & mask };
            }
            if let Some(first) = self.reference {
                tuple.reference = first.wrapping_add(ahead as u32).wrapping_add(i as u32);
            }
            *slot = tuple.to_bytes();
        }
    }
}

impl<V: Volume> Target<V> {
    /// The type that initiators see the logical unit formatted with.
    pub(super) fn protection(&self) -> Option<PiType> {
        self.transfer.and_then(|_| self.volume.protection())
    }

    /// What the command has counted, which the volume does not see: tuples that initiators sent.
    pub fn pi_counters(&self) -> Counters {
        self.counters.get()
    }

    pub(super) fn count(&self, change: impl FnOnce(&mut Counters)) {
        let mut counters = self.counters.get();
        change(&mut counters);
        self.counters.set(counters);
    }

    pub(super) fn checker(&self, kind: PiType) -> Checker {
        Checker { guard: self.guard, kind, block_size: self.block_size, tags: Exposure::Initiator }
    }

    /// What the protection field asks for, if it may.
    ///
    /// - Reserved values, and any but 0 on a logical unit without protection information: INVALID FIELD IN CDB.
    /// - With type 2, any but 0 in a CDB of another length than 32: INVALID COMMAND OPERATION CODE (SBC-4 4.21.2.4).
    pub(super) fn asked(&self, cdb: Cdb<'_>, lba: Lba) -> Result<Asked, Failure> {
        let field_at = cdb.flags_at();
        let refused = Err(Sense::invalid_field(field_at, 7).into());
        let Some(field) = Field::new(cdb.protection_field()) else { return refused };
        let kind = self.protection();
        if field.travels() {
            match kind {
                None => return refused,
                Some(PiType::Type2) if !cdb.is_variable() => {
                    return Err(Sense::new(SenseKey::IllegalRequest, Asc::INVALID_OPERATION_CODE).into());
                }
                Some(_) => {}
            }
        }
        let expected = cdb.expected_tags();
        let reference = match kind {
            Some(PiType::Type1) => Some(lba.0 as u32),
            Some(PiType::Type2) => expected.map(|(reference, ..)| reference),
            Some(PiType::Type3) | None => None,
        };
        let app = match (self.settings.get().pi, expected) {
            (None, _) => AppTags::Unknown,
            // Who owns the tags knows them; with ATO = 0 nobody does.
            (Some(pi), _) if !pi.ato || kind.is_none() => AppTags::Unknown,
            (Some(_), Some((.., 0))) => AppTags::Unknown,
            (Some(_), Some((_, tag, mask))) => AppTags::One { tag, mask },
            (Some(pi), None) if pi.atmpe => AppTags::ByRange(self.app_ranges.borrow().clone()),
            (Some(_), None) => AppTags::Unknown,
        };
        Ok(Asked { kind, field, app, reference, field_at })
    }

    /// [`Target::asked`] for a command that writes: with RWWP = 1 it has to bring protection information (
    /// SPC-4 7.5.8: INVALID FIELD IN CDB).
    pub(super) fn asked_to_write(&self, cdb: Cdb<'_>, lba: Lba) -> Result<Asked, Failure> {
        let asked = self.asked(cdb, lba)?;
        let reject = self.settings.get().pi.is_some_and(|pi| pi.rwwp);
        if reject && asked.kind.is_some() && !asked.field.travels() {
            return Err(Sense::invalid_field(asked.field_at, 7).into());
        }
        Ok(asked)
    }

    /// DPICZ: what no tuples travel with is not checked.
    pub(super) fn dpicz(&self) -> bool {
        self.settings.get().pi.is_some_and(|pi| pi.dpicz)
    }

    /// ATO: the application tags are the initiators' own.
    pub(super) fn ato(&self) -> bool {
        self.settings.get().pi.is_some_and(|pi| pi.ato)
    }

    /// The command's buffers for so many blocks. `length_at` is the byte of the CDB with their number.
    pub(super) fn parts(
        &self,
        command: &Command<'_>,
        asked: &Asked,
        blocks: u64,
        length_at: u16,
    ) -> Result<Parts, Failure> {
        let size = self.block_size;
        let parts = match self.transfer {
            _ if !asked.travels() => Parts::plain(command.data, size, blocks),
            _ if !command.dif.is_empty() => Parts::separate(command.data, command.dif, size, blocks),
            Some(Transfer::Interleaved) => Parts::interleaved(command.data, size, blocks),
            // A kernel that passes tuples on by themselves counts the data alone, so a buffer of this very length has them
            // between the blocks: a command that a program built by hand (SG_IO).
            Some(Transfer::Separate)
                if blocks.checked_mul(size.bytes() + TUPLE_LEN as u64) == Some(command.data.len() as u64) =>
            {
                Parts::interleaved(command.data, size, blocks)
            }
            Some(Transfer::Separate) | None => {
                warn!(
                    cdb = ?command.cdb,
                    "a command asks for protection information, and the kernel has passed none on: refused"
                );
                return Err(Sense::invalid_field(asked.field_at, 7).into());
            }
        };
        parts.map_err(|e| self.wrong_length(e, length_at))
    }

    fn wrong_length(&self, e: WireError, length_at: u16) -> Failure {
        warn!("refused: {e}");
        Sense::invalid_field(length_at, 7).into()
    }

    /// What was sent for so many blocks from `lba` on, all of it checked.
    pub(super) fn sent(
        &self,
        command: &Command<'_>,
        asked: &Asked,
        lba: Lba,
        blocks: u64,
        length_at: u16,
    ) -> Result<Sent, Failure> {
        let parts = self.parts(command, asked, blocks, length_at)?;
        self.verify_sent(asked, lba, parts)
    }

    /// Checks what was sent for the blocks from `lba` on, the first of the command.
    pub(super) fn verify_sent(&self, asked: &Asked, lba: Lba, parts: Parts) -> Result<Sent, Failure> {
        let Some(kind) = asked.kind.filter(|_| asked.travels()) else {
            return Ok(Sent { data: parts.data, tuples: None });
        };
        let sent = parts.tuples.to_vec();
        let told = asked.told(asked.field.on_sent(), 0);
        match self.checker(kind).verify_as_told(&parts.data, lba, &sent, &told) {
            Ok(seen) => {
                self.count(|c| c.verified += seen.verified);
                Ok(Sent { data: parts.data, tuples: Some(sent) })
            }
            Err(m) => {
                self.count(|c| match m.tag {
                    PiTag::Guard => c.guard_errors += 1,
                    PiTag::Application => c.app_errors += 1,
                    PiTag::Reference => c.ref_errors += 1,
                });
                let e = IoError::new(IoErrorKind::Protection(m), IoOp::Write);
                Err(self.failure(e.detail("sent so by the initiator; nothing was written")))
            }
        }
    }

    /// Reads blocks, `ahead` blocks into the command, and gives back their tuples if there are any.
    pub(super) async fn fetch(
        &self,
        at: ByteOffset,
        to: &Sg,
        asked: &Asked,
        checks: Checks,
        ahead: u64,
    ) -> Result<Vec<u8>, Failure> {
        let done = match asked.kind {
            None => self.volume.read(at, to).await.map(|()| Vec::new()),
            Some(_) => self.volume.read_with_tuples(at, to, &asked.told(checks, ahead)).await,
        };
        done.map_err(|e| self.failure(e))
    }

    /// Writes blocks, `ahead` blocks into the command, with the tuples that were sent, or with such as the command implies.
    pub(super) async fn store(
        &self,
        at: ByteOffset,
        data: &Sg,
        given: Option<Vec<u8>>,
        flags: WriteFlags,
        asked: &Asked,
        ahead: u64,
    ) -> Result<(), Failure> {
        let tuples = match (asked.kind, given) {
            (None, _) => None,
            (Some(_), Some(given)) => Some(given),
            (Some(kind), None) if asked.has_own_tags() => {
                let lba = self.block_size.lba_of(at);
                let mut made = self.checker(kind).generate(data, lba);
                asked.put_tags(lba, ahead, &mut made);
                self.count(|c| c.generated += (made.len() / TUPLE_LEN) as u64);
                Some(made)
            }
            // Guard and reference tag by the type: what the volume makes itself.
            (Some(_), None) => None,
        };
        let done = match tuples {
            None => self.volume.write(at, data, flags).await,
            Some(tuples) => self.volume.write_with_tuples(at, data, tuples, flags).await,
        };
        done.map_err(|e| self.failure(e))
    }

    /// Tuples for so many copies of one block, as WRITE SAME writes them: types 1 and 2 count the reference tag up from
    /// block to block, type 3 repeats it (SBC-4 5.50.1).
    pub(super) fn repeat_tuple(kind: PiType, one: Tuple, ahead: u64, blocks: u64) -> Vec<u8> {
        let step = u32::from(kind != PiType::Type3);
        (ahead..ahead + blocks)
            .flat_map(|i| {
                let reference = one.reference.wrapping_add(step.wrapping_mul(i as u32));
                Tuple { reference, ..one }.to_bytes()
            })
            .collect()
    }
}

/// The first of a run of tuples.
pub(super) fn first_tuple(bytes: &[u8]) -> Tuple {
    tuples(bytes).next().unwrap_or(Tuple::ESCAPE)
}

/// The first difference between the tuples on the medium and those sent, of blocks from `lba` on.
pub(super) fn compare_tuples(medium: &[u8], sent: &[u8], lba: Lba, checks: Checks) -> Option<PiMismatch> {
    for (i, (found, expected)) in tuples(medium).zip(tuples(sent)).enumerate() {
        let differ = |tag, expected: u32, found: u32| {
            (expected != found).then_some(PiMismatch { lba: Lba(lba.0 + i as u64), tag, expected, found })
        };
        let guard = differ(PiTag::Guard, expected.guard.into(), found.guard.into());
        let app = differ(PiTag::Application, expected.app.into(), found.app.into());
        let reference = differ(PiTag::Reference, expected.reference, found.reference);
        let first = [(checks.guard, guard), (checks.app, app), (checks.reference, reference)];
        if let Some(m) = first.into_iter().find_map(|(looked_at, m)| m.filter(|_| looked_at)) {
            return Some(m);
        }
    }
    None
}
