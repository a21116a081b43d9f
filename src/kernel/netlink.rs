//! The generic netlink family `TCM-USER`, version 2: the kernel tells of devices, and waits for an answer.
//!
//! [`Events`] is the ear: a socket of the multicast group `config` that never blocks. [`Replies`] is the mouth: it sends one
//! `*_DONE` at a time and waits for the kernel's word on it. The kernel takes the first answer that anybody gives for a
//! device, so callers answer for their own subtype only ([`Event::device`] says whose it is); and a `*_DONE` of the wrong
//! kind makes the kernel forget who is waiting, so a [`Pending`] knows its kind and answers once.
//!
//! Attributes and commands: `<linux/target_core_user.h>`, `enum tcmu_genl_cmd` and `tcmu_genl_attr`.

use std::{
    io::{self, Cursor},
    os::fd::{AsRawFd, RawFd},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use neli::{
    FromBytesWithInput,
    attr::Attribute,
    consts::{
        genl::{CtrlAttr, CtrlAttrMcastGrp, CtrlCmd, Index},
        nl::{GenlId, NlmF, Nlmsg},
        socket::{Msg, NlFamily},
    },
    genl::{AttrTypeBuilder, Genlmsghdr, GenlmsghdrBuilder, Nlattr, NlattrBuilder},
    neli_enum,
    nl::{NlPayload, Nlmsghdr, NlmsghdrBuilder},
    socket::{NlSocket, synchronous::NlSocketHandle},
    types::{Buffer, GenlBuffer, NlBuffer},
    utils::Groups,
};
use thiserror::Error;

use super::uio::UioName;
use crate::sys::socket::{force_receive_buffer, receive_timeout};

const FAMILY: &str = "TCM-USER";
const GROUP: &str = "config";
const VERSION: u8 = 2;
/// Room for some thousands of events: 64 creates at once must not lose one.
const RECEIVE_BUFFER: u32 = 8 << 20;

/// `enum tcmu_genl_cmd`.
#[neli_enum(serialized_type = "u8")]
pub enum Command {
    /// TCMU_CMD_ADDED_DEVICE.
    Added = 1,
    /// TCMU_CMD_REMOVED_DEVICE.
    Removed = 2,
    /// TCMU_CMD_RECONFIG_DEVICE.
    Reconfig = 3,
    /// TCMU_CMD_ADDED_DEVICE_DONE.
    AddedDone = 4,
    /// TCMU_CMD_REMOVED_DEVICE_DONE.
    RemovedDone = 5,
    /// TCMU_CMD_RECONFIG_DEVICE_DONE.
    ReconfigDone = 6,
    /// TCMU_CMD_SET_FEATURES.
    SetFeatures = 7,
}
impl neli::consts::genl::Cmd for Command {}

/// `enum tcmu_genl_attr`.
#[neli_enum(serialized_type = "u16")]
pub enum Attr {
    /// TCMU_ATTR_DEVICE: the uio device's name.
    Device = 1,
    /// TCMU_ATTR_MINOR: of the uio device.
    Minor = 2,
    /// TCMU_ATTR_PAD.
    Pad = 3,
    /// TCMU_ATTR_DEV_CFG.
    DevCfg = 4,
    /// TCMU_ATTR_DEV_SIZE, bytes.
    DevSize = 5,
    /// TCMU_ATTR_WRITECACHE.
    WriteCache = 6,
    /// TCMU_ATTR_CMD_STATUS: 0 or a negative errno.
    CmdStatus = 7,
    /// TCMU_ATTR_DEVICE_ID.
    DeviceId = 8,
    /// TCMU_ATTR_SUPP_KERN_CMD_REPLY.
    SuppKernCmdReply = 9,
}
impl neli::consts::genl::NlAttrType for Attr {}

/// What an event asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A device has come.
    Added,
    /// A device goes.
    Removed,
    /// A device changes.
    Reconfig,
}

