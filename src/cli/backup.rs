//! `tcmu-dif backup` and `tcmu-dif bitmap`: clients of the daemon, which does the work.

use serde_json::{Value, json};

use super::{
    CliError, Done,
    args::Cli,
    chain::{ends, pairs},
    job::{Asked, Copying, absolute, one, said},
    job_args::{Backup, BackupSync, Bitmap, BitmapMode, OneBitmap, word},
    output, size,
};

/// Runs `backup`.
pub fn backup(cli: &Cli, args: &Backup) -> Done {
    let pairs = pairs("backup", &args.pairs, absolute)?;
    let about = pairs.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(", ");
    for (option, given) in [("--job-id", args.job_id.is_some()), ("--sidecar", args.sidecar.is_some())] {
        if given && pairs.len() > 1 {
            return Err(CliError::new("backup", &about, format!("{option} is for one LUN"))
                .then(format!("leave out {option}, or back them up one by one")));
        }
    }
    // One that only keeps what is overwritten has no end of its own.
    let waits = !args.background && args.sync != BackupSync::None;
    let ids: Vec<&str> = pairs.iter().map(|(name, _)| args.job_id.as_deref().unwrap_or(name)).collect();
    let orders = pairs.iter().zip(&ids).map(|((name, target), id)| order_of(args, (name, id, target), waits));
    let orders: Vec<Value> = orders.collect();
    let mut asked = Asked::new(cli, "backup", &about)?;
    asked.ask_of_all("drive-backup", orders)?;
    let (mut told, mut lines, mut failed) = (Vec::new(), String::new(), None);
    for ((name, target), id) in pairs.iter().zip(&ids) {
        // What it says of an error names this one.
        let mut asked = Asked::new(cli, "backup", name)?;
        match waits.then(|| ends(&mut asked, id, "backing up")) {
            Some(Ok(true)) => {
                told.push(json!({ "id": id, "lun": name, "target": target, "done": true }));
                lines += &format!("{target} is {name} as it was when the backup began\n");
            }
            // The others go on, and are waited for.
            Some(Err(e)) => failed = failed.or(Some(e)),
            Some(Ok(false)) | None => {
                let job = asked.job(id)?.unwrap_or_default();
                lines += &one(&job);
                told.push(job);
            }
        }
    }
    let all = match (pairs.len(), told.pop()) {
        (1, Some(one)) => one,
        (_, last) => told.into_iter().chain(last).collect(),
    };
    match failed {
        None => said(args.json.json, all, || lines),
        Some(e) => {
            if pairs.len() > 1 {
                said(args.json.json, all, || lines)?;
            }
            Err(e)
        }
    }
}

/// What `drive-backup` is told of one LUN.
fn order_of(args: &Backup, (name, id, target): (&str, &str, &str), waits: bool) -> Value {
    let copying = Copying {
        name,
        id,
        target,
        existing: args.existing,
        format: args.format,
        sidecar: args.sidecar.as_deref(),
        sync: word(&args.sync).into(),
        speed: args.speed,
        share: args.share,
        on_source_error: args.on_source_error,
        on_target_error: args.on_target_error,
        // Kept until this command has told what came of it.
        auto_dismiss: !waits,
    };
    let mut arguments = copying.arguments();
    if let Some(bitmap) = &args.bitmap {
        let mode = args.bitmap_mode.unwrap_or(BitmapMode::OnSuccess);
        arguments.insert("bitmap".to_owned(), bitmap.as_str().into());
        arguments.insert("bitmap-mode".to_owned(), word(&mode).into());
    }
    Value::Object(arguments)
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
                b if b["busy"] == true => "in use",
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
