//! `tcmu-dif list` and `tcmu-dif show`.

use std::{path::Path, time::Duration};

use super::{
    CliError, Done,
    args::{Cli, Show},
    luns::{LunView, Places, refused},
    output, size,
};
use crate::{
    kernel::{backstore, fabric},
    lun::config::SUBTYPE,
};

/// How long the daemon may take to write fresh counters.
const REPORT_PATIENCE: Duration = Duration::from_secs(1);

/// Every LUN of ours.
///
/// # Errors
/// The kernel's, and the file system's.
pub fn views(places: &Places, configfs: &Path) -> Result<Vec<LunView>, CliError> {
    let failed = |e| refused("list", configfs.display(), &e);
    let exports = fabric::all(&places.tree).map_err(failed)?;
    let mut views = Vec::new();
    for store in backstore::all(&places.tree).map_err(failed)?.iter().filter(|b| b.is_of(SUBTYPE)) {
        let mine = exports.iter().filter(|((hba, name), _)| *hba == store.hba && *name == store.name);
        let exports = mine.map(|(_, e)| super::luns::view(&places.tree, e)).collect();
        let state = places.state("list", &store.name)?;
        views.push(LunView::new(store, state, exports));
    }
    Ok(views)
}

/// Lists every LUN of ours.
pub fn list(cli: &Cli, json: bool) -> Done {
    let views = views(&cli.places(), &cli.configfs)?;
    if json {
        return output::json(&views);
    }
    if views.is_empty() {
        return output::print("no LUNs");
    }
    let rows = views.iter().map(|v| {
        let exports: Vec<_> = v
            .exports
            .iter()
            .map(|e| e.device.clone().unwrap_or_else(|| format!("{}:{}", e.fabric, e.wwn)))
            .collect();
        vec![
            v.name.clone(),
            v.state.clone(),
            size::human(v.capacity_bytes),
            v.block_size.to_string(),
            v.pi.clone(),
            v.image.clone(),
            exports.join(" "),
        ]
    });
    output::print(&output::table(&["NAME", "STATE", "SIZE", "BLOCK", "PI", "IMAGE", "EXPORTS"], rows))
}

/// Shows one LUN.
pub fn show(cli: &Cli, args: &Show) -> Done {
    let places = cli.places();
    let store = places.lun("show", &args.name)?;
    let exports = places.exports("show", &store)?;
    if args.libvirt || args.qemu {
        let words =
            exports.iter().filter_map(|e| if args.libvirt { e.libvirt.clone() } else { e.qemu.clone() });
        let words: Vec<_> = words.collect();
        if words.is_empty() {
            let why = "it has no export on vhost under a name of the form naa.5001405aa1b2c3d4";
            return Err(CliError::new("show", &args.name, why).then(format!(
                "delete it, and create it again with --export vhost: tcmu-dif delete {}",
                args.name
            )));
        }
        return output::print(&words.join("\n"));
    }
    // Fresh counters, if the daemon may be asked; what it wrote last, otherwise.
    let state = match places.run.refresh(&store.name, REPORT_PATIENCE) {
        Ok(state) => state,
        Err(_) => places.state("show", &store.name)?,
    };
    let view = LunView::new(&store, state, exports);
    if args.json.json {
        return output::json(&view);
    }
    output::print(&text(&view))
}

/// Every counter with its name in words; what belongs together stands together, and what there is none of is left out.
fn counters(all: &serde_json::Value) -> Vec<(String, String)> {
    let mut out = Vec::new();
    for (name, value) in all.as_object().into_iter().flatten() {
        let name = name.replace('_', " ");
        match value {
            serde_json::Value::Null => {}
            serde_json::Value::String(word) => out.push((name, word.clone())),
            serde_json::Value::Object(_) => {
                out.extend(counters(value).into_iter().map(|(inner, n)| (format!("{name} {inner}"), n)));
            }
            number => out.push((name, number.to_string())),
        }
    }
    out
}

fn text(v: &LunView) -> String {
    let yes = |b: bool| if b { "yes" } else { "no" }.to_owned();
    let mut pairs = vec![("name", v.name.clone()), ("state", v.state.clone())];
    pairs.extend(v.reason.clone().map(|r| ("reason", r)));
    pairs.extend(v.next.clone().map(|n| ("next", n)));
    pairs.push(("image", v.image.clone()));
    pairs.extend(v.format.clone().map(|f| ("format", f)));
    pairs.push(("size", format!("{} ({} bytes)", size::human(v.capacity_bytes), v.capacity_bytes)));
    pairs.push(("block size", v.block_size.to_string()));
    pairs.push(("protection", v.pi.clone()));
    if let Some(transfer) = v.transfer {
        pairs.push(("seen by", v.exposure.to_string()));
        pairs.push(("transfer", transfer.to_string()));
    }
    pairs.push(("read-only", yes(v.read_only)));
    pairs.push(("write cache", yes(v.write_cache)));
    pairs.push(("serial", v.serial.clone()));
    pairs.push(("backstore", v.backstore.clone()));
    pairs.extend(v.io.clone().map(|io| ("i/o", io)));
    for e in &v.exports {
        let at: Vec<_> = e.device.iter().chain(&e.sg).cloned().collect();
        let at = if at.is_empty() { String::new() } else { format!(" as {}", at.join(" and ")) };
        pairs.push(("export", format!("{} {}{at}", e.fabric, e.wwn)));
    }
    let counters = counters(&v.counters);
    pairs.extend(counters.iter().map(|(k, n)| (k.as_str(), n.clone())));
    output::lines(&pairs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_words_and_numbers_one_on_a_line() {
        let all = serde_json::json!({ "bytes_in": 3, "formatted_with": "type3", "pi": { "guard_errors": 1 }, "none": null });
        let lines = counters(&all);
        let want = [("bytes in", "3"), ("formatted with", "type3"), ("pi guard errors", "1")];
        assert_eq!(lines, want.map(|(k, v)| (k.to_owned(), v.to_owned())));
    }
}
