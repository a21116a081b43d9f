//! What rewrites the whole medium: FORMAT UNIT and SANITIZE (SBC-4 4.11, 5.4, 5.33), at once or in the background.
//!
//! While it runs, and after it failed, [`Medium`] decides which commands are answered. It holds the gate over the whole
//! medium, so that every command that began before has ended, and none comes after.

use std::cell::Cell;

use tracing::{info, warn};

use super::{Command, Failure, Outcome, Target, rw::CHUNK};
use crate::{
    scsi::{
        cdb::Cdb,
        opcodes::{Kind, Op},
        sense::{Asc, Sense, SenseKey},
    },
    sys::mem::{Buffer, Sg},
    units::ByteOffset,
    volume::{PiType, Volume, WriteFlags},
};

/// Bytes that are discarded or zeroed between two looks at the progress.
const STEP: u64 = 1 << 30;

/// The state of the medium as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Medium {
    /// All is well.
    Ready,
    /// FORMAT UNIT is at work; progress in 65 536ths.
    Formatting(u16),
    /// SANITIZE is at work.
    Sanitizing(u16),
    /// FORMAT UNIT failed: only another one, or SANITIZE, helps.
    FormatFailed,
    /// SANITIZE failed. With AUSE it may be left by EXIT FAILURE MODE, else by another SANITIZE alone.
    SanitizeFailed { ause: bool },
}

impl Medium {
    /// Whether a command is answered in this state.
    pub fn admit(self, op: &Op) -> Result<(), Failure> {
        let sanitize = matches!(
            op.kind,
            Kind::SanitizeOverwrite | Kind::SanitizeBlockErase | Kind::SanitizeExitFailureMode
        );
        let helps = match self {
            Medium::FormatFailed => sanitize || op.kind == Kind::FormatUnit,
            Medium::SanitizeFailed { .. } => sanitize,
            Medium::Ready | Medium::Formatting(_) | Medium::Sanitizing(_) => false,
        };
        match self.sense() {
            Some(sense) if !op.while_erasing && !helps => Err(sense.into()),
            _ => Ok(()),
        }
    }

    /// What is to be said of the state, unless all is well.
    pub fn sense(self) -> Option<Sense> {
        match self {
            Medium::Ready => None,
            Medium::Formatting(n) => Some(Sense::in_progress(Asc::FORMAT_IN_PROGRESS, n)),
            Medium::Sanitizing(n) => Some(Sense::in_progress(Asc::SANITIZE_IN_PROGRESS, n)),
            Medium::FormatFailed => Some(Sense::new(SenseKey::MediumError, Asc::FORMAT_COMMAND_FAILED)),
            Medium::SanitizeFailed { .. } => {
                Some(Sense::new(SenseKey::MediumError, Asc::SANITIZE_COMMAND_FAILED))
            }
        }
    }
}

/// How the medium is rewritten.
enum Method {
    /// Everything is freed, or zeroed if nothing can be freed.
    Free,
    /// Every block is overwritten, so many times; every other time with the pattern inverted.
    Overwrite { block: Vec<u8>, passes: u8, invert: bool },
}

/// A rewriting of the medium, and what is left if it fails.
pub(super) struct Job {
    method: Method,
    /// The type of protection that initiators see afterwards, if that is asked for.
    format: Option<Option<PiType>>,
    running: fn(u16) -> Medium,
    failed: Medium,
}

impl Job {
    fn format(format: Option<Option<PiType>>) -> Job {
        Job { method: Method::Free, format, running: Medium::Formatting, failed: Medium::FormatFailed }
    }

    fn sanitize(method: Method, ause: bool) -> Job {
        Job { method, format: None, running: Medium::Sanitizing, failed: Medium::SanitizeFailed { ause } }
    }
}

/// Leaves the failed state behind if the job ends in any other way than well, being dropped included.
struct Running<'a> {
    medium: &'a Cell<Medium>,
    leave: Medium,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.medium.set(self.leave);
    }
}

struct Flag<'a>(&'a Cell<bool>);

