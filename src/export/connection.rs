//! One client: the handshake, and its requests, of which a few are worked on side by side.
//!
//! A client may be slow, silent or hostile: its messages are bounded and checked, it has memory for as many requests as there are workers, and a
//! reply that it does not take ends it.

use std::{
    io::{self, Read, Write},
    path::Path,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, sync_channel},
    },
};

use super::{
    Export, Shared,
    contexts::{self, Context},
    server::{PATIENCE, Socket},
    wire::Wire,
};
use crate::{
    lun::LunError,
    nbd::{
        Broken, DEFAULT_MAX_PAYLOAD, answer, chunk, command, error, export, flag,
        handshake::{self, BlockSizes, MAX_DATA, OPTION_HEAD_LEN},
        info, option,
        reply::{chunk_head, simple},
        request::{LEN, Request},
    },
    scsi::{
        neighbour::{Answer, Errand, Undone},
        sense::{Asc, Failure, SenseKey},
    },
    units::{BlockSize, Lba},
};

/// Requests of one client that are worked on at a time.
const WORKERS: usize = 4;
/// Options that a client may send.
const MAX_OPTIONS: usize = 256;
/// Bytes that the LUN is asked for at once: other commands get their turn between.
const PIECE: u64 = 1 << 20;
/// Payload that a client should send or ask for at once.
const MAX_PAYLOAD: u32 = 4 << 20;

fn broken(e: Broken) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, e)
}

fn array<const N: usize>(from: &mut Wire) -> io::Result<[u8; N]> {
    let mut out = [0; N];
    from.read_exact(&mut out)?;
    Ok(out)
}

/// Serves a client to its end; one without TLS not at all, if there are certificates.
///
/// # Errors
/// Why it has ended, if it did not say goodbye.
pub(super) fn serve(
    shared: &Shared,
    client: u64,
    socket: &Socket,
    certificates: Option<&Path>,
) -> io::Result<()> {
    socket.write_within(Some(PATIENCE))?;
    // Of each message; those of a client that sends byte after byte are few.
    socket.read_within(Some(PATIENCE))?;
    let mut wire = Wire::Plain(socket.try_clone()?);
    let Some(agreed) = shake_hands(shared, client, &mut wire, certificates)? else {
        wire.say_goodbye();
        return Ok(());
    };
    wire.read_within(None)?;
    tracing::info!(export = %agreed.export.name, lun = %agreed.export.device, "an NBD client has come");
    let served = transmit(&agreed, &mut wire, socket);
    wire.say_goodbye();
    tracing::info!(export = %agreed.export.name, lun = %agreed.export.device, "an NBD client has gone");
    served
}

/// What client and server have agreed on.
struct Agreed {
    export: Export,
    block_size: BlockSize,
    size: u64,
    structured: bool,
    /// What it wants to know of blocks.
    contexts: Vec<Context>,
}

const NO_SUCH_EXPORT: &str = "no such export";

/// An export, and what it is as the LUN says; or why there is none.
fn look_up(shared: &Shared, name: &str) -> Result<(Export, (BlockSize, u64)), String> {
    let export = shared.find(name).ok_or(NO_SUCH_EXPORT)?;
    match export.lun.order(Errand::Describe) {
        Ok(Ok(Answer::Described { block_size, blocks })) => {
            Ok((export, (block_size, blocks * block_size.bytes())))
        }
        Err(e @ LunError::Job(_)) => Err(e.to_string()),
        _ => Err(NO_SUCH_EXPORT.into()),
    }
}

fn flags(export: &Export) -> u16 {
    let always =
        export::HAS_FLAGS | export::SEND_FLUSH | export::SEND_FUA | export::SEND_DF | export::CAN_MULTI_CONN;
    match export.writable {
        true => always | export::SEND_TRIM | export::SEND_WRITE_ZEROES,
        false => always | export::READ_ONLY,
    }
}

