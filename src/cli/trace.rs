//! `tcmu-dif trace`: commands of a LUN as they pass, until there were as many as asked for, it is interrupted, or the LUN ends.

use std::{
    io::{self, BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    process::ExitCode,
};

use serde_json::{Value, json};

use super::{
    CliError, Done,
    args::{self, Cli},
};
use crate::{
    control::{client::ClientError, trace::SOCKET},
    sys::clock,
};

/// Runs `trace`.
pub fn run(cli: &Cli, args: &args::Trace) -> Done {
    let name = args.name.as_str();
    let failed = |e: &io::Error| CliError::from("trace", name, e);
    let socket = cli.run_dir.join(SOCKET);
    let mut stream = UnixStream::connect(&socket).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            CliError::from("trace", name, &ClientError::NoDaemon(socket, e))
                .then("start it: tcmu-dif daemon (as root, in the foreground)")
        }
        io::ErrorKind::PermissionDenied => failed(&e).then("run it as root: the socket is root's alone"),
        _ => failed(&e),
    })?;
    let question = format!("{}\n", json!({ "device": name }));
    stream.write_all(question.as_bytes()).map_err(|e| failed(&e))?;
    let mut out = io::stdout().lock();
    let mut left = args.count.unwrap_or(u64::MAX);
    for line in BufReader::new(stream).lines() {
        let line = line.map_err(|e| failed(&e))?;
        let value: Value = serde_json::from_str(&line).map_err(|e| {
            CliError::new("trace", name, format!("what came from the daemon is no JSON: {e}"))
        })?;
        if let Some(words) = value["error"].as_str() {
            return Err(CliError::new("trace", name, words.to_owned())
                .then("see which LUNs there are, and how they do: tcmu-dif list"));
        }
        let shown = if args.json.json { Some(line) } else { text(&value) };
        let Some(shown) = shown else { continue };
        match writeln!(out, "{shown}").and_then(|()| out.flush()) {
            // Whoever read has seen enough.
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => return Ok(ExitCode::SUCCESS),
            Err(e) => return Err(CliError::from("stdout", "", &e)),
            Ok(()) => left -= u64::from(value.get("opcode").is_some()),
        }
        if left == 0 {
            break;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// A line for people; nothing for what only programs want to know.
fn text(value: &Value) -> Option<String> {
    if let Some(missed) = value["missed"].as_u64() {
        return Some(format!("… {missed} commands passed too quickly to be shown"));
    }
    if value.get("ended").is_some() {
        return Some("the LUN has ended".to_owned());
    }
    let number = |key: &str| value[key].as_u64();
    let range = match (number("lba"), number("blocks")) {
        (Some(lba), Some(blocks)) => format!("{lba} +{blocks}"),
        _ => "–".to_owned(),
    };
    let sense = &value["sense"];
    let code = |key: &str| sense[key].as_u64().map(|code| format!("{code:02X}h"));
    let end = match (code("key"), code("asc"), code("ascq")) {
        (Some(key), Some(asc), Some(ascq)) => format!("{key}/{asc}/{ascq}"),
        _ => match number("status")? {
            0 => "good".to_owned(),
            status => format!("status {status:02X}h"),
        },
    };
    let name = format!("{} ({:02X}h)", value["name"].as_str()?, number("opcode")?);
    let micros = value["microseconds"].as_f64()?;
    Some(format!("{}  {name:<24} {range:<24} {end:<12} {micros:>10.1} µs", time(number("time-us")?)))
}

/// The time of day, with microseconds.
fn time(micros: u64) -> String {
    let seconds = i64::try_from(micros / 1_000_000).ok();
    match seconds.and_then(clock::local) {
        Some(clock::Local { time: (h, m, s), .. }) => {
            format!("{h:02}:{m:02}:{s:02}.{:06}", micros % 1_000_000)
        }
        None => format!("{}.{:06}", micros / 1_000_000, micros % 1_000_000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_a_line_with_its_blocks_its_end_and_its_time() {
        let line = text(&json!({
            "time-us": 1_000_000_000_123_456u64, "opcode": 0x28, "name": "READ", "lba": 2048, "blocks": 8, "status": 0,
            "microseconds": 12.345,
        }))
        .unwrap();
        let (time, rest) = line.split_once("  ").unwrap();
        assert!(time.ends_with(".123456"), "{line}");
        let words: Vec<_> = rest.split_whitespace().collect();
        assert_eq!(words, ["READ", "(28h)", "2048", "+8", "good", "12.3", "µs"]);
        let failed = json!({
            "time-us": 0, "opcode": 0xff, "name": "unknown", "status": 2, "sense": { "key": 5, "asc": 32, "ascq": 0 },
            "microseconds": 1.0,
        });
        assert!(
            text(&failed).unwrap().contains("unknown (FFh)")
                && text(&failed).unwrap().contains("05h/20h/00h")
        );
        assert!(text(&json!({ "missed": 7 })).unwrap().contains("7 commands"));
        assert_eq!(text(&json!({ "tracing": "vm1" })), None);
    }
}
