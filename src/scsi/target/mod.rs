//! [`Target`]: one logical unit that executes commands on a volume.
//!
//! Before a command reaches the volume all of it has been checked: its row in the table, unit attentions, write protection,
//! addresses, lengths, and that the buffer holds what the command says. So a refused command has touched nothing.
//! Any number of commands may be in execution; SCSI orders them no more than the initiator's task attributes ask, which the
//! kernel keeps.

mod along;
mod compare;
pub mod continued;
mod copy;
mod erase;
mod modes;
mod protect;
mod provision;
mod report;
mod rw;
mod space;

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    io,
    rc::Rc,
};

use tracing::{debug, warn};

use super::{
    cdb::{Cdb, Range, VARIABLE_LENGTH},
    mode::{self, PiSettings, Settings, Threshold},
    neighbour::Neighbours,
    opcodes::{self, Abilities, Kind, NotFound, Op},
    sense::{self, Asc, Failure, Sense, SenseBytes, SenseKey, Status},
    vpd::{Geometry, Identity},
};
use crate::{
    pi::{Counters, Transfer, guard::Guard},
    sync::{Notify, gate::Gate},
    sys::mem::Sg,
    units::{BlockSize, ByteOffset, Lba},
    volume::{AppRange, IoError, IoErrorKind, Limits, Volume},
};
use continued::{Keeper, Keeping};
use erase::Medium;

/// A command as it comes from an initiator. It borrows what its transport has, so that nothing is copied on its way.
#[derive(Debug, Clone)]
pub struct Command<'a> {
    /// The command descriptor block.
    pub cdb: &'a [u8],
    /// The data-out buffer, or room for data-in, whichever the command has. (No supported command has both.)
    pub data: &'a Sg,
    /// Protection information that travels beside the data: a tuple for each block, if the kernel passes it on.
    pub dif: &'a Sg,
    /// For COMPARE AND WRITE and EXTENDED COPY, if there is a memory that outlives this process.
    pub once: Option<Rc<dyn Once>>,
}

/// Remembers that a command has come to its point of no return, for whoever executes it again after a crash.
pub trait Once: std::fmt::Debug {
    /// Whether an execution that was cut off had come that far.
    fn is_marked(&self) -> bool;
    /// It has come that far now.
    fn mark(&self);
}

/// What an initiator gets back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Response {
    /// The status.
    pub status: Status,
    /// Sense data, with CHECK CONDITION.
    pub sense: Option<Sense>,
    /// Bytes of data-in at the start of [`Command::data`]; 0 if the command has none.
    pub data_in: usize,
    /// The command takes no data, so `data_in` is all that an initiator gets, even if that is nothing. Not set for a command
    /// that failed.
    pub gives_data: bool,
    /// What the command was, if there is such a one.
    pub kind: Option<Kind>,
}

impl Response {
    /// The sense data as bytes, in the format that D_SENSE asks for; empty if there are none.
    pub fn sense_bytes(&self) -> SenseBytes {
        self.sense.as_ref().map(Sense::to_bytes).unwrap_or_default()
    }
}

/// Where the saved mode pages are kept, if anywhere.
pub trait SavedPages {
    /// What [`SavedPages::save`] was last given.
    fn load(&self) -> Option<Vec<u8>>;

    /// Keeps these bytes (opaque, under 64) durably.
    ///
    /// # Errors
    /// Whatever kept it from doing so; the MODE SELECT fails.
    fn save(&self, pages: &[u8]) -> io::Result<()>;
}

/// Called on the volume's thread, which it may not hold up.
pub type OnFailure = Box<dyn Fn(&IoError)>;

/// What a [`Target`] is to be.
pub struct TargetConfig {
    /// Size of a logical block.
    pub block_size: BlockSize,
    /// UNIT SERIAL NUMBER: printable ASCII; anything else is left out.
    pub serial: String,
    /// NAA designator, 8 bytes; see [`naa_from_serial`].
    pub naa: u64,
    /// T10 VENDOR IDENTIFICATION, up to 8 characters.
    pub vendor: String,
    /// PRODUCT IDENTIFICATION, up to 16 characters.
    pub product: String,
    /// PRODUCT REVISION LEVEL, up to 4 characters.
    pub revision: String,
    /// How tuples travel, if initiators are to see protection information (PROTECT = 1). The type is the volume's to say.
    pub transfer: Option<Transfer>,
    /// Write protected, even if the volume is not.
    pub read_only: bool,
    /// WCE at start, unless saved pages say otherwise.
    pub write_cache: bool,
    /// Keeps saved mode pages; without it SP = 1 is refused.
    pub saved_pages: Option<Box<dyn SavedPages>>,
    /// Begin with the unit attention POWER ON, RESET, OR BUS DEVICE RESET OCCURRED.
    pub power_on: bool,
    /// Keeps for a successor of this process what only a power cycle may reset.
    pub keeper: Option<Box<dyn Keeper>>,
    /// Told of every failure of the volume, as it happens.
    pub on_failure: Option<OnFailure>,
    /// The logical units that EXTENDED COPY may reach beside this one; without it none.
    pub neighbours: Option<Rc<dyn Neighbours>>,
}