fn shake_hands(
    shared: &Shared,
    client: u64,
    socket: &mut Wire,
    certificates: Option<&Path>,
) -> io::Result<Option<Agreed>> {
    socket.write_all(&handshake::greeting(flag::FIXED_NEWSTYLE | flag::NO_ZEROES))?;
    let theirs = u32::from_be_bytes(array(socket)?);
    if theirs & !u32::from(flag::FIXED_NEWSTYLE | flag::NO_ZEROES) != 0 {
        return Err(broken(Broken::new(format!("client flags {theirs:#x}"))));
    }
    let (mut structured, mut chosen) = (false, None::<(Export, Vec<Context>)>);
    for _ in 0..MAX_OPTIONS {
        let (number, len) =
            handshake::parse_option_head(&array::<OPTION_HEAD_LEN>(socket)?).map_err(broken)?;
        if len > MAX_DATA {
            return Err(broken(Broken::new(format!("an option of {len} bytes"))));
        }
        let mut data = vec![0; len as usize];
        socket.read_exact(&mut data)?;
        let waits_for_tls = certificates.is_some() && !socket.has_tls();
        let mut say = |kind: u32, data: &[u8]| socket.write_all(&handshake::answer(number, kind, data));
        match number {
            option::STARTTLS if !data.is_empty() => say(answer::ERR_INVALID, b"this option has no data")?,
            option::STARTTLS => match certificates {
                None => say(answer::ERR_POLICY, b"this server has no certificates for TLS")?,
                Some(_) if !waits_for_tls => say(answer::ERR_INVALID, b"TLS has begun already")?,
                Some(dir) => {
                    say(answer::ACK, &[])?;
                    socket.start_tls(dir)?;
                }
            },
            // proto.md, FORCEDTLS: without it nothing is told, and an old client hears nothing at all.
            option::EXPORT_NAME if waits_for_tls => return Ok(None),
            _ if waits_for_tls && number != option::ABORT => {
                say(answer::ERR_TLS_REQD, b"this server wants TLS first")?;
            }
            option::ABORT => {
                say(answer::ACK, &[])?;
                return Ok(None);
            }
            option::LIST if data.is_empty() => {
                for (name, description) in shared.list() {
                    let mut server = (name.len() as u32).to_be_bytes().to_vec();
                    server.extend(name.as_bytes());
                    server.extend(description.as_bytes());
                    say(answer::SERVER, &server)?;
                }
                say(answer::ACK, &[])?;
            }
            option::STRUCTURED_REPLY if data.is_empty() => {
                structured = true;
                say(answer::ACK, &[])?;
            }
            option::LIST | option::STRUCTURED_REPLY => say(answer::ERR_INVALID, b"this option has no data")?,
            option::SET_META_CONTEXT | option::LIST_META_CONTEXT => {
                let set = number == option::SET_META_CONTEXT;
                if set {
                    chosen = None;
                }
                match handshake::parse_contexts(&data) {
                    Err(e) => say(answer::ERR_INVALID, e.to_string().as_bytes())?,
                    Ok(_) if !structured => say(answer::ERR_INVALID, b"ask for structured replies first")?,
                    Ok((name, queries)) => match shared.find(&name) {
                        None => say(answer::ERR_UNKNOWN, NO_SUCH_EXPORT.as_bytes())?,
                        Some(export) => {
                            let contexts = Context::asked(&export, &queries, !set);
                            for context in &contexts {
                                let told = handshake::context(context.number(), &context.name(&export));
                                say(answer::META_CONTEXT, &told)?;
                            }
                            chosen = set.then_some((export, contexts));
                            say(answer::ACK, &[])?;
                        }
                    },
                }
            }
            option::INFO | option::GO => {
                let asked = match handshake::parse_go(&data) {
                    Ok(asked) => asked,
                    Err(e) => {
                        say(answer::ERR_INVALID, e.to_string().as_bytes())?;
                        continue;
                    }
                };
                let (export, (block_size, size)) = match look_up(shared, &asked.0) {
                    Ok(found) => found,
                    Err(why) => {
                        say(answer::ERR_UNKNOWN, why.as_bytes())?;
                        continue;
                    }
                };
                say(answer::INFO, &handshake::Export { size, flags: flags(&export) }.to_info())?;
                if asked.1.contains(&info::BLOCK_SIZE) {
                    let minimum = block_size.bytes() as u32;
                    let sizes = BlockSizes { minimum, preferred: minimum.max(4096), maximum: MAX_PAYLOAD };
                    say(answer::INFO, &sizes.to_info())?;
                }
                if number == option::GO {
                    // Before it hears of it, so that nobody ends the export in between.
                    shared.clients.uses(client, &export.id);
                }
                say(answer::ACK, &[])?;
                if number == option::GO {
                    let contexts = of_export(chosen, &export);
                    return Ok(begun(shared, Agreed { export, block_size, size, structured, contexts }));
                }
            }
            option::EXPORT_NAME => {
                let found = std::str::from_utf8(&data).ok().map(|name| look_up(shared, name));
                // There is no way to say no but to hang up.
                let Some(Ok((export, (block_size, size)))) = found else { return Ok(None) };
                shared.clients.uses(client, &export.id);
                socket.write_all(&handshake::Export { size, flags: flags(&export) }.to_info()[2..])?;
                if theirs & u32::from(flag::NO_ZEROES) == 0 {
                    socket.write_all(&[0; 124])?;
                }
                let contexts = of_export(chosen, &export);
                return Ok(begun(shared, Agreed { export, block_size, size, structured, contexts }));
            }
            _ => say(answer::ERR_UNSUP, &[])?,
        }
    }
    Err(broken(Broken::new(format!("more than {MAX_OPTIONS} options"))))
}

