//! The destination's side of a handover.

use std::io::{self, Read, Write};

use super::{
    Destination, Failure, Identity, State,
    storage::{hear_out, landed},
    wire::{Message, PROTOCOL, WITH_STORAGE, receive, send},
};

/// Has one LUN handed over: what it is now, and what was made.
///
/// # Errors
/// Why not; nothing of it is here then. (If the answer could not be sent the LUN is here all the same, and serves: the source finds out from the image.)
pub fn take(
    connection: &mut (impl Read + Write),
    destination: &mut impl Destination,
) -> Result<(Identity, serde_json::Value), Failure> {
    // The source sends pieces before it has the answers to others.
    let mut may_be_sending = false;
    let done = (|| {
        let (identity, comes_along) = match receive(connection).map_err(|e| lost(&e))? {
            Message::Offer(offer) if ![PROTOCOL, WITH_STORAGE].contains(&offer.protocol) => {
                let words = format!(
                    "the source (tcmu-dif {}) hands over by protocol {}, and here (tcmu-dif {}) it is {PROTOCOL}",
                    offer.program,
                    offer.protocol,
                    env!("CARGO_PKG_VERSION")
                );
                return Err(Failure::new(words).then("use the same version on both hosts"));
            }
            Message::Offer(offer) => (offer.identity, offer.protocol == WITH_STORAGE),
            _ => return Err(Failure::new("the source does not begin with an offer")),
        };
        match comes_along {
            true => destination.prepare_storage(&identity)?,
            false => destination.prepare(&identity)?,
        }
        send(connection, &Message::Ready).map_err(|e| lost(&e))?;
        may_be_sending = comes_along;
        let bytes = loop {
            match receive(connection).map_err(|e| lost(&e))? {
                Message::State(bytes) => {
                    may_be_sending = false;
                    break bytes;
                }
                Message::Piece(piece) if comes_along => {
                    destination.land(piece)?;
                    landed(connection).map_err(|e| lost(&e))?;
                }
                Message::Failed(failure) => return Err(failure),
                _ => return Err(Failure::new("the source sends something else than the LUN's state")),
            }
        };
        let state = State::from_bytes(&bytes).map_err(|e| Failure::new(format!("the LUN's state: {e}")))?;
        let same = Identity { generation: identity.generation, ..state.identity.clone() };
        if same != identity {
            return Err(Failure::new("the LUN has changed while it was handed over").then("begin again"));
        }
        if comes_along {
            let here = destination.settle()?;
            send(connection, &Message::Prepared(here)).map_err(|e| lost(&e))?;
            // Until then the source may serve it again, and from then on not before it hears from here.
            match receive(connection).map_err(|e| lost(&e))? {
                Message::Commit => {}
                Message::Failed(failure) => return Err(failure),
                _ => {
                    return Err(Failure::new("the source says something else than that the LUN is here now"));
                }
            }
        }
        let made = destination.build(&state)?;
        Ok((state.identity, made))
    })();
    if done.is_err() {
        // Before the source hears of it, which may begin again.
        destination.clear();
    }
    match &done {
        Ok((_, made)) => {
            if let Err(e) = send(connection, &Message::Done(made.clone())) {
                tracing::warn!("the LUN is here, and the source could not be told: {e}");
            }
        }
        // Where there is no connection any more, the source knows by that.
        Err(failure) => {
            if send(connection, &Message::Failed(failure.clone())).is_ok() && may_be_sending {
                hear_out(connection);
            }
        }
    }
    done
}

fn lost(e: &io::Error) -> Failure {
    match e.kind() {
        io::ErrorKind::UnexpectedEof => Failure::new("the source has ended the connection"),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Failure::new("the source does not answer"),
        _ => Failure::new(format!("the connection: {e}")),
    }
}