impl TargetConfig {
    /// A writable disk with a write cache, with the NAA that follows from the serial.
    pub fn new(block_size: BlockSize, serial: &str) -> TargetConfig {
        TargetConfig {
            block_size,
            serial: serial.to_owned(),
            naa: naa_from_serial(serial),
            vendor: "TCMU-DIF".to_owned(),
            product: "DISK".to_owned(),
            revision: concat!(env!("CARGO_PKG_VERSION_MAJOR"), ".", env!("CARGO_PKG_VERSION_MINOR"))
                .to_owned(),
            transfer: None,
            read_only: false,
            write_cache: true,
            saved_pages: None,
            power_on: true,
            keeper: None,
            on_failure: None,
            neighbours: None,
        }
    }
}

/// A locally assigned NAA (3h, SPC-4 7.8.6.6.4) that the serial number decides: the low 60 bits of its FNV-1a hash.
pub fn naa_from_serial(serial: &str) -> u64 {
    let hash = serial
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    0x3 << 60 | hash & ((1 << 60) - 1)
}

/// Bytes of data-in that a command produced, or why it failed.
type Outcome = Result<usize, Failure>;

/// One logical unit over a volume. Belongs to the volume's thread.
pub struct Target<V: Volume> {
    volume: V,
    identity: Identity,
    block_size: BlockSize,
    transfer: Option<Transfer>,
    guard: Guard,
    counters: Cell<Counters>,
    /// The application tag mode page.
    app_ranges: RefCell<Rc<[AppRange]>>,
    /// Asked for by the configuration; a change of the volume does not change it.
    read_only: bool,
    geometry: Cell<Geometry>,
    settings: Cell<Settings>,
    defaults: Settings,
    saved: Option<Box<dyn SavedPages>>,
    saved_settings: Cell<Settings>,
    on_failure: Option<OnFailure>,
    neighbours: Option<Rc<dyn Neighbours>>,
    copies: copy::Copies,
    moved_by_kernel: Cell<u64>,
    attentions: RefCell<VecDeque<Asc>>,
    keeping: Keeping,
    gate: Gate,
    space: Cell<space::Seen>,
    medium: Cell<Medium>,
    jobs: RefCell<VecDeque<erase::Job>>,
    jobs_added: Notify,
    /// [`Target::background`] is there to take jobs.
    in_background: Cell<bool>,
}

impl<V: Volume> Target<V> {
    /// A logical unit on that volume.
    pub fn new(config: TargetConfig, volume: V) -> Target<V> {
        let identity = Identity {
            vendor: padded(&config.vendor),
            product: padded(&config.product),
            revision: padded(&config.revision),
            serial: config.serial.chars().filter(|c| (' '..='~').contains(c)).take(252).collect(),
            naa: config.naa,
        };
        let geometry = geometry(config.block_size, &volume.limits());
        let defaults = Settings {
            write_cache: config.write_cache,
            descriptor_sense: false,
            write_protect: false,
            pi: config.transfer.map(|_| PiSettings::default()),
            threshold: geometry.thresholds.then(Threshold::default),
        };
        let loaded = config.saved_pages.as_ref().and_then(|s| s.load());
        let settings = match &loaded {
            None => defaults,
            Some(bytes) => mode::restore(bytes, &defaults).unwrap_or_else(|| {
                warn!(bytes = bytes.len(), "saved mode pages are not ours: defaults taken");
                defaults
            }),
        };
        let attentions =
            if config.power_on { VecDeque::from([Asc::POWER_ON_OR_RESET]) } else { VecDeque::new() };
        Target {
            geometry: Cell::new(geometry),
            volume,
            identity,
            block_size: config.block_size,
            transfer: config.transfer,
            guard: Guard::best(),
            counters: Cell::default(),
            app_ranges: RefCell::new(Rc::new([])),
            read_only: config.read_only,
            settings: Cell::new(settings),
            defaults,
            saved: config.saved_pages,
            on_failure: config.on_failure,
            neighbours: config.neighbours,
            copies: copy::Copies::default(),
            moved_by_kernel: Cell::default(),
            saved_settings: Cell::new(settings),
            attentions: RefCell::new(attentions),
            keeping: Keeping::new(config.keeper, config.write_cache),
            gate: Gate::default(),
            space: Cell::default(),
            medium: Cell::new(Medium::Ready),
            jobs: RefCell::default(),
            jobs_added: Notify::new(),
            in_background: Cell::new(false),
        }
    }

