//! The source's side of a handover in which the LUN's storage goes along.
//!
//! There is nothing that both hosts could look at, so one of them decides: the source. As long as it has not said that the LUN is the other's, it may serve again, and the destination
//! does not begin. Once it has said so it serves again only if it hears that nothing of the LUN is there; if it hears nothing, the LUN is down here, and a person has to look.

use std::{
    io::{self, Read, Write},
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc::channel,
    },
    thread,
};

use super::{
    Failure, Given, NotGiven, Step, Thawed, WithStorage,
    give::{collect, lost, offer, unexpected},
    storage::carry,
    wire::{Host, Message, WITH_STORAGE, receive, send},
};

/// Hands a LUN over, with a copy of its image. Whatever fails before the destination has it, the LUN serves here as before; where it is not known whether it has it, the
/// LUN serves here no more.
///
/// # Errors
/// The step that failed, and whether the LUN serves.
pub fn give_with_storage(
    connection: &mut (impl Read + Write + Send),
    source: &mut impl WithStorage,
) -> Result<Given, NotGiven> {
    offer(connection, source, WITH_STORAGE)?;
    if let Err((step, failure)) = storage(connection, source) {
        let _ = send(connection, &Message::Failed(failure.clone()));
        return match step {
            Step::Storage => Err(NotGiven { step, failure, down: None }),
            _ => home(source, step, failure),
        };
    }
    let state = match collect(source) {
        Ok(state) => state,
        Err(failure) => {
            let _ = send(connection, &Message::Failed(failure.clone()));
            return home(source, Step::State, failure);
        }
    };
    let host = match send(connection, &Message::State(state)).and_then(|()| receive(connection)) {
        Ok(Message::Prepared(host)) => host,
        Ok(Message::Failed(failure)) => return home(source, Step::Build, failure),
        Ok(_) => return home(source, Step::Build, unexpected()),
        Err(e) => return home(source, Step::Build, lost(&e)),
    };
    if let Err(failure) = source.leave(&host) {
        let _ = send(connection, &Message::Failed(failure.clone()));
        return home(source, Step::Build, failure);
    }
    let failure = match send(connection, &Message::Commit) {
        // Nobody can have got it: what was not sent as a whole is no message.
        Err(e) if is_gone(&e) => lost(&e),
        Err(e) => return doubt(source, &host, &lost(&e)),
        Ok(()) => match receive(connection) {
            Ok(Message::Done(made)) => return Ok(Given { made: Some(made), left: source.finish().err() }),
            Ok(Message::Failed(failure)) => failure,
            Ok(_) => return doubt(source, &host, &unexpected()),
            Err(e) => return doubt(source, &host, &lost(&e)),
        },
    };
    match source.stay() {
        Ok(()) => home(source, Step::Build, failure),
        Err(down) => Err(NotGiven { step: Step::Build, failure, down: Some(down) }),
    }
}

/// Has the LUN serve here again, which is nowhere else.
fn home(source: &mut impl WithStorage, step: Step, failure: Failure) -> Result<Given, NotGiven> {
    let down = match source.thaw() {
        Ok(Thawed::Serves) => None,
        // A mark that could not be made in order, or somebody else's.
        Ok(Thawed::Taken) => Some(Failure::new("its image is marked as another host's").then(format!(
            "see that no host uses it, and: tcmu-dif image owner --take-over {}",
            source.image()
        ))),
        Err(down) => Some(down),
    };
    Err(NotGiven { step, failure, down })
}

/// Whether nothing can be sent on that connection any more, not even what is left of a message.
fn is_gone(e: &io::Error) -> bool {
    matches!(
        e.kind(),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset | io::ErrorKind::NotConnected
    )
}

/// Copies while the LUN serves, stops it, and sends the rest.
fn storage(
    connection: &mut (impl Read + Write + Send),
    source: &mut impl WithStorage,
) -> Result<(), (Step, Failure)> {
    let stop = AtomicBool::new(false);
    let (to, parcels) = channel();
    let (copied, carried) = thread::scope(|threads| {
        let carrying = threads.spawn(|| carry(connection, parcels, &stop));
        let copied = source
            .copy(to)
            .map_err(|e| (Step::Storage, e))
            .and_then(|()| source.freeze().map_err(|e| (Step::Freeze, e)));
        stop.store(true, Ordering::Release);
        (copied, carrying.join())
    });
    let carried = carried.unwrap_or_else(|_| Err(Failure::new("who carries the LUN's storage has panicked")));
    match (copied, carried) {
        (Ok(()), Ok(())) => Ok(()),
        // What the destination says is why nothing could be copied any more.
        (Err((step, _)), Err(failure)) => Err((step, failure)),
        (Err(failed), Ok(())) => Err(failed),
        (Ok(()), Err(failure)) => Err((Step::Freeze, failure)),
    }
}

/// It is not known whether the destination has the LUN.
fn doubt(source: &mut impl WithStorage, host: &Host, failure: &Failure) -> Result<Given, NotGiven> {
    let failure = failure.clone();
    let down = match source.thaw() {
        Ok(Thawed::Taken) => None,
        // What was written down is not there any more.
        Ok(Thawed::Serves) => return Err(NotGiven { step: Step::Build, failure, down: None }),
        Err(down) => Some(down),
    };
    let words = format!("host {} was told that the LUN is there now, and has not answered", host.name);
    let reason = down.map_or(words.clone(), |down| format!("{words} ({down})"));
    let down = Failure::new(reason).then(format!(
        "see whether it serves on host {} (tcmu-dif list); if it does, delete it here (tcmu-dif delete --force); only if it does not, take its image back: tcmu-dif image owner --take-over {}",
        host.name,
        source.image()
    ));
    Err(NotGiven { step: Step::Build, failure, down: Some(down) })
}