/// What a client has chosen, if it was of that export: another that has come under its name has other bitmaps.
fn of_export(chosen: Option<(Export, Vec<Context>)>, export: &Export) -> Vec<Context> {
    let same = chosen.filter(|(of, _)| of.lun.is_same(&export.lun));
    same.map(|(_, contexts)| contexts).unwrap_or_default()
}

/// The client is one of that export's from now on, if that is there still.
fn begun(shared: &Shared, agreed: Agreed) -> Option<Agreed> {
    shared.has(&agreed.export.id).then_some(agreed)
}

/// A request and the data of a write.
type Work = (Request, Vec<u8>);

fn transmit(agreed: &Agreed, wire: &mut Wire, socket: &Socket) -> io::Result<()> {
    let out = Mutex::new(wire.writer()?);
    let over = AtomicBool::new(false);
    // A request is read when one of those that work can take it soon.
    let (give, take) = sync_channel::<Work>(1);
    let take = Mutex::new(take);
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| work(agreed, &take, &out, socket, &over));
        }
        let read = loop {
            let request = match next(agreed, wire) {
                Ok(Some(work)) => work,
                Ok(None) => break Ok(()),
                Err(e) => break Err(e),
            };
            if over.load(Ordering::Acquire) || give.send(request).is_err() {
                break Ok(());
            }
        };
        // Those who work end when there is no more to do.
        drop(give);
        read
    })
}

/// The next request with its data; `None` if the client goes.
fn next(agreed: &Agreed, socket: &mut Wire) -> io::Result<Option<Work>> {
    let request = Request::parse(&array::<LEN>(socket)?).map_err(broken)?;
    if request.kind == command::DISCONNECT {
        return Ok(None);
    }
    let mut data = Vec::new();
    if request.kind == command::WRITE {
        if request.length > DEFAULT_MAX_PAYLOAD {
            return Err(broken(Broken::new(format!("a write of {} bytes", request.length))));
        }
        // Read also if it is refused: what comes after it is a request.
        data.resize(request.length as usize, 0);
        socket.read_exact(&mut data)?;
    }
    tracing::trace!(lun = %agreed.export.device, ?request, "NBD");
    Ok(Some((request, data)))
}

