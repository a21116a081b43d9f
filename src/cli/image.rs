//! `tcmu-dif image`, and what `create` does with images: look at one, make one.

use std::{
    fs::{self, File},
    io::Read,
    os::unix::fs::MetadataExt,
    path::Path,
    process::ExitCode,
};

use serde::Serialize;
use serde_json::json;

use super::{
    CliError, Done,
    args::{Image, ImageCreate, ImageInfo, Output},
    image_check, image_map, image_measure, image_owner, image_resize, image_snapshot, output, size,
};
use crate::{
    admin::images::{Looked, make, open_failed},
    image::{
        Format,
        nbd::is_uri,
        open::{OpenError, OpenOptions, open},
        qcow2::{self, CreateOptions, HeaderInfo, MAX_CLUSTER, Preallocation, SnapshotInfo},
    },
    pi::protected::sidecar_path,
    sys,
    volume::Volume,
};

/// Runs a command of `image`.
pub fn run(args: &Image) -> Done {
    match args {
        Image::Create(args) => create(args),
        Image::Info(args) => info(args),
        Image::Check(args) => image_check::check(args),
        Image::Repair(args) => image_check::repair(args),
        Image::Map(args) => image_map::run(args),
        Image::Measure(args) => image_measure::run(args),
        Image::Snapshot(args) => image_snapshot::run(args),
        Image::Resize(args) => image_resize::run(args),
        Image::Owner(args) => image_owner::run(args),
    }
}

/// Says what follows where an image that has protection information beside it has been changed without that.
pub(super) fn warn_of_sidecar(path: &Path) {
    if sidecar_path(path, None).exists() {
        tracing::warn!(
            "the protection information beside {0} is that of the image as it was; next: tcmu-dif pi adopt {0}",
            path.display()
        );
    }
}

fn create(args: &ImageCreate) -> Done {
    let mut options = CreateOptions::new(args.size.unwrap_or(0));
    let words: Vec<&str> = args.options.iter().flat_map(|o| o.split(',')).filter(|o| !o.is_empty()).collect();
    if args.format == Format::Raw {
        if let Some(word) = words.first() {
            return Err(only_qcow2("-o", word, "-f qcow2"));
        }
        if let Some(backing) = &args.backing {
            return Err(only_qcow2("-b", backing, "-f qcow2"));
        }
    }
    for word in words {
        option(&mut options, word)?;
    }
    options.backing_file = args.backing.clone();
    options.backing_format = args.backing_format.map(|f| f.to_string());
    make(&args.path, args.format, options)?;
    let capacity = look_without_lock(&args.path)?.capacity;
    if args.json.json {
        let (path, format) = (args.path.display().to_string(), args.format.to_string());
        return output::json(&json!({ "filename": path, "format": format, "virtual-size": capacity }));
    }
    output::print(&format!(
        "{}: {}, {} ({capacity} bytes)",
        args.path.display(),
        args.format,
        size::human(capacity)
    ))
}

/// An option that raw images do not have.
pub(super) fn only_qcow2(what: &str, value: &str, choose: &str) -> CliError {
    CliError::usage(what, value, "raw images have none").then(format!("choose {choose}"))
}

/// One `key=value` of `-o`.
pub(super) fn option(options: &mut CreateOptions, word: &str) -> Result<(), CliError> {
    let wrong = |reason: &str| {
        CliError::usage("-o", word, reason).then("see what there is: tcmu-dif image create --help")
    };
    let (key, value) = word.split_once('=').ok_or_else(|| wrong("an option has the form key=value"))?;
    match key {
        "cluster_size" => options.cluster_size = size::parse(value).map_err(|e| wrong(&e))?,
        "refcount_bits" => options.refcount_bits = value.parse().map_err(|_| wrong("not a number"))?,
        "compat" => {
            options.version = match value {
                "0.10" | "v2" => 2,
                "1.1" | "v3" => 3,
                _ => return Err(wrong("compat is 0.10 or 1.1")),
            }
        }
        "extended_l2" => {
            options.extended_l2 = on_or_off(value).ok_or_else(|| wrong("extended_l2 is on or off"))?
        }
        "data_file" => options.data_file = Some(value.to_owned()),
        "data_file_raw" => {
            options.data_file_raw = on_or_off(value).ok_or_else(|| wrong("data_file_raw is on or off"))?
        }
        "preallocation" => {
            options.preallocation = match value {
                "off" => Preallocation::Off,
                "metadata" => Preallocation::Metadata,
                _ => return Err(wrong("preallocation is off or metadata")),
            }
        }
        _ => return Err(wrong("there is no such option")),
    }
    Ok(())
}

/// qemu-img's words for a switch.
fn on_or_off(value: &str) -> Option<bool> {
    match value {
        "on" | "true" | "yes" => Some(true),
        "off" | "false" | "no" => Some(false),
        _ => None,
    }
}

