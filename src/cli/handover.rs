//! `tcmu-dif handover` and `tcmu-dif receive`: a LUN goes from one host to another.

use std::{
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use serde_json::{Map, Value};

use super::{
    CliError, Done,
    args::Cli,
    error,
    handover_args::{Handover, Receive},
    output,
    pi::{advance, bar},
};
use crate::{
    admin::{
        receive::NewImage,
        require_root,
        way::{Address, Certificates},
    },
    control::{SOCKET, client::Client},
    tls::TlsError,
};

/// How long the daemon may take: it waits for the other side, and for two LUNs.
const PATIENCE: Duration = Duration::from_secs(300);

/// The same where it copies the LUN's image.
const LONG: Duration = Duration::from_secs(30 * 86400);

/// How often it is asked how far the copy is.
const LOOK: Duration = Duration::from_millis(200);

/// What a LUN is that has been copied, and waits.
const PRE_SWITCHOVER: &str = "pre-switchover";

/// The certificates that go with an address.
fn certificates(
    address: &Address,
    dir: Option<&PathBuf>,
    hostname: Option<&String>,
) -> Result<Option<Certificates>, CliError> {
    let dir =
        dir.map(std::path::absolute).transpose().map_err(|e| CliError::from("--tls-certificates", "", &e))?;
    let shown = dir.as_ref().map(|d| d.display().to_string()).unwrap_or_default();
    Certificates::of(address, dir, hostname.cloned()).map_err(|why| {
        CliError::usage("--tls-certificates", shown, why)
            .then("with tls:// give --tls-certificates DIR, and with unix: nothing: docs/handover.md")
    })
}

/// Runs `handover`: the daemon does it.
pub fn give(cli: &Cli, args: &Handover) -> Done {
    let name = args.name.as_str();
    let failed = |e| error::from_client("handover", name, &e);
    let Some(to) = &args.to else { return go_on(cli, name, args.json.json) };
    let with = certificates(to, args.tls_certificates.as_ref(), args.tls_hostname.as_ref())?;
    let mut client = Client::connect(&cli.run_dir.join(SOCKET)).map_err(failed)?;
    // A copy takes as long as it takes; the daemon looks after it.
    client.wait_for(if args.copy_storage_all { LONG } else { PATIENCE }).map_err(failed)?;
    let mut arguments =
        Map::from_iter([("device".to_owned(), name.into()), ("uri".to_owned(), to.to_string().into())]);
    if let Some(Certificates { dir, hostname }) = with {
        arguments.insert("tls-certificates".to_owned(), dir.to_string_lossy().into());
        hostname.into_iter().for_each(|name| drop(arguments.insert("tls-hostname".to_owned(), name.into())));
    }
    if args.copy_storage_all {
        arguments.insert("blk".to_owned(), true.into());
    }
    if args.pause_before_switchover {
        arguments.insert("pause-before-switchover".to_owned(), true.into());
    }
    let given = match args.copy_storage_all {
        false => client.execute("migrate", arguments),
        true => copying(cli, name, || client.execute("migrate", arguments)),
    };
    let given = given.map_err(failed)?;
    if args.json.json {
        return output::json(&given);
    }
    let mut text = format!("{name} serves there now, and is gone here");
    if given["answered"] == false {
        text = format!("{name} has gone over: the other host has its image, though its answer was lost");
    }
    if let Some(image) = given["image"].as_str() {
        text.push_str(&format!("; {image} stays here, marked as that host's"));
    }
    if let Some(left) = given["left"].as_str() {
        text.push_str(&format!("; what is left here: {left}\n  next: tcmu-dif delete --force {name}"));
    }
    output::print(&text)
}

/// Has one that waits before its switchover go on.
fn go_on(cli: &Cli, name: &str, json: bool) -> Done {
    let failed = |e| error::from_client("handover", name, &e);
    let mut client = Client::connect(&cli.run_dir.join(SOCKET)).map_err(failed)?;
    let of =
        Map::from_iter([("device".to_owned(), name.into()), ("state".to_owned(), PRE_SWITCHOVER.into())]);
    let answer = client.execute("migrate-continue", of).map_err(failed)?;
    match json {
        true => output::json(&answer),
        false => output::print(&format!("{name} goes over now")),
    }
}

/// Shows how far the copy is while that runs, and that it is done, if it waits then.
fn copying<T>(cli: &Cli, name: &str, run: impl FnOnce() -> T) -> T {
    let over = AtomicBool::new(false);
    std::thread::scope(|threads| {
        threads.spawn(|| {
            // Without a second connection nothing is shown.
            let Ok(mut client) = Client::connect(&cli.run_dir.join(SOCKET)) else { return };
            let bar = bar("copying");
            let mut step = advance(&bar);
            let mut told = false;
            while !over.load(Ordering::Acquire) {
                let of = Map::from_iter([("device".to_owned(), name.into())]);
                let Ok(found) = client.execute("query-migrate", of) else { break };
                if let (Some(done), Some(all)) =
                    (found["disk"]["transferred"].as_u64(), found["disk"]["total"].as_u64())
                {
                    step(done, all);
                }
                if !told && found["status"] == PRE_SWITCHOVER {
                    told = true;
                    bar.suspend(|| {
                        eprintln!(
                            "{name} has been copied, and serves here until: tcmu-dif handover {name} --continue"
                        );
                    });
                }
                std::thread::sleep(LOOK);
            }
            bar.finish_and_clear();
        });
        let done = run();
        over.store(true, Ordering::Release);
        done
    })
}

/// Runs `receive`.
pub fn take(cli: &Cli, args: &Receive) -> Done {
    require_root("receive")?;
    let with = certificates(&args.listen, args.tls_certificates.as_ref(), None)?;
    let listener = args.listen.listen(with.as_ref()).map_err(|e| {
        if let Some(tls) = TlsError::of(&e) {
            return CliError::new("--tls-certificates", "", tls.why.clone()).then(tls.next.clone());
        }
        let next = match e.kind() {
            std::io::ErrorKind::AddrInUse => {
                "choose another address; or, if nobody listens there any more, remove the socket"
            }
            _ if with.is_some() => "listen on an address of this host's, or on tls://0.0.0.0:PORT",
            _ => "listen in a folder that is there, as unix:/run/tcmu-dif/receive.sock",
        };
        CliError::from("--listen", &args.listen, &e).then(next)
    })?;
    let admin = cli.admin();
    let at = args.image.as_ref().map(std::path::absolute).transpose();
    let at = at.map_err(|e| CliError::from("--image", "", &e))?;
    let image = at.map(|at| NewImage { at, format: args.format });
    if let Some(new) = image.as_ref().filter(|new| !args.once && !new.at.is_dir()) {
        return Err(CliError::usage(
            "--image",
            new.at.display().to_string(),
            "it is no directory".to_owned(),
        )
        .then("name a directory for the images of several LUNs; or receive one: --once"));
    }
    loop {
        let mut connection = listener.accept().map_err(|e| CliError::from("receive", &args.listen, &e))?;
        let came = admin.receive(&mut connection, args.name.as_ref(), image.as_ref(), &|_| true);
        match came {
            Ok(made) => tell(args, &made)?,
            Err(e) if args.once => return Err(e),
            // The source has been told; the next one may fare better.
            Err(e) => {
                eprintln!("{e}");
                continue;
            }
        };
        if args.once {
            return Ok(std::process::ExitCode::SUCCESS);
        }
    }
}

fn tell(args: &Receive, made: &Value) -> Done {
    if args.json.json {
        return output::json(made);
    }
    let text = |key: &str| made[key].as_str().unwrap_or_default().to_owned();
    output::print(&format!(
        "{} serves here: {}, serial number {}",
        text("name"),
        text("image"),
        text("serial")
    ))
}
