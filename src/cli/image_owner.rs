//! `tcmu-dif image owner`: whose an image on shared storage is, and how it comes to another host when its own is gone.

use std::{path::Path, process::ExitCode};

use serde_json::{Value, json};

use super::{CliError, Done, image_args::ImageOwner, output};
use crate::{
    admin::images,
    image::{
        nbd::is_uri,
        open::{OpenError, OpenOptions, open_any_size},
        owner::{self, Claim, OwnerError, OwnerState, Record},
    },
    sys,
    volume::Volume,
};

/// Runs it.
pub fn run(args: &ImageOwner) -> Done {
    let path = &args.path;
    let refused = |e: OwnerError| CliError::from("image", path.display(), &e).maybe_next(e.next_step(path));
    if args.share || args.take_over {
        // Where it would lie is not where another host looks.
        let plain = path.metadata().map_err(|e| CliError::from("image", path.display(), &e))?.is_file();
        if !plain || is_uri(path) {
            return Err(CliError::new(
                "image",
                path.display(),
                "an owner is kept of files alone, on a file system that several hosts have",
            )
            .then("have one host at a time use it, by other means"));
        }
    }
    let claim = || Claim::of_this_host().map_err(|e| CliError::from("image", "machine-id", &e));
    let record = if args.share {
        Some(share(path, claim()?)?)
    } else if args.take_over {
        Some(owner::take_over(path, &claim()?, args.force).map_err(refused)?)
    } else {
        owner::read(path).map_err(refused)?
    };
    if args.json.json {
        return output::json(&record.as_ref().map_or(json!({ "shared": false }), described));
    }
    match record {
        None => output::print(&format!("{}: is not shared: no other host is kept from it", path.display())),
        Some(record) => said(path, &record),
    }
}

/// Begins to keep whose an image is, while nobody uses it: who does has not taken it.
fn share(path: &Path, claim: Claim) -> Result<Record, CliError> {
    let refused = |e: OwnerError| CliError::from("image", path.display(), &e).maybe_next(e.next_step(path));
    if let Some(there) = owner::read(path).map_err(refused)? {
        return Ok(there);
    }
    let at = path.to_owned();
    let shared = sys::run(async move |io| {
        let image = open_any_size(&io, &at, &OpenOptions::default()).await?;
        let shared = owner::share(&at, &claim);
        Ok((shared, image.close().await))
    });
    let (shared, closed) = shared.map_err(|e: OpenError| images::open_failed(path, &e))?;
    closed.map_err(|e| CliError::from("image", path.display(), &e))?;
    shared.map_err(refused)
}

fn word(state: OwnerState) -> &'static str {
    match state {
        OwnerState::Released => "released",
        OwnerState::Held => "held",
        OwnerState::TakingOver => "being taken over",
    }
}

fn described(record: &Record) -> Value {
    json!({
        "shared": true, "state": word(record.state), "generation": record.generation, "host": record.host.name,
        "machine-id": uuid::Uuid::from_bytes(record.host.id).simple().to_string(), "written": record.written,
        "lease-ms": u64::try_from(record.lease.as_millis()).unwrap_or(u64::MAX),
    })
}

fn said(path: &Path, record: &Record) -> Result<ExitCode, CliError> {
    let whose = match record.state {
        OwnerState::Released => "nobody; last ".to_owned() + &record.host.name,
        OwnerState::Held | OwnerState::TakingOver => record.host.name.clone(),
    };
    output::print(&output::lines(&[
        ("image", path.display().to_string()),
        ("owner", whose),
        ("state", word(record.state).to_owned()),
        ("generation", record.generation.to_string()),
    ]))
}