impl Drop for Flag<'_> {
    fn drop(&mut self) {
        self.0.set(false);
    }
}

impl<V: Volume> Target<V> {
    /// Does what commands with IMMED = 1 leave to be done; never ends. Whoever owns the target runs this beside
    /// the commands; without it such commands are executed to their end first, IMMED or not.
    pub async fn background(&self) {
        self.in_background.set(true);
        let _flag = Flag(&self.in_background);
        loop {
            let added = self.jobs_added.wait();
            let job = self.jobs.borrow_mut().pop_front();
            match job {
                // The failure has been logged, and the medium's state tells the initiators.
                Some(job) => drop(self.erase(job).await),
                None => added.await,
            }
        }
    }

    async fn start(&self, job: Job, immediate: bool) -> Outcome {
        // From now on, not from when the job gets its turn.
        self.medium.set((job.running)(0));
        // Cut off, it has failed: what is on the medium is neither the old nor the new.
        self.keeping.unfinished.set(Some(job.failed));
        self.keep();
        if immediate && self.in_background.get() {
            self.jobs.borrow_mut().push_back(job);
            self.jobs_added.notify_all();
            return Ok(0);
        }
        self.erase(job).await.map(|()| 0)
    }

    async fn erase(&self, job: Job) -> Result<(), Failure> {
        let done = self.erase_all(job).await;
        self.keep();
        done
    }

    async fn erase_all(&self, job: Job) -> Result<(), Failure> {
        let mut state = Running { medium: &self.medium, leave: job.failed };
        let _guard = self.gate.hold(0, u64::MAX).await;
        let len = self.geometry.get().blocks * self.block_size.bytes();
        info!(bytes = len, "erasing the whole medium");
        match self.rewrite(&job, len).await {
            Ok(()) => {
                state.leave = Medium::Ready;
                Ok(())
            }
            Err(failure) => {
                warn!("erasing the medium failed; it stays unusable until that is repeated");
                Err(failure)
            }
        }
    }

    async fn rewrite(&self, job: &Job, len: u64) -> Result<(), Failure> {
        match &job.method {
            Method::Free => {
                let thin = self.geometry.get().thin;
                self.in_steps(job, len, 0..len, STEP, async |at, n| match thin {
                    true => self.volume.discard(at, n).await,
                    false => self.volume.write_zeroes(at, n, true).await,
                })
                .await?;
            }
            Method::Overwrite { block, passes, invert } => {
                let total = len * u64::from(*passes);
                for pass in 0..*passes {
                    let mask = if *invert && pass % 2 == 1 { 0xff } else { 0x00 };
                    let bytes: Vec<u8> = block.iter().map(|b| b ^ mask).collect();
                    let buffer = repeated(&bytes, len.min(CHUNK) as usize);
                    let start = len * u64::from(pass);
                    self.in_steps(job, total, start..start + len, CHUNK, async |at, n| {
                        let from = buffer.slice(0, n as usize);
                        self.volume.write(ByteOffset(at.0 - start), &from, WriteFlags::default()).await
                    })
                    .await?;
                    // Each pass has to have reached the medium: otherwise only the last would.
                    self.volume.flush().await.map_err(|e| self.failure(e))?;
                }
            }
        }
        if let Some(kind) = job.format {
            let old = self.protection();
            self.volume.reformat(kind).await.map_err(|e| self.failure(e))?;
            if old != kind {
                info!(?old, new = ?kind, "formatted with another type of protection");
                self.attention(Asc::CAPACITY_DATA_CHANGED);
            }
        }
        self.volume.flush().await.map_err(|e| self.failure(e))
    }

    /// Calls `f` on `range`, of `total` bytes to do in all, step by step, and keeps the progress.
    async fn in_steps(
        &self,
        job: &Job,
        total: u64,
        range: std::ops::Range<u64>,
        step: u64,
        mut f: impl AsyncFnMut(ByteOffset, u64) -> crate::volume::Result<()>,
    ) -> Result<(), Failure> {
        let mut at = range.start;
        while at < range.end {
            let n = (range.end - at).min(step);
            f(ByteOffset(at), n).await.map_err(|e| self.failure(e))?;
            at += n;
            let progress = u128::from(at) * 65535 / u128::from(total);
            self.medium.set((job.running)(progress as u16));
        }
        Ok(())
    }

