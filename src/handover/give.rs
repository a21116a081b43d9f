//! The source's side of a handover.

use std::io::{self, Read, Write};

use super::{
    Failure, Source, State, Step, Thawed,
    wire::{Message, Offer, PROTOCOL, receive, send},
};

/// How a LUN has gone over.
#[derive(Debug, Clone, PartialEq)]
pub struct Given {
    /// What the destination made of it; nothing, if its answer was lost, and that it has the LUN is known from the image.
    pub made: Option<serde_json::Value>,
    /// What could not be taken down here.
    pub left: Option<Failure>,
}

/// Why one has not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotGiven {
    /// What failed.
    pub step: Step,
    /// Why.
    pub failure: Failure,
    /// Why the LUN does not serve here either, if it doesn't.
    pub down: Option<Failure>,
}

impl std::fmt::Display for NotGiven {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.step, self.failure)?;
        match &self.down {
            None => f.write_str("; the LUN serves here as before"),
            Some(down) => write!(f, "; and it does not serve here: {down}"),
        }
    }
}

impl std::error::Error for NotGiven {}

pub(super) fn lost(e: &io::Error) -> Failure {
    let reason = match e.kind() {
        io::ErrorKind::UnexpectedEof => "the destination has ended the connection".to_owned(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => "the destination does not answer".to_owned(),
        _ => format!("the connection: {e}"),
    };
    Failure::new(reason).then("look at what the destination says")
}

pub(super) fn unexpected() -> Failure {
    Failure::new("the destination answers something else than was asked")
}

/// Hands a LUN over. Whatever fails before the destination has it, the LUN serves here as before.
///
/// # Errors
/// The step that failed, and whether the LUN serves.
pub fn give(connection: &mut (impl Read + Write), source: &mut impl Source) -> Result<Given, NotGiven> {
    offer(connection, source, PROTOCOL)?;
    let frozen = source.freeze().map_err(|e| (Step::Freeze, e));
    let state = frozen.and_then(|()| collect(source).map_err(|e| (Step::State, e)));
    let state = match state {
        Ok(state) => state,
        Err((step, failure)) => {
            // It learns that nothing comes; if it does not, it notices that the connection ends.
            let _ = send(connection, &Message::Failed(failure.clone()));
            return back(source, step, failure);
        }
    };
    let built = send(connection, &Message::State(state)).and_then(|()| receive(connection));
    let failure = match built {
        Ok(Message::Done(made)) => return Ok(Given { made: Some(made), left: source.finish().err() }),
        Ok(Message::Failed(failure)) => failure,
        Ok(_) => unexpected(),
        Err(e) => lost(&e),
    };
    back(source, Step::Build, failure)
}

/// Says what is to go over, and waits until the destination has looked.
pub(super) fn offer(
    connection: &mut (impl Read + Write),
    source: &mut impl Source,
    protocol: u32,
) -> Result<(), NotGiven> {
    let before = |failure| NotGiven { step: Step::Preflight, failure, down: None };
    let identity = source.identity().map_err(before)?;
    let program = env!("CARGO_PKG_VERSION").to_owned();
    let offer = Offer { protocol, program, identity };
    match send(connection, &Message::Offer(Box::new(offer))).and_then(|()| receive(connection)) {
        Ok(Message::Ready) => Ok(()),
        Ok(Message::Failed(failure)) => Err(before(failure)),
        Ok(_) => Err(before(unexpected())),
        Err(e) => Err(before(lost(&e))),
    }
}

/// Has the LUN serve here again. Whether the destination has it all the same, whose answer was lost, is seen from the image.
fn back(source: &mut impl Source, step: Step, failure: Failure) -> Result<Given, NotGiven> {
    match source.thaw() {
        Ok(Thawed::Serves) => Err(NotGiven { step, failure, down: None }),
        Ok(Thawed::Taken) => Ok(Given { made: None, left: source.finish().err() }),
        Err(down) => Err(NotGiven { step, failure, down: Some(down) }),
    }
}

pub(super) fn collect(source: &mut impl Source) -> Result<Vec<u8>, Failure> {
    let state: State = source.state()?;
    state.to_bytes().map_err(|e| Failure::new(e.to_string()))
}
