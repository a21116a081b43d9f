//! `tcmu-dif snapshot`, over an image and within it, and `stream` and `commit`, which make a LUN's chain shorter: clients of the daemon, which does the work.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::{
    CliError, Done,
    args::Cli,
    job::{Asked, absolute, one, said},
    job_args::{Commit, CopyMode, OnError, Snapshot, Stream, word},
    output,
};

/// Runs `snapshot`.
pub fn snapshot(cli: &Cli, args: &Snapshot) -> Done {
    if args.internal || args.delete {
        return within(cli, args);
    }
    let pairs = pairs("snapshot", &args.pairs, absolute)?;
    let about = pairs.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(", ");
    let mut asked = Asked::new(cli, "snapshot", &about)?;
    let mode = if args.existing { "existing" } else { "absolute-paths" };
    let taken =
        |(name, file): &(String, String)| json!({ "device": name, "snapshot-file": file, "mode": mode });
    asked.ask_of_all("blockdev-snapshot-sync", pairs.iter().map(taken).collect())?;
    let images: Value = pairs.iter().map(|(name, file)| json!({ "lun": name, "image": file })).collect();
    said(args.json.json, images, || {
        let rows = pairs.iter().map(|(name, file)| vec![name.clone(), file.clone()]);
        output::table(&["LUN", "IMAGE NOW"], rows)
    })
}

/// Takes internal snapshots, or deletes them.
fn within(cli: &Cli, args: &Snapshot) -> Done {
    let pairs = pairs("snapshot", &args.pairs, |name| name.display().to_string())?;
    let about = pairs.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(", ");
    let mut asked = Asked::new(cli, "snapshot", &about)?;
    let data = |(lun, name): &(String, String)| json!({ "device": lun, "name": name });
    if args.delete {
        for pair in &pairs {
            asked.ask("blockdev-snapshot-delete-internal-sync", data(pair))?;
        }
    } else {
        asked.ask_of_all("blockdev-snapshot-internal-sync", pairs.iter().map(data).collect())?;
    }
    let (word, heading) = if args.delete { ("deleted", "DELETED") } else { ("taken", "TAKEN") };
    let told: Value = pairs.iter().map(|(lun, name)| json!({ "lun": lun, word: name })).collect();
    said(args.json.json, told, || {
        output::table(&["LUN", heading], pairs.iter().map(|(lun, name)| vec![lun.clone(), name.clone()]))
    })
}

/// LUNs and what goes with each, which were named by turns.
pub(super) fn pairs(
    command: &'static str,
    named: &[PathBuf],
    means: impl Fn(&Path) -> String,
) -> Result<Vec<(String, String)>, CliError> {
    let pair = |pair: &[PathBuf]| {
        let [name, file] = pair else {
            let name = pair.first().map(|n| n.display().to_string()).unwrap_or_default();
            return Err(CliError::new(command, name, "it has no FILE".to_owned()).then(format!(
                "name a LUN and a file, by turns: tcmu-dif {command} vm1 /a.qcow2 vm2 /b.qcow2"
            )));
        };
        Ok((name.display().to_string(), means(file)))
    };
    named.chunks(2).map(pair).collect()
}

/// What a job that shortens a chain is told.
struct Order<'a> {
    command: &'static str,
    verb: &'static str,
    name: &'a str,
    id: &'a str,
    top: Option<&'a Path>,
    base: Option<&'a Path>,
    speed: u64,
    share: u64,
    on_error: OnError,
    background: bool,
    copy_mode: Option<CopyMode>,
}

