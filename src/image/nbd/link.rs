//! One connection to a server: the handshake, and messages in and out. Called by the session.

use std::{io, path::PathBuf, time::Duration};

use super::channel::{Channel, Secure};
use crate::{
    nbd::{
        BASE_ALLOCATION, Broken, answer, command, export, flag,
        handshake::{self, ANSWER_HEAD_LEN, BlockSizes, Export, GREETING_LEN},
        option, printable,
        reply::{CHUNK_REST_LEN, HEAD_LEN, Head},
        request::Request,
        uri::{Place, Uri},
    },
    sys::{
        exec::race,
        io::{Io, net::Stream},
        mem::{Buffer, Sg},
    },
    tls::{self, TlsError},
};

/// How long a connection and its handshake may take.
pub(super) const HANDSHAKE: Duration = Duration::from_secs(10);

/// Answers to one option at most.
const MAX_ANSWERS: usize = 64;

/// Bytes that are received at once where a small message is expected: what of the data of a read comes with its head is copied, the rest
/// goes where it belongs.
const BUFFER: usize = 1024;

/// Why there is no connection, or no more.
#[derive(Debug, thiserror::Error)]
pub(super) enum LinkError {
    /// The host has no address, or nobody is there, or the connection ended.
    #[error("{0}")]
    Io(io::Error),
    /// There is no TLS with it.
    #[error("{0}")]
    Tls(TlsError),
    /// It sent what it may not.
    #[error("the server broke the protocol: {0}")]
    Broken(#[from] Broken),
    /// It will not serve that export, or not this way: to ask again does not help.
    #[error("{0}")]
    Refused(String),
    /// It is another export than before, in this.
    #[error("the export is another than before: {0}")]
    Changed(String),
    /// It says nothing.
    #[error("the server has not answered for {} seconds", .0.as_secs())]
    Silent(Duration),
    /// It says that it goes.
    #[error("the server is shutting down")]
    ShuttingDown,
}

impl From<io::Error> for LinkError {
    fn from(e: io::Error) -> LinkError {
        match TlsError::of(&e) {
            Some(tls) => LinkError::Tls(tls.clone()),
            None => LinkError::Io(e),
        }
    }
}

/// What was agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Terms {
    /// Size and flags.
    pub export: Export,
    /// Block size constraints.
    pub sizes: BlockSizes,
    /// Replies come in chunks.
    pub structured: bool,
    /// The number of `base:allocation`.
    pub allocation: Option<u32>,
}

impl Terms {
    /// Whether the server says of its export that it can do that.
    pub fn has(&self, flag: u16) -> bool {
        self.export.flags & flag != 0
    }

    /// In what another look at the export differs from this one, of all that LUNs are built on.
    pub fn difference(&self, now: &Terms) -> Option<String> {
        // Whether several connections are in step is asked anew each time.
        let flags = |t: &Terms| t.export.flags & !export::CAN_MULTI_CONN;
        if self.export.size != now.export.size {
            return Some(format!("{} bytes and not {}", now.export.size, self.export.size));
        }
        if flags(self) != flags(now) {
            return Some(format!("flags {:#x} and not {:#x}", now.export.flags, self.export.flags));
        }
        let (a, b) = (self.sizes, now.sizes);
        if (a.minimum, a.maximum) != (b.minimum, b.maximum) {
            return Some(format!(
                "blocks of {} to {} bytes and not {} to {}",
                b.minimum, b.maximum, a.minimum, a.maximum
            ));
        }
        if self.allocation.is_some() && now.allocation.is_none() {
            return Some("no map of what is allocated any more".to_owned());
        }
        (self.structured && !now.structured).then(|| "no structured replies any more".to_owned())
    }
}

/// A connection after its handshake.
pub(super) struct Link {
    channel: Channel,
    buffer: Buffer,
    /// What of the buffer was received and is not used yet.
    unread: std::ops::Range<usize>,
    structured: bool,
}

