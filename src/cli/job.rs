//! `tcmu-dif mirror` and `tcmu-dif job`: clients of the daemon, which does the work.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use serde_json::{Map, Value, json};

use super::{
    CliError, Done,
    args::Cli,
    error,
    job_args::{self, Job, Mirror, OnError, word},
    output,
    pi::{advance, bar},
    size,
};
use crate::{
    control::{
        SOCKET,
        client::{Client, ClientError},
    },
    image::{Format, nbd::is_uri},
    lun::jobs::CANCELED,
};

/// How often a command asks how far a job is.
const LOOK: Duration = Duration::from_millis(200);

/// The daemon, asked about jobs.
pub(super) struct Asked {
    command: &'static str,
    about: String,
    client: Client,
}

impl Asked {
    pub(super) fn new(cli: &Cli, command: &'static str, about: &str) -> Result<Asked, CliError> {
        let socket: PathBuf = cli.run_dir.join(SOCKET);
        let client = Client::connect(&socket).map_err(|e| failed(command, about, &e))?;
        Ok(Asked { command, about: about.to_owned(), client })
    }

    pub(super) fn ask(&mut self, verb: &str, arguments: Value) -> Result<Value, CliError> {
        let Value::Object(arguments) = arguments else { return Ok(Value::Null) };
        self.client.execute(verb, arguments).map_err(|e| failed(self.command, &self.about, &e))
    }

    /// Asks it of one LUN, or of several in a transaction.
    pub(super) fn ask_of_all(&mut self, verb: &str, mut orders: Vec<Value>) -> Result<Value, CliError> {
        if let [one] = &mut orders[..] {
            return self.ask(verb, one.take());
        }
        let actions: Vec<Value> =
            orders.into_iter().map(|data| json!({ "type": verb, "data": data })).collect();
        self.ask("transaction", json!({ "actions": actions }))
    }

    /// The block job of that name.
    pub(super) fn job(&mut self, id: &str) -> Result<Option<Value>, CliError> {
        let jobs = self.ask("query-block-jobs", json!({}))?;
        Ok(jobs.as_array().into_iter().flatten().find(|job| job["device"] == id).cloned())
    }

    /// Shows how far a job is, until that holds of it or it is no more.
    pub(super) fn follow(
        &mut self,
        id: &str,
        words: &'static str,
        done: impl Fn(&Value) -> bool,
    ) -> Result<Option<Value>, CliError> {
        let bar = bar(words);
        let mut step = advance(&bar);
        let job = loop {
            let job = self.job(id)?;
            match job {
                Some(job) if !done(&job) => {
                    let of = |key: &str| job[key].as_u64().unwrap_or(0);
                    step(of("offset"), of("len"));
                }
                other => break other,
            }
            std::thread::sleep(LOOK);
        };
        bar.finish_and_clear();
        Ok(job)
    }

    /// Waits until the job that this command has begun has ended, and has it forgotten; an error is its own. If somebody else had it
    /// forgotten, nobody knows what came of it.
    pub(super) fn end(&mut self, id: &str, words: &'static str) -> Result<(), CliError> {
        match self.concluded(id, words)? {
            Some(job) => self.judged(&job),
            None => {
                let reason = "another command has ended the job, and what came of it is not known".to_owned();
                Err(CliError::new(self.command, &self.about, reason).then(
                    "see what the LUN has (tcmu-dif show), and begin anew if it is not that".to_owned(),
                ))
            }
        }
    }

    /// Waits until a job that was told to end has done so, and has it forgotten, whoever began it.
    fn told_to_end(&mut self, id: &str) -> Result<(), CliError> {
        match self.concluded(id, "ending")? {
            Some(job) if job["error"] != CANCELED => self.judged(&job),
            _ => Ok(()),
        }
    }

    /// Waits until a job has concluded, and has it forgotten; none if there is none any more.
    fn concluded(&mut self, id: &str, words: &'static str) -> Result<Option<Value>, CliError> {
        let job = self.follow(id, words, |job| job["status"] == "concluded")?;
        if job.is_some() {
            // Somebody else may have been quicker.
            let _ = self.ask("job-dismiss", json!({ "id": id }));
        }
        Ok(job)
    }

    fn judged(&self, job: &Value) -> Result<(), CliError> {
        match job["error"].as_str() {
            None => Ok(()),
            Some(reason) => Err(CliError::new(self.command, &self.about, reason.to_owned())
                .then("the LUN goes on with its image; end the cause, and begin anew".to_owned())),
        }
    }
}