fn work(
    agreed: &Agreed,
    take: &Mutex<Receiver<Work>>,
    out: &Mutex<Box<dyn Write + Send>>,
    socket: &Socket,
    over: &AtomicBool,
) {
    loop {
        let next = take.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok((request, data)) = next else { return };
        let reply = match execute(agreed, &request, &data) {
            Ok(done) => done.to_bytes(&request, agreed.structured),
            Err(refused) => refused.to_bytes(&request, agreed.structured),
        };
        let mut out = out.lock().unwrap_or_else(PoisonError::into_inner);
        if out.write_all(&reply).is_err() {
            over.store(true, Ordering::Release);
            // Whoever reads from it is woken.
            socket.end();
        }
    }
}

/// The extents of a context, by its number: bytes and flags.
type Status = (u32, Vec<(u32, u32)>);

/// What came of a request.
enum Done {
    Plain,
    Data(Vec<u8>),
    Extents(Vec<Status>),
}

/// An error number of NBD's, and why.
struct Refused(u32, String);

fn invalid<T>(why: &str) -> Result<T, Refused> {
    Err(Refused(error::EINVAL, why.to_owned()))
}

impl Done {
    fn to_bytes(&self, request: &Request, structured: bool) -> Vec<u8> {
        match self {
            Done::Plain => simple(0, request.cookie).to_vec(),
            Done::Data(data) if !structured => [&simple(0, request.cookie)[..], data].concat(),
            Done::Data(data) => {
                let head = chunk_head(chunk::DONE, chunk::OFFSET_DATA, request.cookie, 8 + data.len() as u32);
                [&head[..], &request.offset.to_be_bytes(), data].concat()
            }
            Done::Extents(all) => {
                let mut out = Vec::new();
                for (i, (context, extents)) in all.iter().enumerate() {
                    let flags = if i + 1 == all.len() { chunk::DONE } else { 0 };
                    let len = 4 + 8 * extents.len() as u32;
                    out.extend(chunk_head(flags, chunk::BLOCK_STATUS, request.cookie, len));
                    out.extend(context.to_be_bytes());
                    for (len, flags) in extents {
                        out.extend([len.to_be_bytes(), flags.to_be_bytes()].concat());
                    }
                }
                out
            }
        }
    }
}

impl Refused {
    fn to_bytes(&self, request: &Request, structured: bool) -> Vec<u8> {
        if !structured {
            return simple(self.0, request.cookie).to_vec();
        }
        let words = self.1.as_bytes();
        let mut out = chunk_head(chunk::DONE, chunk::ERROR, request.cookie, 6 + words.len() as u32).to_vec();
        out.extend(self.0.to_be_bytes());
        out.extend((words.len() as u16).to_be_bytes());
        out.extend(words);
        out
    }
}

/// Has the LUN do something, and says in NBD's words why not.
fn order(agreed: &Agreed, errand: Errand) -> Result<Answer, Refused> {
    match agreed.export.lun.order(errand) {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(Undone::Failed(failure))) => Err(Refused(number(&failure), told(&failure))),
        Ok(Err(Undone::Unreachable)) => Err(undone(LunError::Gone(String::new()))),
        Err(e) => Err(undone(e)),
    }
}

fn undone(e: LunError) -> Refused {
    match e {
        LunError::Gone(_) => Refused(error::ESHUTDOWN, "the LUN is being removed".into()),
        e => Refused(error::EIO, e.to_string()),
    }
}

fn told(failure: &Failure) -> String {
    match failure {
        Failure::Sense(sense) => format!("the LUN says {}", sense.codes()),
        Failure::Status(status) => format!("the LUN says {status:?}"),
    }
}

fn number(failure: &Failure) -> u32 {
    match failure {
        Failure::Sense(sense) if sense.asc == Asc::SPACE_ALLOCATION_FAILED => error::ENOSPC,
        Failure::Sense(sense) if sense.key == SenseKey::DataProtect => error::EPERM,
        Failure::Sense(sense) if sense.key == SenseKey::IllegalRequest => error::EINVAL,
        _ => error::EIO,
    }
}