impl Link {
    /// Connects and agrees on an export.
    ///
    /// # Errors
    /// A [`LinkError`].
    pub async fn open(io: &Io, uri: &Uri) -> Result<(Link, Terms), LinkError> {
        let silent = async {
            io.sleep(HANDSHAKE).await;
            Err(LinkError::Silent(HANDSHAKE))
        };
        race(Link::shake_hands(io, uri), silent).await
    }

    async fn shake_hands(io: &Io, uri: &Uri) -> Result<(Link, Terms), LinkError> {
        // Looked at before there is a connection, and anew for each.
        let certificates = match &uri.tls {
            None => None,
            Some(tls) => {
                let dir = tls.certificates.clone().unwrap_or_else(|| PathBuf::from(tls::DIRECTORY));
                let name = uri.tls_name(tls).to_owned();
                let read = io.blocking(move || tls::Client::read(&dir, &name)).await?;
                Some(read.map_err(LinkError::Tls)?)
            }
        };
        let stream = match &uri.place {
            Place::Unix(path) => Stream::unix(io, path).await?,
            Place::Tcp { host, port } => tcp(io, host, *port).await?,
        };
        let channel = Channel::Plain(stream);
        let mut link = Link { channel, buffer: Buffer::zeroed(BUFFER), unread: 0..0, structured: false };
        let flags = handshake::parse_greeting(&link.array::<GREETING_LEN>().await?)?;
        if flags & flag::FIXED_NEWSTYLE == 0 {
            return Err(LinkError::Refused("the server does not speak fixed newstyle NBD".into()));
        }
        let ours = flags & (flag::FIXED_NEWSTYLE | flag::NO_ZEROES);
        link.send(&u32::from(ours).to_be_bytes()).await?;
        if let Some(certificates) = certificates {
            link = link.start_tls(&certificates).await?;
        }
        let asked = link.ask(option::STRUCTURED_REPLY, &[], |_, _| Ok(())).await;
        link.structured = asked.map_err(|e| link.first_of_tls(e))?.is_ok();
        let mut allocation = None;
        if link.structured {
            let wanted = handshake::contexts(&uri.export, &[BASE_ALLOCATION]);
            let asked = link.ask(option::SET_META_CONTEXT, &wanted, |kind, data| {
                if kind == answer::META_CONTEXT {
                    allocation = allocation.or(handshake::parse_context(data)?);
                }
                Ok(())
            });
            if asked.await?.is_err() {
                allocation = None;
            }
        }
        let (mut told, mut sizes) = (None, BlockSizes::default());
        let wanted = handshake::go(&uri.export, &[crate::nbd::info::BLOCK_SIZE]);
        let gone = link.ask(option::GO, &wanted, |kind, data| match kind {
            answer::INFO => handshake::parse_info(data, &mut told, &mut sizes),
            _ => Ok(()),
        });
        match gone.await? {
            Ok(()) => {}
            Err((answer::ERR_UNSUP, _)) => told = Some(link.export_name(&uri.export, ours).await?),
            Err((answer::ERR_SHUTDOWN, _)) => return Err(LinkError::ShuttingDown),
            Err((kind, words)) => return Err(LinkError::Refused(refusal(&uri.export, kind, &words))),
        }
        let Some(export) = told else {
            return Err(Broken::new("the server did not say how large the export is").into());
        };
        let terms = Terms { export, sizes, structured: link.structured, allocation };
        Ok((link, terms))
    }

    /// Has everything encrypted from here on; a server that will not is not spoken to.
    async fn start_tls(mut self, with: &tls::Client) -> Result<Link, LinkError> {
        if let Err((kind, words)) = self.ask(option::STARTTLS, &[], |_, _| Ok(())).await? {
            let why = if words.is_empty() { format!("error {}", kind & !answer::ERROR) } else { words };
            return Err(LinkError::Tls(TlsError::new(
                format!("the server does no TLS ({why}), and without it nothing is sent"),
                "have the server do TLS; or, where the way there is safe, name it nbd:// and not nbds://",
            )));
        }
        // Nothing that came in the clear counts as if it had come over TLS.
        if !self.unread.is_empty() {
            return Err(Broken::new("it goes on in the clear when TLS is to begin").into());
        }
        let Link { channel: Channel::Plain(stream), buffer, unread, structured } = self else {
            return Err(Broken::new("TLS has begun already").into());
        };
        let channel = Channel::Tls(Box::new(Secure::begin(stream, with).await?));
        Ok(Link { channel, buffer, unread, structured })
    }

