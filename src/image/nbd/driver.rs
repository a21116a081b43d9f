//! What keeps a conversation going: connections made and made again, requests out, replies in. Polled by whoever waits for an answer
//! (see [`session`](super::session)).

use std::{
    future::poll_fn,
    pin::Pin,
    rc::Rc,
    time::{Duration, Instant},
};

use super::{
    channel::Channel,
    link::{Link, LinkError, Receiving, Terms},
    session::{CallError, GRACE, Inner, say_goodbye},
};
use crate::{
    nbd::{
        export,
        reply::{Head, Payload},
        uri::Uri,
    },
    sys::{
        exec::{race, race_all},
        io::Io,
    },
};

/// The first and the longest pause between attempts to connect.
const PAUSES: [Duration; 2] = [Duration::from_millis(20), Duration::from_secs(1)];

/// How often a silent server is looked at.
const LOOK: Duration = Duration::from_millis(500);

/// What an attempt to connect gets even where nobody should wait any longer.
const LAST_TRY: Duration = Duration::from_secs(2);

/// Connects: once, or as often as the URI says if the server keeps several connections in step. With `before`, only to the same export.
///
/// # Errors
/// Why there is no connection. [`LinkError::Refused`] if it is another export.
pub(super) async fn connect(
    io: &Io,
    uri: &Uri,
    before: Option<&Terms>,
) -> Result<(Vec<(Link, Terms)>, Terms), LinkError> {
    let (first, terms) = Link::open(io, uri).await?;
    if let Some(differs) = before.and_then(|before| before.difference(&terms)) {
        return Err(LinkError::Changed(differs));
    }
    let mut links = vec![(first, terms)];
    if terms.has(export::CAN_MULTI_CONN) {
        while links.len() < uri.connections {
            match Link::open(io, uri).await {
                Ok((link, now)) if terms.difference(&now).is_none() => links.push((link, now)),
                Ok(_) => break,
                Err(error) => {
                    tracing::warn!(%error, connections = links.len(), "the server takes no more connections");
                    break;
                }
            }
        }
    }
    Ok((links, terms))
}

/// Keeps the conversation going to its end.
pub(super) async fn run(inner: Rc<Inner>, links: Vec<(Link, Terms)>) {
    let mut links = links;
    let mut pause = None;
    loop {
        let lost = serve(&inner, &mut links).await;
        links.clear();
        inner.disconnected();
        if inner.failed().is_some() {
            return;
        }
        if inner.down_since.get().is_none() {
            pause = None;
            inner.down_since.set(Some(Instant::now()));
            tracing::warn!(path = %inner.path.display(), "the server is away: {lost}");
        }
        links = match reconnect(&inner, lost, &mut pause).await {
            Some(links) => links,
            None => return,
        };
    }
}

/// Tries until there is a server again; commands that have waited long enough fail meanwhile. `None`: it is not the same any more.
async fn reconnect(
    inner: &Inner,
    lost: LinkError,
    pause: &mut Option<Duration>,
) -> Option<Vec<(Link, Terms)>> {
    let mut why = lost.to_string();
    loop {
        if is_over(inner) && inner.is_waited_for() && pause.is_some() {
            inner.answer_all(&CallError::Away(why.clone()));
        }
        if let Some(pause) = *pause {
            inner.io.sleep(pause).await;
        }
        *pause = Some(pause.map_or(PAUSES[0], |p| (p * 2).min(PAUSES[1])));
        let began = Instant::now();
        let impatience = async {
            loop {
                inner.io.sleep(LOOK).await;
                if is_over(inner) && began.elapsed() >= LAST_TRY {
                    return Err(LinkError::Silent(began.elapsed()));
                }
            }
        };
        match race(connect(&inner.io, &inner.uri, Some(&inner.terms)), impatience).await {
            Ok((links, _)) => {
                tracing::info!(path = %inner.path.display(), connections = links.len(), "the server is there again");
                return Some(links);
            }
            Err(LinkError::Changed(differs)) => {
                inner.fail(format!("the server came back with another export: {differs}"));
                return None;
            }
            Err(e) => why = e.to_string(),
        }
    }
}