impl Order<'_> {
    fn begin(&self, cli: &Cli) -> Result<Asked, CliError> {
        let mut arguments = Map::from_iter([
            ("device".to_owned(), self.name.into()),
            ("job-id".to_owned(), self.id.into()),
            ("speed".to_owned(), self.speed.into()),
            ("share".to_owned(), self.share.into()),
            ("on-error".to_owned(), word(&self.on_error).into()),
            // Kept until this command has told what came of it.
            ("auto-dismiss".to_owned(), self.background.into()),
        ]);
        if let Some(mode) = &self.copy_mode {
            arguments.insert("copy-mode".to_owned(), word(mode).into());
        }
        for (word, given) in [("top", self.top), ("base", self.base)] {
            let Some(file) = given else { continue };
            let file = std::path::absolute(file)
                .map_err(|e| CliError::new(self.command, file.display(), e.to_string()))?;
            arguments.insert(word.to_owned(), file.display().to_string().into());
        }
        let mut asked = Asked::new(cli, self.command, self.name)?;
        asked.ask(self.verb, Value::Object(arguments))?;
        Ok(asked)
    }
}

/// Runs `stream`.
pub fn stream(cli: &Cli, args: &Stream) -> Done {
    let name = args.name.as_str();
    let id = args.job_id.as_deref().unwrap_or(name);
    let order = Order {
        command: "stream",
        verb: "block-stream",
        name,
        id,
        top: None,
        base: args.base.as_deref(),
        speed: args.speed,
        share: args.share,
        on_error: args.on_error,
        background: args.background,
        copy_mode: None,
    };
    let mut asked = order.begin(cli)?;
    if !args.background && ends(&mut asked, id, "streaming")? {
        let ended = json!({ "id": id, "lun": name, "done": true });
        return said(args.json.json, ended, || format!("{name} has a shorter chain now\n"));
    }
    let job = asked.job(id)?.unwrap_or_default();
    said(args.json.json, job.clone(), || one(&job))
}

/// Runs `commit`.
pub fn commit(cli: &Cli, args: &Commit) -> Done {
    let name = args.name.as_str();
    let id = args.job_id.as_deref().unwrap_or(name);
    let order = Order {
        command: "commit",
        verb: "block-commit",
        name,
        id,
        top: args.top.as_deref(),
        base: args.base.as_deref(),
        speed: args.speed,
        share: args.share,
        on_error: args.on_error,
        background: args.background,
        // Whoever waits for its end wants it to come, also while the guest writes all the time.
        copy_mode: Some(if args.background { CopyMode::Background } else { CopyMode::WriteBlocking }),
    };
    let mut asked = order.begin(cli)?;
    if !args.background {
        let stands = |job: &Value| {
            job["ready"] == true || ["concluded", "paused"].iter().any(|status| job["status"] == *status)
        };
        let job = asked.follow(id, "committing", stands)?;
        let image = job.as_ref().map(|job| job["target"].clone()).unwrap_or_default();
        if job.as_ref().is_none_or(|job| job["status"] == "concluded") {
            asked.end(id, "committing")?;
            let ended = json!({ "id": id, "lun": name, "done": true });
            return said(args.json.json, ended, || format!("{name} has a shorter chain now\n"));
        } else if job.is_some_and(|job| job["ready"] == true) {
            asked.ask("block-job-complete", json!({ "device": id }))?;
            asked.end(id, "going over")?;
            let ended = json!({ "id": id, "lun": name, "image": image, "done": true });
            return said(args.json.json, ended, || {
                format!("{name} has the image {} now\n", image.as_str().unwrap_or_default())
            });
        }
    }
    let job = asked.job(id)?.unwrap_or_default();
    said(args.json.json, job.clone(), || one(&job))
}

/// Waits until a job has ended, and has it forgotten; false if it has stopped, and waits to be resumed.
pub(super) fn ends(asked: &mut Asked, id: &str, words: &'static str) -> Result<bool, CliError> {
    let stands = |job: &Value| ["concluded", "paused"].iter().any(|status| job["status"] == *status);
    let job = asked.follow(id, words, stands)?;
    if job.is_some_and(|job| job["status"] == "paused") {
        return Ok(false);
    }
    asked.end(id, words)?;
    Ok(true)
}