    /// FORMAT UNIT: certifies nothing, has no defects, and leaves zeros without protection information. FMTPINFO and
    /// PROTECTION FIELD USAGE choose the type (SBC-4 5.4.2, table 45).
    pub(super) async fn format_unit(&self, cdb: Cdb<'_>, command: &Command<'_>) -> Outcome {
        let (protect, format_info) = (self.transfer.is_some(), cdb.u8(1) >> 6);
        if format_info == 1 || format_info > 0 && !protect {
            return Err(Sense::invalid_field(1, 7).into());
        }
        let (mut immediate, mut usage) = (false, 0);
        if cdb.bit(1, 4) {
            let long = cdb.bit(1, 5);
            let list = self.parameters(command, if long { 8 } else { 4 })?;
            let wrong = |byte| Err(Sense::invalid_parameter(byte).into());
            usage = list[0] & 0x07;
            if usage > u8::from(format_info == 3) {
                return wrong(0);
            }
            if list[1] & 0x08 != 0 || list[1] & 0x80 == 0 && list[1] & 0x7c != 0 {
                return wrong(1); // an initialization pattern, or options without FOV
            }
            if list[2..].iter().any(|b| *b != 0) {
                return wrong(2); // a defect list, or a protection interval
            }
            immediate = list[1] & 0x02 != 0;
        }
        let kind = match (format_info, usage) {
            (2, _) => Some(PiType::Type1),
            (3, 0) => Some(PiType::Type2),
            (3, _) => Some(PiType::Type3),
            _ => None,
        };
        self.start(Job::format(protect.then_some(kind)), immediate).await
    }

    pub(super) async fn sanitize_block_erase(&self, cdb: Cdb<'_>) -> Outcome {
        if cdb.u16(7) != 0 {
            return Err(Sense::invalid_field(7, 7).into());
        }
        self.start(Job::sanitize(Method::Free, cdb.bit(1, 5)), cdb.bit(1, 7)).await
    }

    pub(super) async fn sanitize_overwrite(&self, cdb: Cdb<'_>, command: &Command<'_>) -> Outcome {
        let len = usize::from(cdb.u16(7));
        let block = self.block_size.bytes() as usize;
        if len <= 4 || len > block + 4 {
            return Err(Sense::invalid_field(7, 7).into());
        }
        let list = self.parameters(command, len)?;
        let (passes, invert) = (list[0] & 0x1f, list[0] & 0x80 != 0);
        if passes == 0 {
            return Err(Sense::invalid_parameter(0).into());
        }
        let pattern_len = usize::from(u16::from_be_bytes([list[2], list[3]]));
        if pattern_len == 0 || pattern_len > block || pattern_len > len - 4 {
            return Err(Sense::invalid_parameter(2).into());
        }
        let block: Vec<u8> = list[4..4 + pattern_len].iter().copied().cycle().take(block).collect();
        let method = Method::Overwrite { block, passes, invert };
        self.start(Job::sanitize(method, cdb.bit(1, 5)), cdb.bit(1, 7)).await
    }

    pub(super) fn sanitize_exit_failure_mode(&self, cdb: Cdb<'_>) -> Outcome {
        if cdb.u16(7) != 0 {
            return Err(Sense::invalid_field(7, 7).into());
        }
        match self.medium.get() {
            Medium::SanitizeFailed { ause: false } => Err(Sense::invalid_field(1, 4).into()),
            Medium::SanitizeFailed { ause: true } => {
                self.medium.set(Medium::Ready);
                self.keep();
                Ok(0)
            }
            _ => Ok(0),
        }
    }
}

fn repeated(block: &[u8], len: usize) -> Sg {
    let buffer = Buffer::zeroed(len).sg();
    for i in 0..len / block.len() {
        buffer.copy_in(i * block.len(), block);
    }
    buffer
}
