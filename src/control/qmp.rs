//! QMP's words: greeting, request, response, error; and the reading of one message after another from a stream.

use std::{
    cell::Cell,
    io::{self, BufReader, Read},
    rc::Rc,
};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

/// The longest message: nothing that can be asked comes near it.
pub const MAX_MESSAGE: usize = 1 << 20;

/// What a server says first.
pub fn greeting() -> Value {
    json!({ "QMP": { "version": version(), "capabilities": [] } })
}

/// The version, in the shape that QEMU gives its own: what it calls `qemu` is this program's.
pub fn version() -> Value {
    let part = |text: &str| text.parse::<u64>().unwrap_or(0);
    json!({
        "qemu": {
            "major": part(env!("CARGO_PKG_VERSION_MAJOR")),
            "minor": part(env!("CARGO_PKG_VERSION_MINOR")),
            "micro": part(env!("CARGO_PKG_VERSION_PATCH")),
        },
        "package": concat!("tcmu-dif ", env!("CARGO_PKG_VERSION")),
    })
}

/// A command.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Its name.
    pub execute: String,
    /// What it is given.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub arguments: Map<String, Value>,
    /// Anything, which comes back with the answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<Value>,
}

/// What kind of error it is, in QEMU's classes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Class {
    /// Any other.
    GenericError,
    /// There is no such command, or not before `qmp_capabilities`.
    CommandNotFound,
    /// There is no such LUN.
    DeviceNotFound,
    /// There is no such job.
    DeviceNotActive,
}

/// Why a command failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{desc}")]
pub struct Error {
    /// The kind, for programs.
    pub class: Class,
    /// In words, for people.
    pub desc: String,
}

impl Error {
    /// An error of that class.
    pub fn new(class: Class, desc: impl Into<String>) -> Error {
        Error { class, desc: desc.into() }
    }

    /// An error of no class in particular.
    pub fn generic(desc: impl Into<String>) -> Error {
        Error::new(Class::GenericError, desc)
    }
}

/// The answer to a command.
pub fn response(result: Result<Value, Error>, id: Option<Value>) -> Value {
    let mut answer = match result {
        Ok(value) => json!({ "return": value }),
        Err(error) => json!({ "error": error }),
    };
    if let (Some(id), Some(map)) = (id, answer.as_object_mut()) {
        map.insert("id".to_owned(), id);
    }
    answer
}

/// The messages in a stream: JSON values one after another, with or without line ends, none longer than [`MAX_MESSAGE`].
pub struct Messages<R: Read> {
    values: serde_json::StreamDeserializer<'static, serde_json::de::IoRead<Limited<R>>, Value>,
    left: Rc<Cell<usize>>,
}

/// A stream that ends in an error when a message is too long.
struct Limited<R> {
    stream: BufReader<R>,
    left: Rc<Cell<usize>>,
}

impl<R: Read> Read for Limited<R> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        if self.left.get() == 0 {
            let words = format!("a message of more than {MAX_MESSAGE} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidData, words));
        }
        let most = to.len().min(self.left.get());
        let n = self.stream.read(&mut to[..most])?;
        self.left.set(self.left.get() - n);
        Ok(n)
    }
}

impl<R: Read> Messages<R> {
    /// Those of that stream.
    pub fn of(stream: R) -> Messages<R> {
        let left = Rc::new(Cell::new(MAX_MESSAGE));
        let limited = Limited { stream: BufReader::new(stream), left: left.clone() };
        Messages { values: serde_json::Deserializer::from_reader(limited).into_iter(), left }
    }
}

impl<R: Read> Iterator for Messages<R> {
    type Item = serde_json::Result<Value>;

    fn next(&mut self) -> Option<Self::Item> {
        self.left.set(MAX_MESSAGE);
        self.values.next()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_one_by_one_with_or_without_line_ends() {
        let text = br#"{"execute":"a"}{"execute":"b","id":[1]}
            {"execute":"c",
             "arguments":{"x":"}{"}}"#;
        let all: Vec<Request> =
            Messages::of(&text[..]).map(|value| serde_json::from_value(value.unwrap()).unwrap()).collect();
        assert_eq!(all.iter().map(|r| r.execute.as_str()).collect::<Vec<_>>(), ["a", "b", "c"]);
        assert_eq!(all[1].id, Some(json!([1])));
        assert_eq!(all[2].arguments["x"], "}{");
    }

    #[test]
    fn a_message_without_end_is_cut_off_and_one_without_sense_is_an_error() {
        let endless = std::io::repeat(b'[').take(100 << 20);
        assert!(Messages::of(endless).next().unwrap().is_err());
        let long = Read::chain(&b"\""[..], std::io::repeat(b'a'));
        let e = Messages::of(long).next().unwrap().unwrap_err();
        assert!(e.to_string().contains("more than 1048576 bytes"), "{e}");
        assert!(Messages::of(&b"{]"[..]).next().unwrap().is_err());
        assert!(Messages::of(&b"  \n"[..]).next().is_none());
    }

    #[test]
    fn an_answer_has_the_id_of_its_question() {
        assert_eq!(response(Ok(json!({})), Some(json!(7))), json!({ "return": {}, "id": 7 }));
        let refused = response(Err(Error::new(Class::DeviceNotFound, "no")), None);
        assert_eq!(refused, json!({ "error": { "class": "DeviceNotFound", "desc": "no" } }));
    }
}