fn execute(agreed: &Agreed, request: &Request, data: &[u8]) -> Result<Done, Refused> {
    let (at, len) = (request.offset, u64::from(request.length));
    let writes = matches!(request.kind, command::WRITE | command::WRITE_ZEROES | command::TRIM);
    if writes && !agreed.export.writable {
        return Err(Refused(error::EPERM, "the export is read-only".into()));
    }
    if request.kind == command::FLUSH {
        order(agreed, Errand::Flush)?;
        return Ok(Done::Plain);
    }
    if len == 0 || (at | len) & (agreed.block_size.bytes() - 1) != 0 {
        return invalid("not in whole blocks");
    }
    if at.checked_add(len).is_none_or(|end| end > agreed.size) {
        let past = if writes { error::ENOSPC } else { error::EINVAL };
        return Err(Refused(past, "beyond the end".into()));
    }
    let lba = |at: u64| Lba(at >> agreed.block_size.shift());
    let blocks = |len: u64| len >> agreed.block_size.shift();
    let pieces = (0..len).step_by(PIECE as usize).map(|done| (done, PIECE.min(len - done)));
    match request.kind {
        command::READ => {
            if request.length > DEFAULT_MAX_PAYLOAD {
                return invalid("more than 32 MiB at once");
            }
            let mut out = Vec::with_capacity(len as usize);
            for (done, n) in pieces {
                match order(agreed, Errand::Read { lba: lba(at + done), blocks: blocks(n) })? {
                    Answer::Data(data, _) if data.len() as u64 == n => out.extend(data),
                    _ => return Err(Refused(error::EIO, "the LUN gave something else".into())),
                }
            }
            return Ok(Done::Data(out));
        }
        command::WRITE => {
            for (done, n) in pieces {
                let data = data[done as usize..(done + n) as usize].to_vec();
                order(agreed, Errand::Write { lba: lba(at + done), data, along: None })?;
            }
        }
        command::WRITE_ZEROES | command::TRIM => {
            if request.flags & command::FAST_ZERO != 0 {
                return Err(Refused(error::ENOTSUP, "FAST_ZERO was not offered".into()));
            }
            let may_unmap = request.kind == command::TRIM || request.flags & command::NO_HOLE == 0;
            order(agreed, Errand::Zero { lba: lba(at), blocks: blocks(len), may_unmap })?;
        }
        command::BLOCK_STATUS if !agreed.contexts.is_empty() => {
            let one = request.flags & command::REQUEST_ONE != 0;
            return status(agreed, (at, len), (lba(at), blocks(len)), one).map(Done::Extents);
        }
        _ => return invalid("no such command, or not agreed on"),
    }
    if request.flags & command::FUA != 0 {
        order(agreed, Errand::Flush)?;
    }
    Ok(Done::Plain)
}

/// The extents of each context that was agreed on.
fn status(
    agreed: &Agreed,
    (at, len): (u64, u64),
    (lba, blocks): (Lba, u64),
    one: bool,
) -> Result<Vec<Status>, Refused> {
    let (mut map, mut all) = (None, Vec::new());
    for context in &agreed.contexts {
        let extents = if let Context::Dirty(which) = context {
            let marks = agreed.export.lun.marked(*which, at, len).map_err(undone)?;
            contexts::extents(marks.into_iter().map(contexts::of_marks), len, one)
        } else {
            // One question for all that it answers.
            let runs = match &mut map {
                Some(runs) => runs,
                none => match order(agreed, Errand::Map { lba, blocks })? {
                    Answer::Mapped(runs) => none.insert(runs),
                    _ => return Err(Refused(error::EIO, "the LUN gave something else".into())),
                },
            };
            contexts::extents(runs.iter().map(|run| context.of_run(*run)), len, one)
        };
        if extents.is_empty() {
            return Err(Refused(error::EIO, "the LUN's map leaves it out".into()));
        }
        all.push((context.number(), extents));
    }
    Ok(all)
}
