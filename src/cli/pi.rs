//! `tcmu-dif pi`, and the protection that `create` gives an image that has none yet.

use std::{
    io::IsTerminal,
    path::{Path, PathBuf},
    process::ExitCode,
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::{
    CliError, Done,
    args::{Pi, PiImage, PiRebuild},
    output, size,
};
use crate::{
    image::{
        Image,
        open::{OpenError, OpenOptions, open},
    },
    lun::{chain, config::pi_word},
    pi::{
        PiMode, PiType,
        chain::Beneath,
        error::PiOpenError,
        store::default_path,
        tools::{self, AdoptReport, BadBlock, RebuildOptions, RebuildReport, StatusReport, VerifyReport},
    },
    sys::{self, io::Io},
    units::BlockSize,
    volume::{IoError, Volume},
};

/// Runs `pi verify`, `pi rebuild`, `pi adopt` or `pi status`.
pub fn run(args: &Pi) -> Done {
    match args {
        Pi::Verify(args) => verify(args),
        Pi::Rebuild(args) => rebuild(args),
        Pi::Adopt(args) => adopt(args),
        Pi::Status(args) => status(args),
    }
}

/// What goes wrong with an image and its sidecar.
enum Failure {
    Image(OpenError),
    Sidecar(PiOpenError),
    Volume(IoError),
}

impl From<OpenError> for Failure {
    fn from(e: OpenError) -> Failure {
        Failure::Image(e)
    }
}

impl From<PiOpenError> for Failure {
    fn from(e: PiOpenError) -> Failure {
        Failure::Sidecar(e)
    }
}

impl From<IoError> for Failure {
    fn from(e: IoError) -> Failure {
        Failure::Volume(e)
    }
}

impl Failure {
    fn told(self, what: &str, image: &Path) -> CliError {
        let (reason, next) = match self {
            Failure::Image(e) => (chain(&e), e.next_step()),
            Failure::Sidecar(e) => (chain(&e), e.next_step()),
            Failure::Volume(e) => (chain(&e), None),
        };
        CliError::new(what, image.display(), reason).maybe_next(next)
    }
}

/// A bar on a terminal, and nothing anywhere else.
pub(super) fn bar(what: &'static str) -> ProgressBar {
    let bar = ProgressBar::new(0).with_message(what);
    if !std::io::stderr().is_terminal() {
        bar.set_draw_target(ProgressDrawTarget::hidden());
    }
    let style = ProgressStyle::with_template("{msg} {bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta}");
    bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

pub(super) fn advance(bar: &ProgressBar) -> impl FnMut(u64, u64) + 'static {
    let bar = bar.clone();
    move |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    }
}

/// Opens an image to read it while nobody writes to it.
async fn reader(io: &Io, image: &Path) -> Result<Image, OpenError> {
    open(io, image, &OpenOptions { read_only: true, ..OpenOptions::default() }).await
}

fn sidecar_of(image: &Path, named: Option<&PathBuf>) -> PathBuf {
    named.cloned().unwrap_or_else(|| default_path(image))
}

fn verify(args: &PiImage) -> Done {
    let bar = bar("verifying");
    let (image, sidecar) = (args.image.clone(), sidecar_of(&args.image, args.sidecar.as_ref()));
    let step = advance(&bar);
    let report = sys::run(async move |io| -> Result<VerifyReport, Failure> {
        let volume = reader(&io, &image).await?;
        let sidecar = tools::inspect(&io, &image, &sidecar).await?;
        let cluster = u64::from(volume.limits().discard_granularity);
        let beneath = Beneath::open(&io, &volume.files()[1..], sidecar.block_size(), cluster).await?;
        let mut report = tools::verify(&volume, &sidecar, &beneath, step).await?;
        tools::name_files(&mut report.bad, volume.places());
        Ok(report)
    });
    bar.finish_and_clear();
    let report = report.map_err(|e| e.told("pi verify", &args.image))?;
    if args.json.json {
        output::json(&report)?;
    } else {
        output::print(&verify_text(&args.image, &report))?;
    }
    if report.is_clean() {
        return Ok(ExitCode::SUCCESS);
    }
    Err(CliError::new("pi verify", args.image.display(), wrong(&report).join(", ")).then(format!(
        "bring these blocks back from a backup, or take the data as they are: tcmu-dif pi adopt {}",
        args.image.display()
    )))
}

fn verify_text(image: &Path, r: &VerifyReport) -> String {
    let pairs = vec![("image", image.display().to_string()), ("blocks", r.blocks.to_string())];
    found_text(pairs, r)
}

/// What is wrong, in words; nothing if nothing is.
pub(super) fn wrong(r: &VerifyReport) -> Vec<String> {
    let mut wrong = Vec::new();
    if r.mismatches > 0 {
        wrong.push(format!("{} blocks do not match their protection information", r.mismatches));
    }
    if r.unreadable > 0 {
        wrong.push(format!("{} blocks cannot be read", r.unreadable));
    }
    wrong
}

/// What was found, under lines that say where.
pub(super) fn found_text(mut pairs: Vec<(&str, String)>, r: &VerifyReport) -> String {
    pairs.extend([
        ("verified", r.verified.to_string()),
        ("unprotected", r.unprotected.to_string()),
        ("in doubt", r.in_doubt.to_string()),
        ("unreadable", r.unreadable.to_string()),
        ("mismatches", r.mismatches.to_string()),
    ]);
    let mut out = output::lines(&pairs);
    out.push_str(&bad_text(&r.bad, r.mismatches));
    out
}

