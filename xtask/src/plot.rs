//! A bench's JSON as bars in an SVG: one page a bench, a panel for each comparison, for docs/performance/.
//!
//! What is drawn are ratios and costs from one run, with the target as a line where there is one. Called by [`crate::bench`].

use anyhow::{Context, Result, anyhow};
use plotters::prelude::*;
use serde_json::Value;
use std::path::Path;

/// One comparison.
struct Panel {
    title: String,
    bars: Vec<(String, f64)>,
    /// Where the line of the target is.
    target: Option<f64>,
}

const WIDTH: u32 = 900;
const BAR: u32 = 22;
/// What stands around the bars of a panel.
const AROUND: u32 = 70;

/// Draws what `found` has of the bench, if anything is drawn of it: true if the file was written.
///
/// # Errors
/// A file that cannot be written.
pub(crate) fn draw(bench: &str, found: &Value, file: &Path) -> Result<bool> {
    let panels: Vec<Panel> = match bench {
        "guard" => guard(found),
        "ring" => ring(found),
        "image" => image(found),
        "scale" => scale(found),
        "jobs" => jobs(found),
        "vm" => vm(found),
        _ => Vec::new(),
    };
    let panels: Vec<Panel> = panels.into_iter().filter(|panel| !panel.bars.is_empty()).collect();
    if panels.is_empty() {
        return Ok(false);
    }
    if let Some(directory) = file.parent() {
        std::fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
    }
    page(&panels, file).map_err(|e| anyhow!("{}: {e}", file.display()))?;
    Ok(true)
}

fn page(panels: &[Panel], file: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let heights: Vec<u32> = panels.iter().map(|panel| AROUND + BAR * panel.bars.len() as u32).collect();
    let mut rest = SVGBackend::new(file, (WIDTH, heights.iter().sum())).into_drawing_area();
    rest.fill(&WHITE)?;
    for (panel, height) in panels.iter().zip(&heights) {
        let (area, below) = rest.split_vertically(*height);
        rest = below;
        draw_panel(panel, &area)?;
    }
    rest.present()?;
    Ok(())
}

fn draw_panel(
    panel: &Panel,
    area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
) -> Result<(), Box<dyn std::error::Error>> {
    let count = panel.bars.len();
    let longest = panel.bars.iter().map(|(_, value)| *value).chain(panel.target).fold(0.0, f64::max);
    let name = |place: &i32| {
        let bar = count.checked_sub(1 + usize::try_from(*place).ok()?).and_then(|i| panel.bars.get(i));
        bar.map(|(name, _)| name.clone())
    };
    let mut chart = ChartBuilder::on(area)
        .caption(&panel.title, ("sans-serif", 16))
        .margin_right(60)
        .margin_left(10)
        .x_label_area_size(24)
        .y_label_area_size(250)
        .build_cartesian_2d(0.0..longest * 1.05, (0..count as i32 - 1).into_segmented())?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .y_labels(count)
        .y_label_formatter(&|place| match place {
            SegmentValue::CenterOf(place) => name(place).unwrap_or_default(),
            _ => String::new(),
        })
        .draw()?;
    chart.draw_series(panel.bars.iter().rev().enumerate().map(|(place, (name, value))| {
        let place = place as i32;
        let colour =
            if name.starts_with("tcmu-dif") || !name.contains(' ') { BLUE } else { RGBColor(140, 140, 140) };
        let ends = [(0.0, SegmentValue::Exact(place)), (*value, SegmentValue::Exact(place + 1))];
        let mut bar = Rectangle::new(ends, colour.mix(0.7).filled());
        bar.set_margin(3, 3, 0, 0);
        bar
    }))?;
    chart.draw_series(panel.bars.iter().rev().enumerate().map(|(place, (_, value))| {
        let at = (*value, SegmentValue::CenterOf(place as i32));
        EmptyElement::at(at) + Text::new(format!("{value:.2}"), (4, -6), ("sans-serif", 12))
    }))?;
    if let Some(target) = panel.target {
        let ends = [(target, SegmentValue::Exact(0)), (target, SegmentValue::Exact(count as i32))];
        chart.draw_series(LineSeries::new(ends, RED.stroke_width(2)))?;
    }
    Ok(())
}

/// A bar for each row that has that figure, under the name that `keep` gives it.
fn bars(rows: &Value, figure: &str, keep: impl Fn(&str) -> Option<String>) -> Vec<(String, f64)> {
    let rows = rows.as_array().map(Vec::as_slice).unwrap_or_default();
    rows.iter().filter_map(|row| Some((keep(row["row"].as_str()?)?, row[figure].as_f64()?))).collect()
}

fn guard(found: &Value) -> Vec<Panel> {
    let tables = found["tables"].as_array().map(Vec::as_slice).unwrap_or_default();
    let panel = |table: &Value| {
        let (title, columns) = (table["title"].as_str()?, table["columns"].as_array()?);
        let mut bars = Vec::new();
        for (i, column) in columns.iter().enumerate() {
            for row in table["rows"].as_array()? {
                if let (Some(name), Some(value)) = (row["name"].as_str(), row["figures"][i].as_f64()) {
                    bars.push((format!("{name}, {}", column.as_str()?), value));
                }
            }
        }
        Some(Panel { title: title.to_owned(), bars, target: None })
    };
    tables.iter().filter_map(panel).collect()
}

