//! `tcmu-dif throttle`: a LUN's limits, shown and changed while it is in use. The daemon does it.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{
    CliError, Done,
    args::{self, Cli},
    error, output,
};
use crate::{
    control::{
        SOCKET,
        client::{Client, ClientError},
    },
    lun::throttle::limits::Limits,
};

/// What the limits have cost: `LunThrottle` in `query-luns`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Cost {
    delayed: u64,
    waited_ns: u64,
    waiting: u64,
}

/// What is printed as JSON.
#[derive(Debug, Serialize)]
struct Shown<'a> {
    name: &'a str,
    /// In the words of `create --throttle`.
    throttle: String,
    /// The same by its words: bytes or commands a second, seconds.
    limits: Limits,
    delayed: u64,
    waited_ns: u64,
    waiting: u64,
}

/// Runs `throttle`.
pub fn run(cli: &Cli, args: &args::Throttle) -> Done {
    let name = args.name.as_str();
    let socket = cli.run_dir.join(SOCKET);
    let failed = |e: ClientError| {
        let said = error::from_client("throttle", name, &e);
        match e {
            ClientError::Refused(_) => said.then("see which LUNs there are, and how they do: tcmu-dif list"),
            _ => said,
        }
    };
    let mut client = Client::connect(&socket).map_err(failed)?;
    if let Some(limits) = args.limits {
        let mut arguments: Map<String, Value> =
            limits.in_full().into_iter().map(|(word, value)| (word, value.into())).collect();
        arguments.insert("id".to_owned(), name.into());
        client.execute("block_set_io_throttle", arguments).map_err(failed)?;
    }
    let luns = client.execute("query-luns", Map::new()).map_err(failed)?;
    let lun = luns.as_array().into_iter().flatten().find(|lun| lun["name"] == name).ok_or_else(|| {
        CliError::new("throttle", name, "the daemon serves no LUN of this name")
            .then("see which LUNs there are, and how they do: tcmu-dif list")
    })?;
    // What has no counters answers nothing.
    if lun.get("counters").is_none() {
        let state = lun["state"].as_str().unwrap_or("silent");
        return Err(CliError::new("throttle", name, format!("its limits are not known: it is {state}"))
            .then(format!("see why: tcmu-dif show {name}")));
    }
    let (limits, cost) =
        read(lun).map_err(|what| failed(ClientError::Protocol { path: socket.clone(), what }))?;
    let Cost { delayed, waited_ns, waiting } = cost;
    let throttle = limits.to_string();
    if args.json.json {
        return output::json(&Shown { name, throttle, limits, delayed, waited_ns, waiting });
    }
    output::print(&output::lines(&[
        ("lun", name.to_owned()),
        ("throttle", throttle),
        ("delayed", delayed.to_string()),
        ("waited ms", (waited_ns / 1_000_000).to_string()),
        ("waiting", waiting.to_string()),
    ]))
}

/// The limits of one of `query-luns`, and their cost; a LUN that never had any has none.
fn read(lun: &Value) -> Result<(Limits, Cost), String> {
    let Some(throttle) = lun.get("throttle") else { return Ok(Default::default()) };
    let cost = serde_json::from_value(throttle.clone()).map_err(|e| e.to_string())?;
    let words = throttle.as_object().into_iter().flatten();
    let words = words.filter(|(word, _)| Limits::is_word(word));
    let number =
        |value: &Value, word| value.as_u64().ok_or_else(|| format!("{word} is {value}, and no number"));
    let set = words.map(|(word, value)| Ok((word.clone(), number(value, word)?)));
    let set = set.collect::<Result<Vec<_>, String>>()?;
    Ok((Limits::of(set).map_err(|e| e.to_string())?, cost))
}