/// A line for each block that does not match: which, what of it, and where it lies.
fn bad_text(bad: &[BadBlock], all: u64) -> String {
    let mut out = String::new();
    for b in bad {
        let file = b.file.as_ref().map_or("the image".into(), |f| f.display().to_string());
        let place = b.host_offset.map_or_else(String::new, |at| format!(" (byte {at} of {file})"));
        out.push_str(&format!(
            "\nblock {}: {} is {:#x}, expected {:#x}{place}",
            b.lba, b.tag, b.found, b.expected
        ));
    }
    if (bad.len() as u64) < all {
        out.push_str(&format!("\nand {} more", all - bad.len() as u64));
    }
    out
}

fn adopt(args: &PiImage) -> Done {
    let bar = bar("adopting");
    let (image, sidecar) = (args.image.clone(), sidecar_of(&args.image, args.sidecar.as_ref()));
    let step = advance(&bar);
    let report = sys::run(async move |io| -> Result<AdoptReport, Failure> {
        let volume = reader(&io, &image).await?;
        let mut report = tools::adopt(&io, &volume, &image, &sidecar, step).await?;
        tools::name_files(&mut report.changed, volume.places());
        Ok(report)
    });
    bar.finish_and_clear();
    let report = report.map_err(|e| e.told("pi adopt", &args.image))?;
    if args.json.json {
        return output::json(&report);
    }
    let mut text = output::lines(&[
        ("image", args.image.display().to_string()),
        ("blocks", report.blocks.to_string()),
        ("adopted", report.adopted.to_string()),
        ("protected", report.protected.to_string()),
        ("unreadable", report.unreadable.to_string()),
    ]);
    text.push_str(&bad_text(&report.changed, report.adopted));
    output::print(&text)
}

fn rebuild(args: &PiRebuild) -> Done {
    let sidecar = sidecar_of(&args.image, args.sidecar.as_ref());
    let report = make(&args.image, &sidecar, args.pi, args.mode, args.block_size)?;
    if args.json.json {
        return output::json(&report);
    }
    let pairs = [
        ("image", args.image.display().to_string()),
        ("sidecar", sidecar.display().to_string()),
        ("protection", report.pi.map_or("off", pi_word).to_owned()),
        ("mode", report.mode.to_string()),
        ("block size", report.block_size.to_string()),
        ("blocks", report.blocks.to_string()),
        ("protected", report.protected.to_string()),
        ("unreadable", report.unreadable.to_string()),
    ];
    output::print(&output::lines(&pairs))
}

fn make(
    image: &Path,
    sidecar: &Path,
    kind: Option<PiType>,
    mode: Option<PiMode>,
    block_size: Option<BlockSize>,
) -> Result<RebuildReport, CliError> {
    let bar = bar("protecting");
    let step = advance(&bar);
    let (path, sidecar) = (image.to_owned(), sidecar.to_owned());
    let report = sys::run(async move |io| -> Result<RebuildReport, Failure> {
        let volume = reader(&io, &path).await?;
        let format = volume.format().into();
        let options = RebuildOptions { kind, mode, block_size, format };
        Ok(tools::rebuild(&io, &volume, &path, &sidecar, options, step).await?)
    });
    bar.finish_and_clear();
    report.map_err(|e| e.told("pi rebuild", image))
}

/// Gives an image its first protection information, from the blocks as they are. Holes need none, so a new image is done
/// at once.
///
/// # Errors
/// No sidecar is left behind then.
pub fn protect(
    image: &Path,
    sidecar: &Path,
    kind: PiType,
    mode: PiMode,
    block_size: BlockSize,
) -> Result<(), CliError> {
    let report = make(image, sidecar, Some(kind), Some(mode), Some(block_size))?;
    if report.unreadable > 0 {
        tracing::warn!(
            "{}: {} blocks cannot be read, and are without protection",
            image.display(),
            report.unreadable
        );
    }
    Ok(())
}

fn status(args: &PiImage) -> Done {
    let (image, sidecar) = (args.image.clone(), sidecar_of(&args.image, args.sidecar.as_ref()));
    let at = sidecar.clone();
    let report = sys::run(async move |io| tools::status(&io, &image, &at).await);
    let report = report.map_err(|e| Failure::from(e).told("pi status", &args.image))?;
    if args.json.json {
        return output::json(&report);
    }
    output::print(&status_text(&args.image, &sidecar, &report))
}

fn status_text(image: &Path, sidecar: &Path, r: &StatusReport) -> String {
    let state = match r.image_changed {
        None => "in use, or left by a crash: what was being written is checked when it is opened",
        Some(false) => "closed cleanly",
        Some(true) => "the image has been changed by something else since",
    };
    let info = &r.info;
    let marked = info.marked_regions.saturating_mul(info.region_bytes);
    let mut pairs = vec![
        ("image", image.display().to_string()),
        ("sidecar", sidecar.display().to_string()),
        ("protection", pi_word(info.pi).to_owned()),
        ("mode", info.mode.to_string()),
        ("block size", info.block_size.to_string()),
        ("blocks", info.blocks.to_string()),
        ("state", state.to_owned()),
        ("uuid", info.uuid.clone()),
    ];
    if info.mode == PiMode::Bitmap {
        pairs.push(("marked", format!("{} regions, {}", info.marked_regions, size::human(marked))));
    }
    output::lines(&pairs)
}
