//! The point in time of `tcmu-dif export`: the job that keeps it, begun and ended.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use serde_json::{Map, Value, json};

use super::{CliError, error, export::words, export_args::Export};
use crate::{
    control::client::{Client, ClientError},
    lun::jobs::CANCELED,
};

/// How often one looks whether the job has ended, and for how long.
const LOOK: Duration = Duration::from_millis(50);
const PATIENCE: Duration = Duration::from_secs(60);

/// A backup job that keeps what a LUN was.
pub(super) struct Past {
    lun: String,
    pub(super) job: String,
    pub(super) scratch: String,
}

/// The job's name. No LUN has it: theirs have no such character.
fn job_of(lun: &str) -> String {
    format!("point-in-time@{lun}")
}

impl Past {
    fn failed(&self, e: &ClientError) -> CliError {
        failed(&self.lun, e)
    }

    /// The one of that LUN, if there is one, or was and is lost.
    pub(super) fn found(client: &mut Client, lun: &str) -> Result<Option<Past>, CliError> {
        let job = job_of(lun);
        let there = look(client, &job).map_err(|e| failed(lun, &e))?;
        let all = client.execute("query-block-exports", Map::new()).map_err(|e| failed(lun, &e))?;
        let exported = all.as_array().into_iter().flatten().any(|e| e["id"] == lun && e["node-name"] == job);
        let scratch =
            there.as_ref().and_then(|found| found["target"].as_str()).unwrap_or_default().to_owned();
        Ok((exported || there.is_some()).then(|| Past { lun: lun.to_owned(), job, scratch }))
    }

    /// Keeps from now on what the LUN is now.
    pub(super) fn begin(client: &mut Client, args: &Export) -> Result<Past, CliError> {
        let lun = args.name.as_str();
        let scratch = match &args.scratch {
            Some(path) => {
                std::path::absolute(path).map_err(|e| CliError::from("--scratch", path.display(), &e))?
            }
            None => beside_the_image(client, lun)?,
        };
        let past = Past { lun: lun.to_owned(), job: job_of(lun), scratch: scratch.display().to_string() };
        let before = look(client, &past.job).map_err(|e| past.failed(&e))?;
        if before.is_some_and(|job| job["status"] == "concluded") {
            // Whoever asked for it has never ended it. The name is needed.
            past.dismiss(client)?;
        }
        let mut order = json!({
            "device": lun, "job-id": past.job, "target": past.scratch, "format": "qcow2", "sync": "none", "scratch": true,
            // Kept until somebody has heard what came of it.
            "auto-dismiss": false,
        });
        if let Some(bitmap) = args.bitmap.first() {
            order["bitmap"] = json!(bitmap);
            order["bitmap-mode"] = json!("on-success");
        }
        let next = "a LUN has one job, and one point in time, at a time: tcmu-dif job list; --scratch names another place for what is overwritten";
        match client.execute("drive-backup", words(order)) {
            Ok(_) => Ok(past),
            Err(e @ ClientError::Refused(_)) => Err(past.failed(&e).then(next)),
            Err(e) => Err(past.failed(&e)),
        }
    }

    /// Ends it; gives why it had been lost before, if it had, which is an error if all should have been `copied`.
    pub(super) fn end(self, client: &mut Client, copied: bool) -> Result<Option<String>, CliError> {
        let verb = if copied { "job-complete" } else { "job-cancel" };
        let end = Instant::now() + PATIENCE;
        let (mut told, mut heard) = (false, false);
        let job = loop {
            match look(client, &self.job).map_err(|e| self.failed(&e))? {
                None => break Value::Null,
                Some(job) if job["status"] == "concluded" => break job,
                Some(_) if told && Instant::now() >= end => {
                    return Err(CliError::new(
                        "export",
                        &self.lun,
                        "the job that keeps its point in time does not end",
                    )
                    .then(format!(
                        "see how it does: tcmu-dif job list; end it: tcmu-dif job cancel {}",
                        self.job
                    )));
                }
                Some(_) if !told => {
                    told = true;
                    match client.execute(verb, words(json!({ "id": self.job }))) {
                        Ok(_) => heard = true,
                        // It has ended meanwhile, or been lost: that is looked at next.
                        Err(ClientError::Refused(_)) => {}
                        Err(e) => return Err(self.failed(&e)),
                    }
                }
                Some(_) => std::thread::sleep(LOOK),
            }
        };
        if !job.is_null() {
            self.dismiss(client)?;
        }
        // That it was told to end is not why.
        let why = job["error"].as_str().filter(|why| copied || !heard || *why != CANCELED);
        match why.or((!heard).then_some("the job that kept it had been ended")) {
            None => Ok(None),
            Some(why) if copied => {
                Err(CliError::new("export", &self.lun, format!("its point in time was lost: {why}")).then(
                    "what was copied is not to be used; the dirty bitmap has all that it had: copy anew",
                ))
            }
            Some(why) => Ok(Some(why.to_owned())),
        }
    }

    fn dismiss(&self, client: &mut Client) -> Result<(), CliError> {
        let done = client.execute("job-dismiss", words(json!({ "id": self.job })));
        done.map(drop).map_err(|e| self.failed(&e))
    }
}

fn failed(lun: &str, e: &ClientError) -> CliError {
    error::from_client("export", lun, e)
}

fn look(client: &mut Client, id: &str) -> Result<Option<Value>, ClientError> {
    let jobs = client.execute("query-block-jobs", Map::new())?;
    Ok(jobs.as_array().into_iter().flatten().find(|job| job["device"] == id).cloned())
}

/// Where the image lies, if it is a file.
fn beside_the_image(client: &mut Client, lun: &str) -> Result<PathBuf, CliError> {
    let luns = client.execute("query-luns", Map::new()).map_err(|e| failed(lun, &e))?;
    let found = luns.as_array().into_iter().flatten().find(|one| one["name"] == lun);
    let Some(image) = found.and_then(|one| one["image"].as_str()) else {
        return Err(
            CliError::new("export", lun, "it is not served").then("tcmu-dif list tells which LUNs are")
        );
    };
    if !std::fs::metadata(image).is_ok_and(|found| found.is_file()) {
        return Err(CliError::new(
            "export",
            lun,
            format!("its image {image} is no file, beside which another could be made"),
        )
        .then("say where what is overwritten is kept meanwhile: --scratch /PATH"));
    }
    Ok(format!("{image}.scratch").into())
}
