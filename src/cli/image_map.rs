//! `tcmu-dif image map`: where each range of the disk comes from, in the words and the JSON of `qemu-img map`.

use std::path::PathBuf;

use super::{CliError, Done, image_args::ImageMap, output};
use crate::{
    admin::images::open_failed,
    image::tools::{self, MapOptions, Mapped},
    sys,
};

/// Runs `image map`.
pub fn run(args: &ImageMap) -> Done {
    let options = MapOptions {
        format: args.format,
        lock: !args.force_share,
        start: args.start_offset.unwrap_or(0),
        len: args.max_length.unwrap_or(u64::MAX),
    };
    let at = args.path.clone();
    let (runs, files) = sys::run(async move |io| tools::map(&io, &at, options).await)
        .map_err(|e| open_failed(&args.path, &e))?;
    if args.printed.as_json() {
        return output::json(&runs);
    }
    output::print(&text(&runs, &files))?;
    if runs.iter().any(|run| run.data && !run.zero && run.offset.is_none()) {
        let reason = "some clusters are compressed and have no offset of their own";
        let next = format!("see them all: tcmu-dif image map --output json {}", args.path.display());
        return Err(CliError::new("image map", args.path.display(), reason).then(next));
    }
    Ok(std::process::ExitCode::SUCCESS)
}

fn text(runs: &[Mapped], files: &[PathBuf]) -> String {
    let mut out = vec![format!("{:<16}{:<16}{:<16}File", "Offset", "Length", "Mapped to")];
    for run in runs.iter().filter(|run| run.data && !run.zero) {
        let (Some(offset), Some(file)) = (run.offset, files.get(run.depth as usize)) else { continue };
        // C's %#x: 0 has no prefix.
        let hex = |n: u64| if n == 0 { "0".to_owned() } else { format!("{n:#x}") };
        out.push(format!("{:<16}{:<16}{:<16}{}", hex(run.start), hex(run.len), hex(offset), file.display()));
    }
    out.join("\n")
}
