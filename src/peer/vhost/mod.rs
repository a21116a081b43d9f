//! A vhost-scsi initiator in user space: what QEMU and its guest's driver are to `/dev/vhost-scsi`, without either.
//!
//! The VM tests drive LUNs through the real fabric with it, several commands in flight, and `tcmu-dif peer-vhost` is the
//! same by hand. The rings are split virtqueues (virtio 1.2, 2.7) and the requests those of virtio-scsi (5.6), in a memory
//! of its own. What the kernel answers is checked before it is used: it is the other side here.

mod queue;
mod selftest;

use std::{
    collections::VecDeque,
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
    rc::Rc,
    time::{Duration, Instant},
};

use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll},
    fs::{MemfdFlags, memfd_create},
};

pub use queue::MAX_DATA;
use queue::{Layout, Queue};
pub use selftest::{Options, Report, selftest};

use crate::sys::{
    mem::Mapping,
    vhost::{GUEST_BASE, VIRTIO_F_VERSION_1, VIRTIO_SCSI_F_T10_PI, VhostScsi},
};

/// Commands that may be in flight at a time.
pub const MAX_IN_FLIGHT: usize = queue::SLOTS;

/// What a command moves.
#[derive(Debug, Clone, Copy)]
pub enum Transfer<'a> {
    /// Nothing.
    None,
    /// Bytes to the device.
    Out(&'a [u8]),
    /// Room for that many bytes from the device.
    In(usize),
    /// Bytes to the device, and their protection information (VIRTIO_SCSI_F_T10_PI).
    OutPi(&'a [u8], &'a [u8]),
    /// Room for bytes from the device, and for that many bytes of their protection information.
    InPi(usize, usize),
}

impl<'a> Transfer<'a> {
    /// Bytes out, room in, protection information out, room for protection information.
    fn parts(self) -> (&'a [u8], usize, &'a [u8], usize) {
        match self {
            Transfer::None => (&[], 0, &[], 0),
            Transfer::Out(bytes) => (bytes, 0, &[], 0),
            Transfer::In(room) => (&[], room, &[], 0),
            Transfer::OutPi(bytes, pi) => (bytes, 0, pi, 0),
            Transfer::InPi(room, pi) => (&[], room, &[], pi),
        }
    }
}

/// A command that has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Completion {
    /// What `submit` gave.
    pub tag: u64,
    /// The transport's word (virtio 1.2, 5.6.6.1.1): 0 is OK, and only then is the rest valid.
    pub response: u8,
    /// The SCSI status (SAM-5 5.3.1): 0 GOOD, 2 CHECK CONDITION.
    pub status: u8,
    /// Sense data, if there are any.
    pub sense: Vec<u8>,
    /// Bytes of the transfer that were not moved.
    pub residual: u32,
    /// The data that came in.
    pub data: Vec<u8>,
    /// Their protection information, in the room that was given for it.
    pub pi: Vec<u8>,
}

impl Completion {
    /// Sense key, additional sense code and qualifier, from fixed or descriptor sense data (SPC-5 4.4).
    pub fn sense_codes(&self) -> Option<(u8, u8, u8)> {
        let s = &self.sense;
        match s.first()? & 0x7f {
            0x70 | 0x71 => Some((s.get(2)? & 0xf, *s.get(12)?, *s.get(13)?)),
            0x72 | 0x73 => Some((s.get(1)? & 0xf, *s.get(2)?, *s.get(3)?)),
            _ => None,
        }
    }
}