    /// The volume beneath.
    pub fn volume(&self) -> &V {
        &self.volume
    }

    /// Size of a logical block.
    pub fn block_size(&self) -> BlockSize {
        self.block_size
    }

    /// Looks at the volume's limits again, after a resize, and tells the initiators if the capacity is another.
    pub fn capacity_changed(&self) {
        let old = self.geometry.replace(geometry(self.block_size, &self.volume.limits()));
        if old.blocks != self.geometry.get().blocks {
            self.attention(Asc::CAPACITY_DATA_CHANGED);
        }
    }

    /// Whether writes are acknowledged before they are on stable storage (WCE).
    pub fn write_cache(&self) -> bool {
        self.settings.get().write_cache
    }

    /// Sets WCE from outside, and tells the initiators if it changed. Turning it off does not flush what is already
    /// acknowledged: the caller does, if it has to be so.
    pub fn set_write_cache(&self, on: bool) {
        let mut settings = self.settings.get();
        if settings.write_cache != on {
            settings.write_cache = on;
            self.settings.set(settings);
            self.attention(Asc::MODE_PARAMETERS_CHANGED);
        }
        self.note_write_cache(on);
    }

    fn attention(&self, asc: Asc) {
        let mut queue = self.attentions.borrow_mut();
        if !queue.contains(&asc) {
            queue.push_back(asc);
        }
        drop(queue);
        self.keep();
    }

    /// Executes one command to its end. Never panics, whatever the command holds.
    pub async fn execute(&self, command: &Command<'_>) -> Response {
        let failed = |status, sense| {
            let kind = opcodes::find(command.cdb, self.abilities()).ok().map(|op| op.kind);
            Response { status, sense, data_in: 0, gives_data: false, kind }
        };
        match self.run(command).await {
            Ok((data_in, kind)) => {
                let gives_data = !kind.takes_data_out();
                Response { status: Status::Good, sense: None, data_in, gives_data, kind: Some(kind) }
            }
            Err(Failure::Sense(mut sense)) => {
                sense.descriptor = self.settings.get().descriptor_sense;
                debug!(cdb = ?command.cdb, sense = sense.codes(), detail = ?sense, "check condition");
                failed(Status::CheckCondition, Some(sense))
            }
            Err(Failure::Status(status)) => failed(status, None),
        }
    }

    async fn run(&self, command: &Command<'_>) -> Result<(usize, Kind), Failure> {
        let found = opcodes::find(command.cdb, self.abilities());
        if !found.is_ok_and(|op| op.ignores_attention)
            && let Some(asc) = self.give_attention()
        {
            return Err(Sense::new(SenseKey::UnitAttention, asc).into());
        }
        let op = found.map_err(|e| match e {
            NotFound::Opcode => Sense::new(SenseKey::IllegalRequest, Asc::INVALID_OPERATION_CODE),
            NotFound::ServiceAction if command.cdb[0] == VARIABLE_LENGTH => Sense::invalid_field(8, 7),
            NotFound::ServiceAction => Sense::invalid_field(1, 4),
        })?;
        let cdb = Cdb::new(command.cdb, op.cdb_len())
            .ok_or(Sense::invalid_field(command.cdb.len().min(usize::from(u16::MAX)) as u16, 7))?;
        self.admit(op, cdb)?;
        // Nearly all commands are these two. What the others may wait for is boxed: it would make the future of every command as large
        // as the largest of them, and futures are copied.
        let done = match op.kind {
            Kind::Read => self.read(cdb, command).await,
            Kind::Write => self.write(cdb, command).await,
            kind => Box::pin(self.dispatch(kind, cdb, command)).await,
        };
        if op.writes && self.is_time_for_space() {
            Box::pin(self.look_at_space()).await;
        }
        let data_in = done?;
        if !op.kind.takes_data_out() && data_in < command.data.len() {
            // The buffer lies in memory that earlier commands have used, and a transport may hand all of it on.
            command.data.fill(data_in, command.data.len() - data_in, 0);
        }
        Ok((data_in, op.kind))
    }