fn failed(command: &'static str, about: &str, e: &ClientError) -> CliError {
    let said = error::from_client(command, about, e);
    match e {
        ClientError::Refused(_) => said.then("see the LUNs and the jobs: tcmu-dif list, tcmu-dif job list"),
        _ => said,
    }
}

/// What a job that copies to another image is told.
pub(super) struct Copying<'a> {
    pub(super) name: &'a str,
    pub(super) id: &'a str,
    pub(super) target: &'a str,
    pub(super) existing: bool,
    pub(super) format: Option<Format>,
    pub(super) sidecar: Option<&'a Path>,
    pub(super) sync: Value,
    pub(super) speed: u64,
    pub(super) share: u64,
    pub(super) on_source_error: OnError,
    pub(super) on_target_error: OnError,
    pub(super) auto_dismiss: bool,
}

impl Copying<'_> {
    pub(super) fn arguments(&self) -> Map<String, Value> {
        let mode = if self.existing { "existing" } else { "absolute-paths" };
        let mut arguments = Map::from_iter([
            ("device".to_owned(), self.name.into()),
            ("job-id".to_owned(), self.id.into()),
            ("target".to_owned(), self.target.into()),
            ("mode".to_owned(), mode.into()),
            ("sync".to_owned(), self.sync.clone()),
            ("speed".to_owned(), self.speed.into()),
            ("share".to_owned(), self.share.into()),
            ("on-source-error".to_owned(), word(&self.on_source_error).into()),
            ("on-target-error".to_owned(), word(&self.on_target_error).into()),
            ("auto-dismiss".to_owned(), self.auto_dismiss.into()),
        ]);
        let format = self.format.map(|f| f.to_string());
        for (key, given) in [("format", format), ("sidecar", self.sidecar.map(absolute))] {
            if let Some(given) = given {
                arguments.insert(key.to_owned(), given.into());
            }
        }
        arguments
    }
}

/// Runs `mirror`.
pub fn mirror(cli: &Cli, args: &Mirror) -> Done {
    let name = args.name.as_str();
    let target = absolute(&args.target);
    let id = args.job_id.as_deref().unwrap_or(name);
    let mut asked = Asked::new(cli, "mirror", name)?;
    let copying = Copying {
        name,
        id,
        target: &target,
        existing: args.existing,
        format: args.format,
        sidecar: args.sidecar.as_deref(),
        sync: word(&args.sync).into(),
        speed: args.speed,
        share: args.share,
        on_source_error: args.on_source_error,
        on_target_error: args.on_target_error,
        // Kept until this command has told what came of it.
        auto_dismiss: args.background,
    };
    let mut arguments = copying.arguments();
    arguments.insert("copy-mode".to_owned(), word(&args.copy_mode).into());
    if let Some(granularity) = args.granularity {
        arguments.insert("granularity".to_owned(), granularity.into());
    }
    asked.ask("drive-mirror", Value::Object(arguments))?;
    if !args.background {
        let stands =
            |job: &Value| job["ready"] == true || ["concluded", "paused"].iter().any(|s| job["status"] == *s);
        let job = asked.follow(id, "mirroring", stands)?;
        if job.as_ref().is_none_or(|job| job["status"] == "concluded") {
            asked.end(id, "mirroring")?;
        } else if args.complete && job.is_some_and(|job| job["ready"] == true) {
            asked.ask("block-job-complete", json!({ "device": id }))?;
            asked.end(id, "going over")?;
            return said(
                args.json.json,
                json!({ "id": id, "lun": name, "image": target, "done": true }),
                || format!("{name} has the image {target} now\n"),
            );
        }
    }
    let job = asked.job(id)?.unwrap_or_default();
    said(args.json.json, job.clone(), || one(&job))
}

/// What the daemon is told of an image: its absolute path, or its NBD URI as it is.
pub(super) fn absolute(path: &Path) -> String {
    let absolute = if is_uri(path) { None } else { std::path::absolute(path).ok() };
    absolute.unwrap_or(path.to_owned()).display().to_string()
}

pub(super) fn said(json: bool, value: Value, text: impl FnOnce() -> String) -> Done {
    if json { output::json(&value) } else { output::print(&text()) }
}

