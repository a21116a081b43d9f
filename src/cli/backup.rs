//! `tcmu-dif backup`: a client of the daemon, which does the work.

use serde_json::{Map, Value, json};

use super::{
    CliError, Done,
    args::Cli,
    chain::ends,
    job::{Asked, absolute, one, said},
    job_args::{Backup, BackupSync, word},
};

/// Runs `backup`.
pub fn backup(cli: &Cli, args: &Backup) -> Done {
    let name = args.name.as_str();
    let target = std::path::absolute(&args.target)
        .map_err(|e| CliError::new("backup", args.target.display(), e.to_string()))?;
    // One that only keeps what is overwritten has no end of its own.
    let has_an_end = args.sync != BackupSync::None;
    let id = args.job_id.as_deref().unwrap_or(name);
    let mut arguments = Map::from_iter([
        ("device".to_owned(), name.into()),
        ("job-id".to_owned(), id.into()),
        ("target".to_owned(), target.display().to_string().into()),
        ("mode".to_owned(), if args.existing { "existing" } else { "absolute-paths" }.into()),
        ("sync".to_owned(), word(&args.sync).into()),
        ("speed".to_owned(), args.speed.into()),
        ("on-source-error".to_owned(), word(&args.on_source_error).into()),
        ("on-target-error".to_owned(), word(&args.on_target_error).into()),
        // Kept until this command has told what came of it.
        ("auto-dismiss".to_owned(), (args.background || !has_an_end).into()),
    ]);
    let mut given = |key: &str, value: Option<Value>| {
        if let Some(value) = value {
            arguments.insert(key.to_owned(), value);
        }
    };
    given("format", args.format.map(|f| f.to_string().into()));
    given("sidecar", args.sidecar.as_ref().map(|p| absolute(p).into()));
    let mut asked = Asked::new(cli, "backup", name)?;
    asked.ask("drive-backup", Value::Object(arguments))?;
    if !args.background && has_an_end && ends(&mut asked, id, "backing up")? {
        let ended = json!({ "id": id, "lun": name, "target": target, "done": true });
        return said(args.json.json, ended, || {
            format!("{} is {name} as it was when the backup began\n", target.display())
        });
    }
    let job = asked.job(id)?.unwrap_or_default();
    said(args.json.json, job.clone(), || one(&job))
}