/// Why the initiator cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum VhostError {
    /// The device cannot be opened or set up.
    #[error("/dev/vhost-scsi: {step}")]
    Setup {
        /// What was being done.
        step: &'static str,
        /// The kernel's word.
        #[source]
        source: io::Error,
    },
    /// There is no target of that name to connect to.
    #[error("no connection to the vhost-scsi target {wwpn}")]
    Endpoint {
        /// Its name.
        wwpn: String,
        /// The kernel's word.
        #[source]
        source: io::Error,
    },
    /// Too many commands, a CDB of more than 32 bytes, or more than [`MAX_DATA`] bytes of data.
    #[error("the command does not fit: {0}")]
    Command(&'static str),
    /// Nothing came in time.
    #[error("no answer within {seconds} s to {in_flight} commands")]
    Timeout {
        /// How long.
        seconds: u64,
        /// How many wait.
        in_flight: usize,
    },
    /// The kernel's side of the ring makes no sense, or it says that ours does not.
    #[error("the ring is broken: {0}")]
    Ring(&'static str),
    /// A system call failed.
    #[error("waiting for completions")]
    Io(#[source] io::Error),
}

impl VhostError {
    /// What to do next, if there is something.
    pub fn next_step(&self) -> Option<String> {
        match self {
            VhostError::Setup { source, .. } => match source.raw_os_error() {
                Some(libc::ENOENT | libc::ENODEV) => Some("modprobe vhost_scsi".to_owned()),
                Some(libc::EACCES | libc::EPERM) => Some("run it as root".to_owned()),
                _ => None,
            },
            VhostError::Endpoint { wwpn, source } => match source.raw_os_error() {
                Some(libc::EEXIST | libc::EBUSY) => {
                    Some("disconnect the guest that uses the target".to_owned())
                }
                _ => Some(format!("export a LUN there: tcmu-dif create … --export vhost:{wwpn}")),
            },
            VhostError::Timeout { .. } => Some("see whether the daemon runs: tcmu-dif list".to_owned()),
            VhostError::Command(_) | VhostError::Ring(_) | VhostError::Io(_) => None,
        }
    }
}

/// A connection to one vhost-scsi target.
pub struct VhostInitiator {
    /// Holds the connection; closed before the memory goes.
    _device: VhostScsi,
    queue: Queue,
    kick: OwnedFd,
    call: OwnedFd,
    err: OwnedFd,
    target: u8,
    done: VecDeque<Completion>,
}

impl VhostInitiator {
    /// Connects to the target portal group 1 of the target with that WWN (`naa.…`).
    ///
    /// # Errors
    /// [`VhostError::Setup`] without the module or the right; [`VhostError::Endpoint`] without such a target.
    pub fn connect(wwpn: &str) -> Result<VhostInitiator, VhostError> {
        VhostInitiator::connect_as(wwpn, false)
    }

    /// The same with VIRTIO_SCSI_F_T10_PI: commands may carry protection information.
    ///
    /// # Errors
    /// As [`VhostInitiator::connect`]; [`VhostError::Setup`] from a kernel that doesn't offer it.
    pub fn connect_with_pi(wwpn: &str) -> Result<VhostInitiator, VhostError> {
        VhostInitiator::connect_as(wwpn, true)
    }

    fn connect_as(wwpn: &str, with_pi: bool) -> Result<VhostInitiator, VhostError> {
        let setup = |step| move |source| VhostError::Setup { step, source };
        let layout = Layout::new();
        let fd = memfd_create("tcmu-dif-vhost", MemfdFlags::CLOEXEC)
            .map_err(|e| setup("making memory")(e.into()))?;
        let file = File::from(fd);
        file.set_len(layout.total as u64).map_err(setup("making memory"))?;
        let memory = Mapping::new(&file, layout.total).map_err(setup("mapping memory"))?;

        let mut device = VhostScsi::open(memory.clone()).map_err(setup("opening it"))?;
        let offered = device.features().map_err(setup("asking for its features"))?;
        let wanted = VIRTIO_F_VERSION_1 | if with_pi { VIRTIO_SCSI_F_T10_PI } else { 0 };
        if offered & wanted != wanted {
            let source = io::Error::from_raw_os_error(libc::EOPNOTSUPP);
            return Err(setup("it offers no virtio 1.0, or no protection information")(source));
        }
        device.set_features(wanted).map_err(setup("settling its features"))?;
        let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let event = || event().map_err(|e| setup("making an eventfd")(e.into()));
        let (kick, call, err) = (event()?, event()?, event()?);
        let idle = event()?;
        for (i, ring) in layout.rings.iter().enumerate() {
            // Control and event queue stay empty: nobody listens to their completions.
            let (kick, call) = if i == queue::REQUEST_QUEUE { (&kick, &call) } else { (&idle, &idle) };
            device
                .set_vring(i as u32, *ring, kick.as_fd(), call.as_fd(), err.as_fd())
                .map_err(setup("setting up its queues"))?;
        }
        device.set_endpoint(wwpn).map_err(|source| VhostError::Endpoint { wwpn: wwpn.to_owned(), source })?;
        let queue = Queue::new(memory, &layout, GUEST_BASE, with_pi);
        Ok(VhostInitiator { _device: device, queue, kick, call, err, target: 1, done: VecDeque::new() })
    }

    /// Commands in flight.
    pub fn in_flight(&self) -> usize {
        self.queue.in_flight()
    }

    /// Sends a command to LUN 0 of the target, and gives the tag that its completion will carry.
    ///
    /// # Errors
    /// [`VhostError::Command`] if it does not fit.
    pub fn submit(&mut self, cdb: &[u8], transfer: Transfer<'_>) -> Result<u64, VhostError> {
        let tag = self.queue.push(self.target, cdb, transfer)?;
        rustix::io::write(&self.kick, &1u64.to_ne_bytes()).map_err(|e| VhostError::Io(e.into()))?;
        Ok(tag)
    }

    /// Waits for the next command to end.
    ///
    /// # Errors
    /// [`VhostError::Timeout`], [`VhostError::Ring`] if the kernel reports or shows an error in the ring.
    pub fn complete(&mut self, timeout: Duration) -> Result<Completion, VhostError> {
        let until = Instant::now() + timeout;
        loop {
            if let Some(done) = self.done.pop_front() {
                return Ok(done);
            }
            self.queue.take_used(&mut self.done)?;
            if !self.done.is_empty() {
                continue;
            }
            let left = until.saturating_duration_since(Instant::now());
            let timeout_error =
                VhostError::Timeout { seconds: timeout.as_secs(), in_flight: self.queue.in_flight() };
            if left.is_zero() || self.queue.in_flight() == 0 {
                return Err(timeout_error);
            }
            let left = Timespec::try_from(left).map_err(|_| timeout_error)?;
            let mut fds = [PollFd::new(&self.call, PollFlags::IN), PollFd::new(&self.err, PollFlags::IN)];
            match poll(&mut fds, Some(&left)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(VhostError::Io(e.into())),
            }
            if !fds[1].revents().is_empty() {
                return Err(VhostError::Ring("the kernel found an error in our queue"));
            }
            if !fds[0].revents().is_empty() {
                let mut count = [0; 8];
                rustix::io::read(&self.call, &mut count).map_err(|e| VhostError::Io(e.into()))?;
            }
        }
    }

    /// Sends one command and waits for it; a unit attention (power on, capacity change) is taken note of and the command sent
    /// again. Nothing else may be in flight.
    ///
    /// # Errors
    /// Those of `submit` and `complete`.
    pub fn execute(
        &mut self,
        cdb: &[u8],
        transfer: Transfer<'_>,
        timeout: Duration,
    ) -> Result<Completion, VhostError> {
        for _ in 0..8 {
            let tag = self.submit(cdb, transfer)?;
            let done = self.complete(timeout)?;
            if done.tag != tag {
                return Err(VhostError::Ring("the answer belongs to another command"));
            }
            if done.sense_codes().is_none_or(|(key, ..)| key != 0x6) {
                return Ok(done);
            }
        }
        Err(VhostError::Ring("unit attention without end"))
    }
}

/// The shared mapping as the rest of this room needs it.
type Memory = Rc<Mapping>;