/// Runs `job`.
pub fn job(cli: &Cli, job: &Job) -> Done {
    match job {
        Job::List(json) => list(cli, json.json),
        Job::Complete(one) => {
            order(cli, one, "complete", true, &mut |asked, id| asked.ask("job-complete", json!({ "id": id })))
        }
        Job::Cancel { one, force } => {
            order(cli, one, "cancel", true, &mut |asked, id| match id.strip_prefix("scrub-").is_some() {
                true => asked.ask("job-cancel", json!({ "id": id })),
                false => asked.ask("block-job-cancel", json!({ "device": id, "force": force })),
            })
        }
        Job::Pause(one) => {
            order(cli, one, "pause", false, &mut |asked, id| asked.ask("job-pause", json!({ "id": id })))
        }
        Job::Resume(one) => {
            order(cli, one, "resume", false, &mut |asked, id| asked.ask("job-resume", json!({ "id": id })))
        }
        Job::Share { one, share } => order(cli, one, "share", false, &mut |asked, id| {
            asked.ask("job-set-share", json!({ "id": id, "share": share }))
        }),
        Job::Speed { one, speed } => order(cli, one, "speed", false, &mut |asked, id| {
            asked.ask("block-job-set-speed", json!({ "device": id, "speed": speed }))
        }),
    }
}

type Order<'a> = &'a mut dyn FnMut(&mut Asked, &str) -> Result<Value, CliError>;

fn order(cli: &Cli, one: &job_args::One, verb: &'static str, ends: bool, tell: Order<'_>) -> Done {
    let id = one.id.as_str();
    let mut asked = Asked::new(cli, "job", &format!("{verb} {id}"))?;
    tell(&mut asked, id)?;
    if ends {
        asked.told_to_end(id)?;
        return said(one.json.json, json!({ "id": id, "ended": true }), || format!("{id} has ended\n"));
    }
    let job = asked.job(id)?.unwrap_or_default();
    match job.is_null() {
        true => said(one.json.json, json!({ "id": id }), String::new),
        false => said(one.json.json, job.clone(), || self::one(&job)),
    }
}

/// One job in lines.
pub(super) fn one(job: &Value) -> String {
    let text = |key: &str| job[key].as_str().unwrap_or_default().to_owned();
    let number = |key: &str| job[key].as_u64().unwrap_or(0);
    let mut pairs = vec![
        ("job", text("device")),
        ("lun", text("lun")),
        ("type", text("type")),
        ("status", text("status")),
        ("target", text("target")),
        ("copied", progress(number("offset"), number("len"))),
        ("speed", speed(number("speed"))),
    ];
    if job["share"].as_u64().is_some_and(|share| share < 100) {
        pairs.push(("share", format!("{} %", number("share"))));
    }
    if job["copy-mode"].is_string() {
        pairs.push(("copy mode", text("copy-mode")));
    }
    if number("repaired") > 0 {
        pairs.push(("repaired", number("repaired").to_string()));
    }
    if job["io-status"] != "ok" {
        pairs.push(("i/o", text("io-status")));
    }
    if let Some(error) = job["error"].as_str() {
        pairs.push(("error", error.to_owned()));
    }
    output::lines(&pairs)
}

fn progress(done: u64, all: u64) -> String {
    let percent = done.saturating_mul(100).checked_div(all).unwrap_or(100);
    format!("{percent} % of {}", size::human(all))
}

fn speed(bytes: u64) -> String {
    match bytes {
        0 => "no limit".to_owned(),
        bytes => format!("{} a second", size::human(bytes)),
    }
}

fn list(cli: &Cli, json: bool) -> Done {
    let mut asked = Asked::new(cli, "job", "list")?;
    let jobs = asked.ask("query-jobs", json!({}))?;
    let rows: Vec<Vec<String>> = jobs
        .as_array()
        .into_iter()
        .flatten()
        .map(|job| {
            let text = |key: &str| job[key].as_str().unwrap_or_default().to_owned();
            let number = |key: &str| job[key].as_u64().unwrap_or(0);
            let done = progress(number("current-progress"), number("total-progress"));
            vec![text("id"), text("type"), text("status"), done, text("error")]
        })
        .collect();
    said(json, jobs, || {
        if rows.is_empty() {
            return "no jobs\n".to_owned();
        }
        output::table(&["JOB", "TYPE", "STATUS", "DONE", "ERROR"], rows)
    })?;
    Ok(ExitCode::SUCCESS)
}