/// What a RECONFIG changes; the kernel sends one at a time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// The capacity in bytes.
    Size(u64),
    /// The write cache.
    WriteCache(bool),
    /// The configuration string.
    Config(String),
    /// One that we don't know.
    Unknown,
}

/// One message of the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// What it is about.
    pub kind: Kind,
    /// The device's name; `None` if it isn't of the form that target_core_user gives.
    pub device: Option<UioName>,
    /// The minor number of the uio device, which is also its number: /dev/uioN.
    pub minor: u32,
    /// What the answer must name.
    pub device_id: u32,
    /// For [`Kind::Reconfig`].
    pub change: Option<Change>,
}

/// Why the kernel can't be talked to.
#[derive(Debug, Error)]
pub enum NetlinkError {
    /// The module isn't there, or is older than version 2 of the interface.
    #[error("the kernel has no generic netlink family {FAMILY}: target_core_user isn't loaded")]
    NoFamily,
    /// A system call failed.
    #[error("netlink: {0}")]
    Io(&'static str, #[source] io::Error),
    /// The kernel refused a request.
    #[error("the kernel refused {0}")]
    Refused(&'static str, #[source] io::Error),
    /// The kernel's answer is not what the protocol says.
    #[error("the kernel's answer makes no sense: {0}")]
    Protocol(String),
}

fn protocol(e: impl std::fmt::Display) -> NetlinkError {
    NetlinkError::Protocol(e.to_string())
}

type Message = Nlmsghdr<u16, Genlmsghdr<Command, Attr>>;

/// Parses what one receive gave. Messages of other kinds than events are left out.
///
/// # Errors
/// [`NetlinkError::Protocol`] if the bytes are no netlink messages, or an event lacks its device.
pub fn parse(bytes: &[u8], family: u16) -> Result<Vec<Event>, NetlinkError> {
    let messages = NlBuffer::<u16, Buffer>::from_bytes_with_input(&mut Cursor::new(bytes), bytes.len());
    let mut events = Vec::new();
    for message in messages.map_err(protocol)?.iter().filter(|m| *m.nl_type() == family) {
        let Some(body) = message.get_payload() else { continue };
        let message = Genlmsghdr::<Command, Attr>::from_bytes_with_input(&mut Cursor::new(body), body.len())
            .map_err(protocol)?;
        if let Some(event) = event(&message)? {
            events.push(event);
        }
    }
    Ok(events)
}

fn event(message: &Genlmsghdr<Command, Attr>) -> Result<Option<Event>, NetlinkError> {
    let kind = match message.cmd() {
        Command::Added => Kind::Added,
        Command::Removed => Kind::Removed,
        Command::Reconfig => Kind::Reconfig,
        _ => return Ok(None),
    };
    let attrs = message.attrs().get_attr_handle();
    let bytes = |attr| attrs.get_attribute(attr).map(|a: &Nlattr<Attr, Buffer>| a.payload().as_ref());
    let text =
        |attr| bytes(attr).map(|b: &[u8]| String::from_utf8_lossy(b).trim_end_matches('\0').to_owned());
    let word = |attr, what| {
        let value = bytes(attr).and_then(|b| <[u8; 4]>::try_from(b).ok());
        value.map(u32::from_ne_bytes).ok_or_else(|| protocol(format!("an event without {what}")))
    };
    let change = (kind == Kind::Reconfig).then(|| {
        let size = bytes(Attr::DevSize).and_then(|b| <[u8; 8]>::try_from(b).ok());
        let cache = bytes(Attr::WriteCache).and_then(|b| b.first());
        match (size, cache, text(Attr::DevCfg)) {
            (Some(size), ..) => Change::Size(u64::from_ne_bytes(size)),
            (_, Some(cache), _) => Change::WriteCache(*cache != 0),
            (.., Some(config)) => Change::Config(config),
            _ => Change::Unknown,
        }
    });
    Ok(Some(Event {
        kind,
        device: text(Attr::Device).as_deref().and_then(UioName::parse),
        minor: word(Attr::Minor, "a minor number")?,
        device_id: word(Attr::DeviceId, "a device's number")?,
        change,
    }))
}

/// What one look at the socket gave.
#[derive(Debug)]
pub enum Heard {
    /// Events, in the kernel's order.
    Events(Vec<Event>),
    /// The kernel had to throw messages away: what it told must be found by looking ([`super::uio`]).
    Overrun,
    /// Nothing more for now.
    Nothing,
}

/// The socket that hears the kernel.
pub struct Events {
    socket: NlSocket,
    family: u16,
}

impl Events {
    /// Joins the group. The daemon does so before it looks for devices that exist, so that none is missed between.
    ///
    /// # Errors
    /// [`NetlinkError::NoFamily`] if the module isn't loaded.
    pub fn listen(family: &Family) -> Result<Events, NetlinkError> {
        let socket = NlSocket::connect(NlFamily::Generic, None, Groups::empty())
            .map_err(|e| NetlinkError::Io("socket", e))?;
        force_receive_buffer(&socket, RECEIVE_BUFFER).map_err(|e| NetlinkError::Io("receive buffer", e))?;
        socket
            .add_mcast_membership(Groups::new_groups(&[family.group]))
            .map_err(|e| NetlinkError::Io("join the group", e))?;
        Ok(Events { socket, family: family.id })
    }

    /// Reads once, without waiting.
    ///
    /// # Errors
    /// The socket's, and [`NetlinkError::Protocol`] for a message that can't be read (it is gone then).
    pub fn hear(&self) -> Result<Heard, NetlinkError> {
        let mut buffer = vec![0u8; 64 << 10];
        match self.socket.recv(&mut buffer, Msg::DONTWAIT) {
            Ok((len, _)) => parse(&buffer[..len.min(buffer.len())], self.family).map(Heard::Events),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(Heard::Nothing),
            Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => Ok(Heard::Overrun),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(Heard::Events(Vec::new())),
            Err(e) => Err(NetlinkError::Io("receive", e)),
        }
    }
}

impl AsRawFd for Events {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

/// The numbers that the kernel has given the family and its group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Family {
    /// The family: the type of its messages.
    pub id: u16,
    /// The multicast group `config`.
    pub group: u32,
}

impl Family {
    /// Asks the kernel.
    ///
    /// # Errors
    /// [`NetlinkError::NoFamily`] if the module isn't loaded.
    pub fn resolve() -> Result<Family, NetlinkError> {
        let socket = request_socket()?;
        let name = attr(CtrlAttr::FamilyName, FAMILY)?;
        let body = GenlmsghdrBuilder::default()
            .cmd(CtrlCmd::Getfamily)
            .version(2)
            .attrs([name].into_iter().collect::<GenlBuffer<_, _>>())
            .build()
            .map_err(protocol)?;
        let message = NlmsghdrBuilder::default()
            .nl_type(GenlId::Ctrl)
            .nl_flags(NlmF::REQUEST)
            .nl_payload(NlPayload::Payload(body))
            .build()
            .map_err(protocol)?;
        socket.send(&message).map_err(protocol)?;
        let (answers, _) = socket.recv_all::<u16, Genlmsghdr<CtrlCmd, CtrlAttr>>().map_err(protocol)?;
        let answer = answers.iter().next().ok_or_else(|| protocol("no message"))?;
        let body = match answer.nl_payload() {
            NlPayload::Payload(body) => body,
            _ => return Err(NetlinkError::NoFamily),
        };
        let attrs = body.attrs().get_attr_handle();
        let id = attrs.get_attr_payload_as::<u16>(CtrlAttr::FamilyId).map_err(protocol)?;
        let groups = attrs.get_nested_attributes::<Index>(CtrlAttr::McastGroups).map_err(protocol)?;
        for group in groups.iter() {
            let group = group.get_attr_handle::<CtrlAttrMcastGrp>().map_err(protocol)?;
            let name =
                group.get_attr_payload_as_with_len::<String>(CtrlAttrMcastGrp::Name).map_err(protocol)?;
            if name == GROUP {
                let group = group.get_attr_payload_as::<u32>(CtrlAttrMcastGrp::Id).map_err(protocol)?;
                return Ok(Family { id, group });
            }
        }
        Err(protocol(format!("the family has no group {GROUP}")))
    }

    /// How many sockets of this network namespace hear the kernel's events, our own among them. `None` where /proc does not tell.
    pub fn listeners(&self) -> Option<usize> {
        listeners_in(&std::fs::read_to_string(LISTENERS).ok()?, self.group)
    }
}

/// Netlink's sockets: protocol in the second column, a bit for each of the first 32 groups in the fourth (`netlink_native_seq_show`).
const LISTENERS: &str = "/proc/self/net/netlink";
/// NETLINK_GENERIC.
const GENERIC: &str = "16";

fn listeners_in(table: &str, group: u32) -> Option<usize> {
    let bit = 1u32.checked_shl(group.checked_sub(1)?)?;
    let hears = |line: &&str| {
        let mut words = line.split_whitespace().skip(1);
        let generic = words.next() == Some(GENERIC);
        let groups = words.nth(1).and_then(|w| u32::from_str_radix(w, 16).ok());
        generic && groups.is_some_and(|groups| groups & bit != 0)
    };
    Some(table.lines().filter(hears).count())
}

fn request_socket() -> Result<NlSocketHandle, NetlinkError> {
    let socket = NlSocketHandle::connect(NlFamily::Generic, None, Groups::empty()).map_err(protocol)?;
    receive_timeout(&socket, Duration::from_secs(5)).map_err(|e| NetlinkError::Io("receive timeout", e))?;
    Ok(socket)
}

fn attr<T, P>(kind: T, value: P) -> Result<Nlattr<T, Buffer>, NetlinkError>
where
    T: neli::consts::genl::NlAttrType + neli::Size,
    P: neli::Size + neli::ToBytes,
{
    let kind = AttrTypeBuilder::default().nla_type(kind).build().map_err(protocol)?;
    NlattrBuilder::default().nla_type(kind).nla_payload(value).build().map_err(protocol)
}

fn request(
    family: u16,
    seq: u32,
    cmd: Command,
    attrs: Vec<Nlattr<Attr, Buffer>>,
) -> Result<Message, NetlinkError> {
    let body = GenlmsghdrBuilder::default()
        .cmd(cmd)
        .version(VERSION)
        .attrs(attrs.into_iter().collect::<GenlBuffer<_, _>>())
        .build()
        .map_err(protocol)?;
    NlmsghdrBuilder::default()
        .nl_type(family)
        .nl_flags(NlmF::REQUEST | NlmF::ACK)
        .nl_seq(seq)
        .nl_payload(NlPayload::Payload(body))
        .build()
        .map_err(protocol)
}

/// Who takes answers: the kernel, or a test.
pub trait Answers: Send + Sync {
    /// Ends the kernel's wait: `status` is 0 or a negative errno.
    ///
    /// # Errors
    /// [`NetlinkError::Refused`] with ENODEV if the kernel doesn't wait for that device any more.
    fn done(&self, kind: Kind, device_id: u32, status: i32) -> Result<(), NetlinkError>;
}

/// The socket that answers the kernel.
pub struct Replies {
    family: u16,
    socket: Mutex<(NlSocketHandle, u32)>,
}

impl Replies {
    /// A socket for answers.
    ///
    /// # Errors
    /// The kernel's.
    pub fn new(family: &Family) -> Result<Replies, NetlinkError> {
        Ok(Replies { family: family.id, socket: Mutex::new((request_socket()?, 0)) })
    }

    /// Tells the kernel that somebody answers its events from now on (SET_FEATURES).
    ///
    /// # Errors
    /// The kernel's.
    pub fn announce(&self) -> Result<(), NetlinkError> {
        self.call("the announcement", Command::SetFeatures, vec![attr(Attr::SuppKernCmdReply, 1u8)?])
    }

    fn call(
        &self,
        what: &'static str,
        cmd: Command,
        attrs: Vec<Nlattr<Attr, Buffer>>,
    ) -> Result<(), NetlinkError> {
        let mut guard = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        let (socket, seq) = &mut *guard;
        *seq = seq.wrapping_add(1);
        socket.send(&request(self.family, *seq, cmd, attrs)?).map_err(protocol)?;
        // An answer to an earlier request that timed out may still come first.
        for _ in 0..16 {
            let (answers, _) = socket.recv_all::<u16, Buffer>().map_err(protocol)?;
            for answer in answers.iter().filter(|a| a.nl_seq() == seq) {
                match answer.nl_payload() {
                    NlPayload::Ack(_) => return Ok(()),
                    NlPayload::Err(e) => {
                        let error = io::Error::from_raw_os_error(e.error().saturating_neg());
                        return Err(NetlinkError::Refused(what, error));
                    }
                    _ if *answer.nl_type() == u16::from(Nlmsg::Noop) => {}
                    _ => return Err(protocol("neither an acknowledgement nor an error")),
                }
            }
        }
        Err(protocol("no acknowledgement"))
    }
}

impl Answers for Replies {
    fn done(&self, kind: Kind, device_id: u32, status: i32) -> Result<(), NetlinkError> {
        let cmd = match kind {
            Kind::Added => Command::AddedDone,
            Kind::Removed => Command::RemovedDone,
            Kind::Reconfig => Command::ReconfigDone,
        };
        let attrs = vec![attr(Attr::CmdStatus, status)?, attr(Attr::DeviceId, device_id)?];
        self.call("the answer to an event", cmd, attrs)
    }
}

/// An event that the kernel waits on: answered exactly once, by whoever is first, and with EIO if it is dropped.
#[derive(Clone)]
pub struct Pending(Arc<PendingInner>);

struct PendingInner {
    answers: Arc<dyn Answers>,
    kind: Kind,
    device_id: u32,
    answered: AtomicBool,
}

impl Pending {
    /// The answer that an event asks for.
    pub fn new(answers: Arc<dyn Answers>, kind: Kind, device_id: u32) -> Pending {
        Pending(Arc::new(PendingInner { answers, kind, device_id, answered: AtomicBool::new(false) }))
    }

    /// Answers 0 or a negative errno, unless that was done.
    pub fn answer(&self, status: i32) {
        self.0.answer(status);
    }

    /// Lets it be: the kernel doesn't wait for this device.
    pub fn forgo(&self) {
        self.0.answered.store(true, Ordering::Release);
    }

    /// Whether it was answered.
    pub fn answered(&self) -> bool {
        self.0.answered.load(Ordering::Acquire)
    }
}

impl PendingInner {
    fn answer(&self, status: i32) {
        if self.answered.swap(true, Ordering::AcqRel) {
            return;
        }
        match self.answers.done(self.kind, self.device_id, status) {
            Ok(()) => {}
            // Somebody else answered first, or the device doesn't want answers.
            Err(NetlinkError::Refused(_, e)) if e.raw_os_error() == Some(libc::ENODEV) => {
                tracing::debug!(kind = ?self.kind, device_id = self.device_id, "nobody waits for this answer");
            }
            Err(e) => tracing::error!(kind = ?self.kind, device_id = self.device_id, "{e}"),
        }
    }
}

impl Drop for PendingInner {
    fn drop(&mut self) {
        self.answer(-libc::EIO);
    }
}

#[cfg(test)]
#[path = "netlink_tests.rs"]
mod tests;
