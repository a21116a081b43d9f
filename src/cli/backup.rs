//! `tcmu-dif backup` and `tcmu-dif bitmap`: clients of the daemon, which does the work.

use serde_json::{Map, Value, json};

use super::{
    CliError, Done,
    args::Cli,
    chain::ends,
    job::{Asked, absolute, one, said},
    job_args::{Backup, BackupSync, Bitmap, BitmapMode, OneBitmap, word},
    output, size,
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
    given("bitmap", args.bitmap.clone().map(Into::into));
    if args.bitmap.is_some() {
        let mode = args.bitmap_mode.unwrap_or(BitmapMode::OnSuccess);
        given("bitmap-mode", Some(word(&mode).into()));
    }
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

/// Runs `bitmap`.
pub fn bitmap(cli: &Cli, bitmap: &Bitmap) -> Done {
    let named = |one: &OneBitmap| json!({ "node": one.name.as_str(), "name": one.bitmap });
    match bitmap {
        Bitmap::Add { one, granularity, persistent, disabled } => {
            let mut arguments = named(one);
            arguments["granularity"] = (*granularity).into();
            arguments["persistent"] = (*persistent).into();
            arguments["disabled"] = (*disabled).into();
            order(cli, one, "add", arguments)
        }
        Bitmap::Remove(one) => order(cli, one, "remove", named(one)),
        Bitmap::Clear(one) => order(cli, one, "clear", named(one)),
        Bitmap::Enable(one) => order(cli, one, "enable", named(one)),
        Bitmap::Disable(one) => order(cli, one, "disable", named(one)),
        Bitmap::Merge { one, from } => {
            let arguments = json!({ "node": one.name.as_str(), "target": one.bitmap, "bitmaps": from });
            order(cli, one, "merge", arguments)
        }
        Bitmap::List { name, json } => {
            let mut asked = Asked::new(cli, "bitmap", &format!("list {name}"))?;
            let all = listed(&mut asked, name.as_str())?;
            said(json.json, all.clone(), || table(&all))
        }
    }
}

fn order(cli: &Cli, one: &OneBitmap, verb: &str, arguments: Value) -> Done {
    let mut asked = Asked::new(cli, "bitmap", &format!("{verb} {} {}", one.name, one.bitmap))?;
    asked.ask(&format!("block-dirty-bitmap-{verb}"), arguments)?;
    let all = listed(&mut asked, one.name.as_str())?;
    said(one.json.json, all.clone(), || table(&all))
}

/// The dirty bitmaps of a LUN.
fn listed(asked: &mut Asked, lun: &str) -> Result<Value, CliError> {
    let blocks = asked.ask("query-block", json!({}))?;
    let found = blocks.as_array().into_iter().flatten().find(|block| block["device"] == lun);
    let Some(block) = found else {
        return Err(CliError::new("bitmap", lun, "it is not served".to_owned())
            .then("tcmu-dif list tells which LUNs are"));
    };
    let all = block["inserted"]["dirty-bitmaps"].as_array().cloned().unwrap_or_default();
    Ok(Value::Array(all))
}

fn table(all: &Value) -> String {
    let rows: Vec<Vec<String>> = all
        .as_array()
        .into_iter()
        .flatten()
        .map(|bitmap| {
            let number = |key: &str| bitmap[key].as_u64().unwrap_or(0);
            let state = match bitmap {
                b if b["inconsistent"] == true => "inconsistent",
                b if b["busy"] == true => "in a backup",
                b if b["recording"] == true => "enabled",
                _ => "disabled",
            };
            let kept = if bitmap["persistent"] == true { "in the image" } else { "until the LUN stops" };
            let name = bitmap["name"].as_str().unwrap_or_default().to_owned();
            let (granularity, count) = (size::human(number("granularity")), size::human(number("count")));
            vec![name, state.to_owned(), count, granularity, kept.to_owned()]
        })
        .collect();
    if rows.is_empty() {
        return "no dirty bitmaps\n".to_owned();
    }
    output::table(&["BITMAP", "STATE", "MARKED", "GRANULARITY", "KEPT"], rows)
}
