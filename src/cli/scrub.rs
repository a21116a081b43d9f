//! `tcmu-dif scrub`: a client of the daemon, which does the work.

use std::{
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use serde_json::{Map, Value, json};

use super::{
    CliError, Done,
    args::Cli,
    error, job_args, output,
    pi::{advance, bar, found_text, wrong},
    size,
};
use crate::{
    control::{
        SOCKET,
        client::{Client, ClientError},
        job_id,
    },
    lun::scrub::{Scrub, ScrubStatus},
};

/// How often the command asks how far it is.
const LOOK: Duration = Duration::from_millis(200);

/// How long a daemon may be away while a scrub is followed.
const RESTART: Duration = Duration::from_secs(60);

/// The daemon, asked about one LUN.
struct Asked<'a> {
    name: &'a str,
    socket: PathBuf,
    client: Client,
}

/// Runs `scrub`.
pub fn run(cli: &Cli, args: &job_args::Scrub) -> Done {
    let name = args.name.as_str();
    let socket = cli.run_dir.join(SOCKET);
    let client = Client::connect(&socket).map_err(|e| failed(name, &e))?;
    let mut asked = Asked { name, socket, client };
    let told = match args {
        job_args::Scrub { pause: true, .. } => Some("job-pause"),
        job_args::Scrub { resume: true, .. } => Some("job-resume"),
        job_args::Scrub { cancel: true, .. } => Some("job-cancel"),
        _ => None,
    };
    if let Some(command) = told {
        asked.order(command, json!({ "id": job_id(name) }))?;
    } else if !args.status {
        let before = asked.scrub()?;
        let under_way = before.as_ref().is_some_and(Scrub::is_under_way);
        match (under_way, args.speed) {
            (false, speed) => {
                let mut arguments = json!({ "device": name });
                if let (Some(speed), Some(map)) = (speed, arguments.as_object_mut()) {
                    map.insert("speed".to_owned(), speed.into());
                }
                asked.order("pi-scrub", arguments)?;
            }
            (true, Some(speed)) => {
                let arguments = json!({ "device": job_id(name), "speed": speed });
                asked.order("block-job-set-speed", arguments)?;
            }
            (true, None) => {}
        }
        if !args.background {
            return end(args, asked.follow()?);
        }
    }
    let scrub = asked.scrub()?.ok_or_else(|| {
        CliError::new("scrub", name, "there has been no scrub of this LUN")
            .then(format!("begin one: tcmu-dif scrub {name}"))
    })?;
    end(args, scrub)
}

impl Asked<'_> {
    fn order(&mut self, command: &str, arguments: Value) -> Result<(), CliError> {
        let Value::Object(arguments) = arguments else { return Ok(()) };
        self.client.execute(command, arguments).map(drop).map_err(|e| failed(self.name, &e))
    }

    /// The scrub under way, or the last one.
    fn scrub(&mut self) -> Result<Option<Scrub>, CliError> {
        self.try_scrub().map_err(|e| failed(self.name, &e))
    }

    fn try_scrub(&mut self) -> Result<Option<Scrub>, ClientError> {
        let arguments = Map::from_iter([("device".to_owned(), self.name.into())]);
        let mut answer = self.client.execute("query-pi", arguments)?;
        let scrub = answer.pointer_mut("/0/scrub").map(Value::take).unwrap_or_default();
        serde_json::from_value(scrub)
            .map_err(|e| ClientError::Protocol { path: self.socket.clone(), what: e.to_string() })
    }

    /// Shows how far it is, until it ends or is paused. A daemon that is restarted meanwhile goes on with it.
    fn follow(&mut self) -> Result<Scrub, CliError> {
        let bar = bar("scrubbing");
        let mut step = advance(&bar);
        let mut away: Option<Instant> = None;
        let ended = loop {
            match self.try_scrub() {
                Ok(Some(scrub)) if scrub.status == ScrubStatus::Running => {
                    away = None;
                    let (done, total) = scrub.progress();
                    step(done, total);
                }
                Ok(Some(scrub)) => break Ok(scrub),
                Ok(None) => break Err(CliError::new("scrub", self.name, "the daemon knows of no scrub")),
                Err(e) => {
                    if away.get_or_insert_with(Instant::now).elapsed() >= RESTART {
                        break Err(failed(self.name, &e));
                    }
                    if let Ok(client) = Client::connect(&self.socket) {
                        self.client = client;
                    }
                }
            }
            std::thread::sleep(LOOK);
        };
        bar.finish_and_clear();
        ended
    }
}

fn failed(name: &str, e: &ClientError) -> CliError {
    error::from_client("scrub", name, e)
}

fn end(args: &job_args::Scrub, scrub: Scrub) -> Done {
    if args.json.json {
        output::json(&scrub)?;
    } else {
        output::print(&text(args.name.as_str(), &scrub))?;
    }
    let found = &scrub.found;
    if found.is_clean() && scrub.error.is_none() {
        return Ok(ExitCode::SUCCESS);
    }
    let mut wrong = wrong(found);
    wrong.extend(scrub.error.map(|e| format!("it could not go on: {e}")));
    Err(CliError::new("scrub", &args.name, wrong.join(", ")).then(
        "bring these blocks back from a backup; a block that the guest writes anew is whole again".to_owned(),
    ))
}

fn text(name: &str, scrub: &Scrub) -> String {
    let (done, total) = scrub.progress();
    let percent = done.saturating_mul(100).checked_div(total).unwrap_or(100);
    let status = match scrub.status {
        ScrubStatus::Running => "running",
        ScrubStatus::Paused => "paused",
        ScrubStatus::Concluded => "done",
        ScrubStatus::Cancelled => "cancelled",
        ScrubStatus::Failed => "failed",
    };
    let speed = match scrub.speed {
        0 => "no limit".to_owned(),
        speed => format!("{} a second", size::human(speed)),
    };
    let pairs = vec![
        ("lun", name.to_owned()),
        ("scrub", format!("{status}, {percent} % of {}", size::human(total))),
        ("speed", speed),
        ("read", size::human(scrub.read_bytes)),
    ];
    found_text(pairs, &scrub.found)
}