    /// What there is at the moment, as far as commands depend on it.
    fn abilities(&self) -> Abilities {
        Abilities {
            thin: self.geometry.get().thin,
            atomic: self.geometry.get().atomic > 0,
            protect: self.transfer.is_some(),
            protection: self.protection(),
        }
    }

    /// The checks that the table asks for.
    fn admit(&self, op: &Op, cdb: Cdb<'_>) -> Result<(), Failure> {
        if cdb.naca() {
            return Err(Sense::invalid_field(cdb.control_at() as u16, 2).into());
        }
        if cdb.is_variable() && cdb.u8(7) != op.cdb_len() - 8 {
            return Err(Sense::invalid_field(7, 7).into()); // ADDITIONAL CDB LENGTH
        }
        if op.strict {
            for (i, (byte, used)) in cdb.bytes().iter().zip(op.usage).enumerate().skip(1) {
                if byte & !used != 0 {
                    return Err(
                        Sense::invalid_field(i as u16, 7 - (byte & !used).leading_zeros() as u8).into()
                    );
                }
            }
        }
        self.medium.get().admit(op)?;
        if op.writes { self.is_writable() } else { Ok(()) }
    }

    /// Write protection, of the medium and by the initiators' wish.
    fn is_writable(&self) -> Result<(), Failure> {
        if self.read_only || self.geometry.get().read_only {
            return Err(Sense::new(SenseKey::DataProtect, Asc::WRITE_PROTECTED).into());
        }
        if self.settings.get().write_protect {
            return Err(Sense::new(SenseKey::DataProtect, Asc::SOFTWARE_WRITE_PROTECTED).into());
        }
        Ok(())
    }

    async fn dispatch(&self, kind: Kind, cdb: Cdb<'_>, command: &Command<'_>) -> Outcome {
        match kind {
            Kind::TestUnitReady => Ok(0),
            Kind::RequestSense => self.request_sense(cdb, command),
            Kind::FormatUnit => self.format_unit(cdb, command).await,
            Kind::Inquiry => self.inquiry(cdb, command),
            Kind::ModeSelect => self.mode_select(cdb, command).await,
            Kind::ModeSense => self.mode_sense(cdb, command),
            Kind::StartStopUnit => self.start_stop_unit(cdb).await,
            Kind::PreventAllow => self.prevent_allow(cdb),
            Kind::ReadCapacity10 => self.read_capacity_10(cdb, command),
            Kind::ReadCapacity16 => self.read_capacity_16(cdb, command),
            Kind::Read => self.read(cdb, command).await,
            Kind::Write => self.write(cdb, command).await,
            Kind::WriteAtomic => self.write_atomic(cdb, command).await,
            Kind::WriteAndVerify => self.write_and_verify(cdb, command).await,
            Kind::Verify => self.verify(cdb, command).await,
            Kind::PreFetch => self.pre_fetch(cdb).await,
            Kind::SynchronizeCache => self.synchronize_cache(cdb).await,
            Kind::ReadDefectData => self.read_defect_data(cdb, command),
            Kind::WriteSame => self.write_same(cdb, command).await,
            Kind::Unmap => self.unmap(cdb, command).await,
            Kind::SanitizeOverwrite => self.sanitize_overwrite(cdb, command).await,
            Kind::SanitizeBlockErase => self.sanitize_block_erase(cdb).await,
            Kind::SanitizeExitFailureMode => self.sanitize_exit_failure_mode(cdb),
            Kind::LogSense => self.log_sense(cdb, command).await,
            Kind::CompareAndWrite => self.compare_and_write(cdb, command).await,
            Kind::OrWrite => self.or_write(cdb, command).await,
            Kind::GetLbaStatus => self.get_lba_status(cdb, command).await,
            Kind::ReportLuns => self.report_luns(cdb, command),
            Kind::ReportTargetPortGroups => self.report_target_port_groups(cdb, command),
            Kind::ReportSupportedOpcodes => self.report_supported_opcodes(cdb, command),
            Kind::ReportSupportedTmf => self.report_supported_tmf(cdb, command),
            // Seldom, and large: not a part of every command's future.
            Kind::ExtendedCopy => Box::pin(self.extended_copy(cdb, command)).await,
            Kind::ReceiveCopyStatus => self.receive_copy_status(cdb, command),
            Kind::ReceiveCopyData => self.receive_copy_data(cdb, command),
            Kind::ReceiveCopyParameters => self.receive_copy_parameters(cdb, command),
            Kind::ReceiveCopyFailure => self.receive_copy_failure(cdb, command),
        }
    }

