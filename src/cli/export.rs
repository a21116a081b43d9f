//! `tcmu-dif export`: a LUN over NBD, for programs that read disks. The daemon does it.

use serde_json::{Map, Value, json};

use super::{CliError, Done, args::Cli, error, export_args::Export, export_past::Past, output};
use crate::control::{
    SOCKET,
    client::{Client, ClientError},
};

/// The socket of the daemon's NBD server, in its directory, unless somebody names another.
const NBD_SOCKET: &str = "nbd.sock";

pub(super) fn words(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

/// Runs `export`.
pub fn run(cli: &Cli, args: &Export) -> Done {
    let name = args.name.as_str();
    let refused = |e: ClientError, next: String| {
        let said = error::from_client("export", name, &e);
        if matches!(e, ClientError::Refused(_)) { said.then(next) } else { said }
    };
    if let Some(at) = args.listen.filter(|at| !at.ip().is_loopback() && args.tls_certificates.is_none()) {
        return Err(CliError::usage(
            "--listen",
            at,
            "others can reach that address, and without TLS read the disk",
        )
        .then("give --tls-certificates DIR too, or listen on 127.0.0.1:PORT"));
    }
    if args.point_in_time && args.bitmap.len() > 1 {
        return Err(CliError::usage("--bitmap", args.bitmap.join(", "), "a point in time has one bitmap")
            .then("name one; over QMP others that are disabled can be exported too: block-export-add"));
    }
    let mut client =
        Client::connect(&cli.run_dir.join(SOCKET)).map_err(|e| error::from_client("export", name, &e))?;
    if args.end {
        let past = Past::found(&mut client, name)?;
        let mode = if args.force { "hard" } else { "safe" };
        let ended = client.execute("block-export-del", words(json!({ "id": name, "mode": mode })));
        // A restart of the daemon, or the end of its server, has ended the export alone.
        let is_gone = past.is_some()
            && matches!(&ended, Err(ClientError::Refused(e)) if e.desc.contains("is not found"));
        if !is_gone {
            let next = format!("end its clients too, if it has any: tcmu-dif export {name} --end --force");
            ended.map_err(|e| refused(e, next))?;
        }
        let was_lost = match past {
            Some(past) => past.end(&mut client, args.copied)?,
            None if args.copied => {
                return Err(CliError::new("export", name, "it was no export of a point in time")
                    .then("the export has ended; what was copied may be of several moments"));
            }
            None => None,
        };
        if args.json.json {
            return output::json(&json!({ "name": name, "exported": false, "lost": was_lost }));
        }
        return output::print(&match was_lost {
            None => format!("{name} is no longer exported"),
            Some(why) => {
                format!("{name} is no longer exported, and its point in time was lost before: {why}")
            }
        });
    }
    listen(&mut client, cli, args)?;
    let past = match args.point_in_time {
        true => Some(Past::begin(&mut client, args)?),
        false => None,
    };
    let node = past.as_ref().map_or(name, |past| &past.job);
    let mut order = json!({ "type": "nbd", "id": name, "node-name": node, "writable": args.writable });
    order["name"] = json!(args.export_name.as_deref().unwrap_or(name));
    if !args.bitmap.is_empty() {
        order["bitmaps"] = json!(args.bitmap);
    }
    let look = "see which LUNs and bitmaps there are: tcmu-dif list, tcmu-dif bitmap list NAME";
    if let Err(e) = client.execute("block-export-add", words(order)) {
        // What is said is why it could not be exported.
        let _ = past.map(|past| past.end(&mut client, false));
        return Err(refused(e, look.to_owned()));
    }
    let all = client
        .execute("query-block-exports", Map::new())
        .map_err(|e| error::from_client("export", name, &e))?;
    let export = all.as_array().into_iter().flatten().find(|e| e["id"] == name);
    let uri = export.and_then(|e| e["uri"].as_str()).unwrap_or_default();
    if args.json.json {
        let mut told = json!({ "name": name, "exported": true, "uri": uri, "writable": args.writable });
        if let Some(past) = &past {
            told["job"] = json!(past.job);
            told["scratch"] = json!(past.scratch);
        }
        return output::json(&told);
    }
    if past.is_some() {
        return output::print(&format!("{name} is exported as it is at this moment: {uri}"));
    }
    let how = if args.writable { "for reading and writing" } else { "for reading" };
    output::print(&format!("{name} is exported {how}: {uri}"))
}

/// Has the daemon listen, unless it does.
fn listen(client: &mut Client, cli: &Cli, args: &Export) -> Result<(), CliError> {
    let path = match &args.socket {
        Some(path) => {
            std::path::absolute(path).map_err(|e| CliError::from("--socket", path.display(), &e))?
        }
        None => cli.run_dir.join(NBD_SOCKET),
    };
    let (option, value, address) = match args.listen {
        Some(at) => {
            let data = json!({ "host": at.ip().to_string(), "port": at.port().to_string() });
            ("--listen", at.to_string(), json!({ "type": "inet", "data": data }))
        }
        None => {
            let data = json!({ "path": path.to_string_lossy() });
            ("--socket", path.display().to_string(), json!({ "type": "unix", "data": data }))
        }
    };
    let mut order = json!({ "addr": address });
    if let Some(dir) = &args.tls_certificates {
        let dir =
            std::path::absolute(dir).map_err(|e| CliError::from("--tls-certificates", dir.display(), &e))?;
        order["tls-certificates"] = json!(dir.to_string_lossy());
    }
    let asked = [
        ("--listen", args.listen.map(|at| at.to_string())),
        ("--socket", args.socket.as_ref().map(|path| path.display().to_string())),
        ("--tls-certificates", args.tls_certificates.as_ref().map(|dir| dir.display().to_string())),
    ];
    match client.execute("nbd-server-start", words(order)) {
        Ok(_) => Ok(()),
        Err(ClientError::Refused(why)) if why.to_string().contains("already running") => {
            match asked.iter().find_map(|(option, value)| Some((*option, value.as_ref()?))) {
                None => Ok(()),
                Some((option, value)) => {
                    Err(CliError::new(option, value, "the daemon's NBD server is running already")
                        .then(format!("leave {option} out, which has it listen as it does; or end it first: nbd-server-stop over QMP")))
                }
            }
        }
        Err(e @ ClientError::Refused(_)) => Err(error::from_client(option, &value, &e)
            .then("see what a server needs: docs/nbd.md, A LUN as an export")),
        Err(e) => Err(error::from_client(option, &value, &e)),
    }
}