    /// What a server that does not take our certificate does, since with TLS 1.3 it sees it when the handshake is over here: it hangs up.
    fn first_of_tls(&self, e: LinkError) -> LinkError {
        use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
        match (&self.channel, e) {
            (Channel::Tls(secure), LinkError::Io(e))
                if matches!(e.kind(), BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof) =>
            {
                LinkError::Tls(tls::hung_up(secure.session().dir()))
            }
            (_, e) => e,
        }
    }

    /// Sends an option and hands its answers on, up to the last: ACK, or an error with the server's words.
    async fn ask(
        &mut self,
        number: u32,
        data: &[u8],
        mut hear: impl FnMut(u32, &[u8]) -> Result<(), Broken>,
    ) -> Result<Result<(), (u32, String)>, LinkError> {
        self.send(&handshake::option(number, data)).await?;
        for _ in 0..MAX_ANSWERS {
            let (kind, len) = handshake::parse_answer_head(&self.array::<ANSWER_HEAD_LEN>().await?, number)?;
            let data = self.bytes(len as usize).await?;
            match kind {
                answer::ACK => return Ok(Ok(())),
                kind if kind & answer::ERROR != 0 => return Ok(Err((kind, printable(&data)))),
                kind => hear(kind, &data)?,
            }
        }
        Err(Broken::new(format!("more than {MAX_ANSWERS} answers to option {number}")).into())
    }

    /// How a server from before NBD_OPT_GO is asked; it hangs up if there is no such export.
    async fn export_name(&mut self, name: &str, flags: u16) -> Result<Export, LinkError> {
        self.send(&handshake::option(option::EXPORT_NAME, name.as_bytes())).await?;
        let told = self.array::<10>().await?;
        let mut size = [0; 8];
        size.copy_from_slice(&told[..8]);
        let size = u64::from_be_bytes(size);
        if i64::try_from(size).is_err() {
            return Err(Broken::new(format!("an export of {size} bytes")).into());
        }
        if flags & flag::NO_ZEROES == 0 {
            self.bytes(124).await?;
        }
        Ok(Export { size, flags: u16::from_be_bytes([told[8], told[9]]) })
    }

    async fn send(&self, bytes: &[u8]) -> io::Result<()> {
        self.channel.send(&Buffer::from_slice(bytes).sg()).await
    }

    async fn array<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut out = [0; N];
        self.receiving().take(&mut out).await?;
        Ok(out)
    }

    async fn bytes(&mut self, len: usize) -> io::Result<Vec<u8>> {
        self.receiving().bytes(len).await
    }

    fn receiving(&mut self) -> Receiving<'_> {
        Receiving {
            channel: &self.channel,
            buffer: &self.buffer,
            unread: &mut self.unread,
            structured: self.structured,
        }
    }

    /// The two directions of the connection, to be used side by side.
    pub fn split(&mut self) -> (Receiving<'_>, &Channel) {
        let Link { channel, buffer, unread, structured } = self;
        (Receiving { channel, buffer, unread, structured: *structured }, channel)
    }

    /// Says that nothing more comes, as far as that goes without waiting.
    pub fn say_goodbye(&self) {
        let request = Request { flags: 0, kind: command::DISCONNECT, cookie: 0, offset: 0, length: 0 };
        self.channel.end_with(&Buffer::from_slice(&request.to_bytes()).sg());
    }
}