    /// Gives `bytes` back as data-in, cut to the allocation length and to the buffer.
    fn reply(&self, command: &Command<'_>, bytes: &[u8], allocation: u64) -> Outcome {
        let n = (bytes.len() as u64).min(allocation).min(command.data.len() as u64) as usize;
        command.data.copy_in(0, &bytes[..n]);
        Ok(n)
    }

    /// The first `len` bytes of data-out, which the CDB calls a parameter list.
    fn parameters(&self, command: &Command<'_>, len: usize) -> Result<Vec<u8>, Failure> {
        if command.data.len() < len {
            return Err(Sense::parameter_list_length().into());
        }
        Ok(command.data.slice(0, len).to_vec())
    }

    /// Where a range starts and how long it is in bytes, if all of it is on the medium.
    fn place(&self, lba: Lba, blocks: u64) -> Result<(ByteOffset, u64), Failure> {
        let total = self.geometry.get().blocks;
        match lba.0.checked_add(blocks) {
            Some(end) if end <= total => {
                let bytes = self.block_size.bytes();
                Ok((ByteOffset(lba.0 * bytes), blocks * bytes))
            }
            _ => Err(Sense::out_of_range(lba).into()),
        }
    }

    /// [`Target::place`], if the transfer is no longer than MAXIMUM TRANSFER LENGTH.
    fn transfer(&self, range: Range) -> Result<(ByteOffset, u64), Failure> {
        let place = self.place(range.lba, range.blocks.0)?;
        if range.blocks.0 > self.geometry.get().max_transfer() {
            return Err(Sense::invalid_field(range.length_at, 7).into());
        }
        Ok(place)
    }

    /// What an initiator is told about a failure of the volume; the log is told all of it.
    fn failure(&self, error: IoError) -> Failure {
        if let Some(tell) = &self.on_failure {
            tell(&error);
        }
        let level_debug = matches!(error.kind, IoErrorKind::Cancelled | IoErrorKind::Unsupported);
        let failure = sense::from_io_error(&error, self.block_size);
        let sense = match &failure {
            Failure::Sense(sense) => Some(sense.codes()),
            Failure::Status(_) => None,
        };
        let lba = error.at.map(|at| self.block_size.lba_of(at).0);
        let source = error.source.as_ref().map(tracing::field::display);
        if level_debug {
            debug!(lba, sense, source, "{error}");
        } else {
            warn!(lba, sense, source, "{error}");
        }
        failure
    }
}

fn padded<const N: usize>(text: &str) -> [u8; N] {
    let mut out = [b' '; N];
    for (to, from) in out.iter_mut().zip(text.bytes().filter(|b| (b' '..=b'~').contains(b))) {
        *to = from;
    }
    out
}

fn geometry(block_size: BlockSize, limits: &Limits) -> Geometry {
    let blocks_of = |bytes: u32| bytes >> block_size.shift();
    let physical = 4096 >> block_size.shift();
    // A granule larger than a few MiB says nothing about the cost of an I/O, and would not divide the longest transfer.
    let most = (4 << 20) >> block_size.shift();
    Geometry {
        block_size,
        blocks: block_size.blocks_in(limits.capacity).0,
        thin: limits.discard_granularity > 0,
        unmap_granularity: blocks_of(limits.discard_granularity).max(1),
        transfer_granularity: blocks_of(limits.preferred_io).clamp(physical, most) as u16,
        atomic: blocks_of(limits.atomic_write),
        atomic_granule: blocks_of(limits.atomic_unit).max(1),
        thresholds: limits.tells_free && limits.discard_granularity > 0,
        read_only: limits.read_only,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_naa_is_locally_assigned_and_the_serials_own() {
        assert_eq!(naa_from_serial("vm1") >> 60, 3);
        assert_ne!(naa_from_serial("vm1"), naa_from_serial("vm2"));
        assert_eq!(naa_from_serial(""), 0x3bf2_9ce4_8422_2325);
    }
}