/// Whether commands have waited long enough for a server that is away.
fn is_over(inner: &Inner) -> bool {
    let patience = |since: Option<Instant>, limit| since.is_some_and(|s| s.elapsed() >= limit);
    patience(inner.down_since.get(), inner.uri.reconnect) || patience(inner.ending.get(), GRACE)
}

/// Serves until a connection breaks.
async fn serve(inner: &Inner, links: &mut [(Link, Terms)]) -> LinkError {
    inner.connected(links.len());
    let error = {
        let mut parts: Vec<Pin<Box<dyn Future<Output = LinkError> + '_>>> = vec![Box::pin(watch(inner))];
        for (i, (link, terms)) in links.iter_mut().enumerate() {
            let (mut receiving, channel) = link.split();
            let (allocation, structured) = (terms.allocation, receiving.structured());
            parts.push(Box::pin(send(inner, i, channel, allocation, structured)));
            parts.push(Box::pin(async move {
                loop {
                    if let Err(e) = receive(inner, i, &mut receiving).await {
                        return e;
                    }
                }
            }));
        }
        race_all(parts).await
    };
    let links = links.iter().map(|(link, _)| link);
    say_goodbye(links);
    error
}

async fn send(
    inner: &Inner,
    link: usize,
    channel: &Channel,
    allocation: Option<u32>,
    structured: bool,
) -> LinkError {
    loop {
        let next = poll_fn(|cx| inner.poll_next(link, allocation, structured, cx)).await;
        if let Err(e) = channel.send(&next).await {
            return e.into();
        }
    }
}

/// Takes one reply, or one chunk of it.
async fn receive(inner: &Inner, link: usize, from: &mut Receiving<'_>) -> Result<(), LinkError> {
    let (head, length) = from.head().await?;
    let of = head.cookie();
    let payload = inner.with_pending(link, of, |p| match head {
        Head::Simple { error, .. } => p.simple(error),
        Head::Chunk { flags, kind, .. } => p.chunk(flags, kind, length),
    })?;
    match payload {
        Payload::None => {}
        Payload::AllData(len) => data(inner, of, from, 0, len).await?,
        Payload::Data(len) => {
            let mut offset = [0; 8];
            from.take(&mut offset).await?;
            let at = inner.with_pending(link, of, |p| p.data_at(offset, len))?;
            data(inner, of, from, at, len).await?;
        }
        Payload::Small(len) => {
            let bytes = from.bytes(len).await?;
            let zeros = inner.with_pending(link, of, |p| p.small(&bytes))?;
            if let (Some((at, len)), Some(to)) = (zeros, inner.target(of)) {
                to.fill(at, len, 0);
            }
        }
    }
    if inner.with_pending(link, of, |p| Ok(p.is_complete()))? {
        inner.complete(of)?;
    }
    Ok(())
}

async fn data(
    inner: &Inner,
    of: u64,
    from: &mut Receiving<'_>,
    at: usize,
    len: usize,
) -> Result<(), LinkError> {
    match inner.target(of) {
        Some(to) => from.data(&to.slice(at, len)).await?,
        None => from.skip(len).await?,
    }
    Ok(())
}

/// Ends when the server has left a request without an answer for too long. One that takes connections and answers nothing is away.
async fn watch(inner: &Inner) -> LinkError {
    loop {
        inner.io.sleep(LOOK).await;
        let Some(oldest) = inner.oldest() else { continue };
        let silent = oldest.elapsed();
        let is_away = inner.down_since.get().is_some() && is_over(inner) && silent >= LAST_TRY;
        if silent >= inner.uri.timeout || is_away {
            return LinkError::Silent(silent);
        }
    }
}