/// The receiving direction.
pub(super) struct Receiving<'a> {
    channel: &'a Channel,
    buffer: &'a Buffer,
    unread: &'a mut std::ops::Range<usize>,
    structured: bool,
}

impl Receiving<'_> {
    /// Whether replies may come in chunks.
    pub fn structured(&self) -> bool {
        self.structured
    }

    /// The next reply's head, with the length of its payload if it is a chunk.
    ///
    /// # Errors
    /// That the connection has ended, or that this is no reply.
    pub async fn head(&mut self) -> Result<(Head, u32), LinkError> {
        let mut bytes = [0; HEAD_LEN];
        self.take(&mut bytes).await?;
        let head = Head::parse(&bytes)?;
        let length = match head {
            Head::Simple { .. } => 0,
            Head::Chunk { .. } => {
                let mut rest = [0; CHUNK_REST_LEN];
                self.take(&mut rest).await?;
                u32::from_be_bytes(rest)
            }
        };
        Ok((head, length))
    }

    /// Fills `out`.
    ///
    /// # Errors
    /// That the connection has ended.
    pub async fn take(&mut self, out: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        loop {
            let n = self.unread.len().min(out.len() - done);
            self.buffer.sg().copy_out(self.unread.start, &mut out[done..done + n]);
            self.unread.start += n;
            done += n;
            if done == out.len() {
                return Ok(());
            }
            match self.channel.receive(&self.buffer.sg()).await? {
                0 => {
                    return Err(io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        "the server has closed the connection",
                    ));
                }
                n => *self.unread = 0..n,
            }
        }
    }

    /// So many bytes; the caller has made sure that they are not too many.
    ///
    /// # Errors
    /// That the connection has ended.
    pub async fn bytes(&mut self, len: usize) -> io::Result<Vec<u8>> {
        let mut out = vec![0; len];
        self.take(&mut out).await?;
        Ok(out)
    }

    /// Fills a scatter list: what is received already is copied, the rest goes there directly.
    ///
    /// # Errors
    /// That the connection has ended.
    pub async fn data(&mut self, to: &Sg) -> io::Result<()> {
        let n = self.unread.len().min(to.len());
        to.copy_from(0, &self.buffer.sg().slice(self.unread.start, n));
        self.unread.start += n;
        if n == to.len() {
            return Ok(());
        }
        self.channel.receive_all(&to.slice(n, to.len() - n)).await
    }

    /// Receives so many bytes and forgets them.
    ///
    /// # Errors
    /// That the connection has ended.
    pub async fn skip(&mut self, mut len: usize) -> io::Result<()> {
        let scratch = Buffer::zeroed(len.min(64 << 10));
        while len > 0 {
            let n = len.min(scratch.len());
            self.data(&scratch.sg().slice(0, n)).await?;
            len -= n;
        }
        Ok(())
    }
}

async fn tcp(io: &Io, host: &str, port: u16) -> io::Result<Stream> {
    let name = (host.to_owned(), port);
    let addresses =
        io.blocking(move || std::net::ToSocketAddrs::to_socket_addrs(&name).map(Vec::from_iter)).await??;
    let mut failed = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
    for address in addresses {
        match Stream::tcp(io, address).await {
            Ok(stream) => return Ok(stream),
            Err(e) => failed = e,
        }
    }
    Err(failed)
}

/// Why a server refuses an export, with its own words if it has any.
fn refusal(name: &str, kind: u32, words: &str) -> String {
    let what = match kind {
        answer::ERR_UNKNOWN => format!("the server has no export '{name}'"),
        answer::ERR_TLS_REQD => "the server wants TLS: name it nbds:// (or nbds+unix://)".to_owned(),
        answer::ERR_POLICY => format!("the server does not permit the use of '{name}'"),
        answer::ERR_BLOCK_SIZE_REQD => "the server refuses our block sizes".to_owned(),
        other => format!("the server refuses the export '{name}' (error {})", other & !answer::ERROR),
    };
    if words.is_empty() { what } else { format!("{what}: {words}") }
}
