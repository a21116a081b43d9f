//! `tcmu-dif image check` and `image repair`: qemu-img's words, numbers and exit statuses.

use std::{path::Path, process::ExitCode};

use serde::Serialize;

use super::{
    CliError, Done,
    image_args::{ImageCheck, ImageRepair, Printed, What},
    output,
    pi::{advance, bar},
};
use crate::{
    admin::images::open_failed,
    image::{
        Format,
        open::{OpenError, OpenErrorKind},
        qcow2::{CheckReport, Repair},
        tools::{self, CheckOptions},
    },
    sys,
};

/// Exit statuses, as `qemu-img check` has them; 1 is that of every failure.
const CORRUPT: u8 = 2;
const LEAKS: u8 = 3;
const NOT_SUPPORTED: u8 = 63;

/// Runs `image check`.
pub fn check(args: &ImageCheck) -> Done {
    let repair = args.repair.map(|what| match what {
        What::Leaks => Repair::Leaks,
        What::All => Repair::All,
    });
    let options = CheckOptions { format: args.format, repair, lock: !args.force_share };
    run("image check", &args.path, options, args.printed)
}

/// Runs `image repair`, which is `image check -r all`.
pub fn repair(args: &ImageRepair) -> Done {
    let options = CheckOptions { format: args.format, repair: Some(Repair::All), lock: true };
    run("image repair", &args.path, options, args.printed)
}

/// What `qemu-img check --output=json` prints: numbers that are 0 are left out, but for check-errors.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Json<'a> {
    filename: String,
    format: String,
    check_errors: u64,
    #[serde(skip_serializing_if = "is_zero")]
    image_end_offset: u64,
    #[serde(skip_serializing_if = "is_zero")]
    corruptions: u64,
    #[serde(skip_serializing_if = "is_zero")]
    leaks: u64,
    #[serde(skip_serializing_if = "is_zero")]
    corruptions_fixed: u64,
    #[serde(skip_serializing_if = "is_zero")]
    leaks_fixed: u64,
    #[serde(skip_serializing_if = "is_zero")]
    total_clusters: u64,
    #[serde(skip_serializing_if = "is_zero")]
    allocated_clusters: u64,
    #[serde(skip_serializing_if = "is_zero")]
    fragmented_clusters: u64,
    #[serde(skip_serializing_if = "is_zero")]
    compressed_clusters: u64,
    /// Ours: what was found, in words.
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    findings: &'a [String],
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde gives a reference.
fn is_zero(n: &u64) -> bool {
    *n == 0
}

fn run(command: &'static str, path: &Path, options: CheckOptions, printed: Printed) -> Done {
    let bar = bar(if options.repair.is_some() { "repairing" } else { "checking" });
    let step = advance(&bar);
    let at = path.to_owned();
    let checked = sys::run(async move |io| tools::check(&io, &at, options, step).await);
    bar.finish_and_clear();
    let failed = |e: OpenError| match e.what {
        // What a look would say has just been said.
        OpenErrorKind::Corrupt => open_failed(path, &e).then("restore the image from a backup"),
        _ => open_failed(path, &e),
    };
    let Some(report) = checked.map_err(failed)? else {
        let reason = "raw images keep nothing that could be checked";
        return Err(CliError::new(command, path.display(), reason)
            .then("look at the content with the guest's own tools")
            .with_status(NOT_SUPPORTED));
    };
    if printed.as_json() {
        output::json(&Json {
            filename: path.display().to_string(),
            format: Format::Qcow2.to_string(),
            check_errors: report.check_errors,
            image_end_offset: report.image_end_offset,
            corruptions: report.corruptions,
            leaks: report.leaks,
            corruptions_fixed: report.corruptions_fixed,
            leaks_fixed: report.leaks_fixed,
            total_clusters: report.total_clusters,
            allocated_clusters: report.allocated_clusters,
            fragmented_clusters: report.fragmented_clusters,
            compressed_clusters: report.compressed_clusters,
            findings: &report.findings,
        })?;
    } else {
        output::print(&text(path, &report, options.repair.is_some()))?;
    }
    if report.check_errors > 0 {
        let reason = format!("{} things could not be looked at", report.check_errors);
        let next = "read the rest into a new image: qemu-img convert --salvage -O qcow2 OLD NEW";
        return Err(CliError::new(command, path.display(), reason).then(next));
    }
    Ok(ExitCode::from(match () {
        () if report.corruptions > 0 => CORRUPT,
        () if report.leaks > 0 => LEAKS,
        () => 0,
    }))
}

fn text(path: &Path, r: &CheckReport, repaired: bool) -> String {
    let mut out: Vec<String> = r.findings.clone();
    if r.more_findings > 0 {
        out.push(format!("and {} more", r.more_findings));
    }
    if r.corruptions_fixed + r.leaks_fixed > 0 {
        out.push(format!(
            "The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    {} corruptions\n",
            r.leaks_fixed, r.corruptions_fixed
        ));
    }
    if r.is_clean() {
        out.push("No errors were found on the image.".to_owned());
    }
    if r.corruptions > 0 {
        out.push(format!(
            "\n{} errors were found on the image.\n\
             Data may be corrupted, or further writes to the image may corrupt it.",
            r.corruptions
        ));
    }
    if r.leaks > 0 {
        out.push(format!(
            "\n{} leaked clusters were found on the image.\n\
             This means waste of disk space, but no harm to data.",
            r.leaks
        ));
    }
    if r.check_errors > 0 {
        out.push(format!("\n{} internal errors have occurred during the check.", r.check_errors));
    }
    if r.total_clusters > 0 && r.allocated_clusters > 0 {
        let percent = |part: u64, whole: u64| part as f64 * 100.0 / whole as f64;
        out.push(format!(
            "{}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters",
            r.allocated_clusters,
            r.total_clusters,
            percent(r.allocated_clusters, r.total_clusters),
            percent(r.fragmented_clusters, r.allocated_clusters),
            percent(r.compressed_clusters, r.allocated_clusters)
        ));
    }
    out.push(format!("Image end offset: {}", r.image_end_offset));
    let command = match (r.corruptions + r.leaks > 0 || r.marked, repaired) {
        (false, _) => return out.join("\n"),
        (true, false) => format!("mend it: tcmu-dif image repair {}", path.display()),
        (true, true) => {
            let path = path.display();
            format!(
                "what is left cannot be mended in place; copy what can be read: qemu-img convert -O qcow2 {path} NEW"
            )
        }
    };
    if r.marked {
        out.push("The image is marked dirty or corrupt.".to_owned());
    }
    out.push(format!("  next: {command}"));
    out.join("\n")
}