fn look_without_lock(path: &Path) -> Result<Looked, CliError> {
    let at = path.to_owned();
    let looked = sys::run(async move |io| {
        let options = OpenOptions { read_only: true, lock: false, ..OpenOptions::default() };
        let image = open(&io, &at, &options).await?;
        Ok(Looked { format: image.format(), capacity: image.limits().capacity })
    });
    looked.map_err(|e: OpenError| open_failed(path, &e))
}

/// `image info`, in the words and the JSON of `qemu-img info`.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Info {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    snapshots: Vec<SnapshotInfo>,
    filename: String,
    format: String,
    virtual_size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    actual_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cluster_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_filename: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_filename_format: Option<String>,
    dirty_flag: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    format_specific: Option<serde_json::Value>,
}

fn info(args: &ImageInfo) -> Done {
    let path = &args.path;
    let looked = look_without_lock(path)?;
    let header = match looked.format {
        Format::Raw => None,
        Format::Qcow2 => Some(header(path)?),
    };
    let meta = (!is_uri(path)).then(|| fs::metadata(path)).transpose();
    let meta = meta.map_err(|e| CliError::from("image", path.display(), &e))?;
    let info = Info {
        snapshots: match looked.format {
            Format::Raw => Vec::new(),
            Format::Qcow2 => image_snapshot::look(path)?,
        },
        filename: path.display().to_string(),
        format: looked.format.to_string(),
        virtual_size: looked.capacity,
        // st_blocks counts 512 bytes whatever the file system's block is (stat(2)).
        actual_size: meta.map(|meta| meta.blocks() * 512),
        cluster_size: header.as_ref().map(|h| 1 << h.cluster_bits),
        backing_filename: header.as_ref().and_then(|h| h.backing_file.clone()),
        backing_filename_format: header.as_ref().and_then(|h| h.backing_format.clone()),
        dirty_flag: header.as_ref().is_some_and(|h| h.dirty),
        format_specific: header.as_ref().map(|h| {
            let mut data = json!({
                "compat": if h.version == 2 { "0.10" } else { "1.1" },
                "refcount-bits": 1u64 << h.refcount_order,
                "compression-type": h.compression.to_string(),
                "lazy-refcounts": h.lazy_refcounts,
                "corrupt": h.corrupt,
                "extended-l2": h.geometry().extended_l2,
            });
            if let Some(name) = &h.data_file {
                data["data-file"] = json!(name);
                data["data-file-raw"] = json!(h.data_file_raw());
            }
            json!({ "type": "qcow2", "data": data })
        }),
    };
    if args.json || args.output == Output::Json {
        return output::json(&info);
    }
    output::print(&text(&info, header.as_ref()))?;
    Ok(ExitCode::SUCCESS)
}

fn header(path: &Path) -> Result<HeaderInfo, CliError> {
    let mut first = Vec::new();
    let file = File::open(path).map_err(|e| CliError::from("image", path.display(), &e))?;
    file.take(MAX_CLUSTER as u64)
        .read_to_end(&mut first)
        .map_err(|e| CliError::from("image", path.display(), &e))?;
    qcow2::probe_header(&first).map_err(|e| CliError::from("image", path.display(), &e))
}

fn text(info: &Info, header: Option<&HeaderInfo>) -> String {
    let yes = |b: bool| if b { "true" } else { "false" };
    let bytes = |n: u64| format!("{} ({n} bytes)", size::human(n));
    let mut out = vec![
        format!("image: {}", info.filename),
        format!("file format: {}", info.format),
        format!("virtual size: {}", bytes(info.virtual_size)),
        format!("disk size: {}", info.actual_size.map_or("unavailable".to_owned(), size::human)),
    ];
    out.extend(info.cluster_size.map(|c| format!("cluster_size: {c}")));
    out.extend(info.backing_filename.as_ref().map(|b| format!("backing file: {b}")));
    out.extend(info.backing_filename_format.as_ref().map(|f| format!("backing file format: {f}")));
    out.extend(image_snapshot::table(&info.snapshots));
    if let Some(h) = header {
        out.push("format specific information:".to_owned());
        out.push(format!("    compat: {}", if h.version == 2 { "0.10" } else { "1.1" }));
        out.push(format!("    compression type: {}", h.compression));
        out.push(format!("    lazy refcounts: {}", yes(h.lazy_refcounts)));
        out.push(format!("    refcount bits: {}", 1u64 << h.refcount_order));
        out.push(format!("    corrupt: {}", yes(h.corrupt)));
        out.extend(h.data_file.as_ref().map(|name| format!("    data file: {name}")));
        out.extend(h.data_file.as_ref().map(|_| format!("    data file raw: {}", yes(h.data_file_raw()))));
        out.push(format!("    extended l2: {}", yes(h.geometry().extended_l2)));
    }
    out.join("\n")
}
