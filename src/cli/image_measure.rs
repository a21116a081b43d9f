//! `tcmu-dif image measure`: how large a file a new image will need, in the words and the JSON of `qemu-img measure`.

use serde::Serialize;

use super::{
    CliError, Done,
    image::{only_qcow2, option},
    image_args::ImageMeasure,
    output,
};
use crate::{
    admin::images::open_failed,
    image::{
        Format,
        qcow2::{CreateOptions, check_options},
        tools::{self, MeasureOptions, Measured},
    },
    sys,
};

/// What `qemu-img measure --output=json` prints.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Json {
    #[serde(skip_serializing_if = "Option::is_none")]
    bitmaps: Option<u64>,
    required: u64,
    fully_allocated: u64,
}

/// Runs `image measure`.
pub fn run(args: &ImageMeasure) -> Done {
    let mut create = CreateOptions::new(args.size.unwrap_or(0));
    let mut full = false;
    for word in args.options.iter().flat_map(|o| o.split(',')).filter(|o| !o.is_empty()) {
        match word {
            _ if args.output_format == Format::Raw => return Err(only_qcow2("-o", word, "-O qcow2")),
            "preallocation=falloc" | "preallocation=full" => full = true,
            word => option(&mut create, word)?,
        }
    }
    let options =
        MeasureOptions { format: args.format, lock: !args.force_share, to: args.output_format, create, full };
    let measured = match &args.path {
        None => {
            if options.to == Format::Qcow2 {
                let value = options.create.size;
                check_options(&options.create)
                    .map_err(|e| CliError::new("image measure", value, e.to_string()))?;
            }
            tools::measure_empty(&options)
        }
        Some(path) => {
            let at = path.clone();
            sys::run(async move |io| tools::measure(&io, &at, &options).await)
                .map_err(|e| open_failed(path, &e))?
        }
    };
    print(args, measured)
}

fn print(args: &ImageMeasure, m: Measured) -> Done {
    if args.printed.as_json() {
        return output::json(&Json {
            bitmaps: m.bitmaps,
            required: m.required,
            fully_allocated: m.fully_allocated,
        });
    }
    let mut text = format!("required size: {}\nfully allocated size: {}", m.required, m.fully_allocated);
    if let Some(bitmaps) = m.bitmaps {
        text.push_str(&format!("\nbitmaps size: {bitmaps}"));
    }
    output::print(&text)
}