fn ring(found: &Value) -> Vec<Panel> {
    let at_full = |name: &str| (!name.contains("/s") && !name.contains("idle")).then(|| name.to_owned());
    let at_rate = |name: &str| name.contains("/s").then(|| name.to_owned());
    let rows = &found["rows"];
    vec![
        Panel {
            title: "CPU of the LUN's thread, µs a command (aim: the line)".into(),
            bars: bars(rows, "cpu_us", at_full),
            target: Some(0.4),
        },
        Panel {
            title: "the same at fixed rates: what polling costs".into(),
            bars: bars(rows, "cpu_us", at_rate),
            target: None,
        },
    ]
}

fn image(found: &Value) -> Vec<Panel> {
    let ours = |name: &str| name.strip_suffix(": tcmu-dif").map(str::to_owned);
    vec![
        Panel {
            title: "operations a second, of raw (aim: the line)".into(),
            bars: bars(found, "of_raw", |name| ours(name).filter(|name| !name.ends_with("raw"))),
            target: Some(0.95),
        },
        Panel {
            title: "operations a second with protection, of those without (aim: the line)".into(),
            bars: bars(found, "of_plain", |name| name.strip_suffix(": tcmu-dif, type 1").map(str::to_owned)),
            target: Some(0.9),
        },
        Panel {
            title: "operations a second, of qemu-img bench".into(),
            bars: bars(found, "of_qemu_img", ours),
            target: Some(1.0),
        },
    ]
}

fn scale(found: &Value) -> Vec<Panel> {
    let part = |end: &'static str| move |name: &str| name.contains(end).then(|| name.to_owned());
    let rows = &found["rows"];
    vec![
        Panel {
            title: "commands a second of all LUNs together, of one alone (aim: the line)".into(),
            bars: bars(rows, "of_one", part("LUNs")),
            target: Some(0.9),
        },
        Panel {
            title: "reads a second at the bottom of a chain, of one image".into(),
            bars: bars(rows, "of_one", part("chain")),
            target: None,
        },
        Panel {
            title: "an image opens in milliseconds (aim: the line)".into(),
            bars: bars(rows, "ms", part("open")),
            target: Some(50.0),
        },
    ]
}

fn jobs(found: &Value) -> Vec<Panel> {
    let beside = |name: &str| (!name.contains("no job")).then(|| name.to_owned());
    let panel = |title: &str, key| Panel {
        title: title.into(),
        bars: bars(&found["rows"], key, beside),
        target: None,
    };
    vec![
        panel("median latency of 4 KiB beside a job, of that without a job", "p50_of_none"),
        panel("99th percentile of the same", "p99_of_none"),
    ]
}

/// Every workload, as parts of what LIO's fileio did.
fn vm(found: &Value) -> Vec<Panel> {
    let none = serde_json::Map::new();
    let rows = found["rows"].as_object().unwrap_or(&none);
    let base = &found["rows"]["LIO fileio"];
    let workloads = base["cells"].as_object().map(|cells| cells.keys().cloned().collect::<Vec<_>>());
    let mut panels = Vec::new();
    let mut panel = |title: &str, of: &dyn Fn(&Value) -> Option<f64>| {
        let Some(whole) = of(base).filter(|whole| *whole > 0.0) else { return };
        let bars = rows.iter().filter_map(|(name, row)| Some((name.clone(), of(row)? / whole)));
        let title = format!("{title}, of LIO's fileio");
        panels.push(Panel { title, bars: bars.collect(), target: Some(1.0) });
    };
    for workload in workloads.unwrap_or_default() {
        panel(&workload, &|row| row["cells"][&workload]["iops"].as_f64());
    }
    panel("4k read QD32 through vhost-scsi", &|row| row["vhost_read_iops"].as_f64());
    panels
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn every_row_of_a_bench_has_its_bar_and_its_name_in_the_picture() -> Result<()> {
        let file = std::env::temp_dir().join(format!("tcmu-dif-plot-{}.svg", std::process::id()));
        let cells =
            |iops: f64| json!({ "cells": { "4k read QD1": { "iops": iops } }, "vhost_read_iops": iops });
        let found = json!({ "rows": { "LIO fileio": cells(100.0), "tcmu-dif raw": cells(150.0) } });
        assert!(draw("vm", &found, &file)?);
        let svg = std::fs::read_to_string(&file)?;
        std::fs::remove_file(&file)?;
        for text in ["LIO fileio", "tcmu-dif raw", "1.50", "1.00", "vhost-scsi"] {
            assert!(svg.contains(text), "{text} is not in {svg}");
        }
        assert!(!draw("vm", &json!({}), &file)?);
        assert!(!file.exists());
        Ok(())
    }
}
