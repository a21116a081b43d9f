//! `tcmu-dif conformance`: a disk with protection information judged by SBC-4, or compared with another one.

use std::{path::Path, process::ExitCode};

use serde::Serialize;

use super::{CliError, Done, args::Conformance, output};
use crate::{
    conformance::{
        Clause, ConformanceError, Disk, Facts, Initiator, SgInitiator, Verdict, VhostPi, clauses,
        differential,
    },
    peer::vhost::VhostError,
};

#[derive(Serialize)]
struct Table {
    disk: Facts,
    passed: usize,
    failed: usize,
    not_applicable: usize,
    clauses: Vec<Clause>,
}

/// Runs it. Exit status 1 if a clause fails or an unknown difference is found.
pub fn run(args: &Conformance) -> Done {
    if !args.destroy_data {
        return Err(CliError::usage("--destroy-data", "", "this overwrites what the disk holds")
            .then(format!("say so: tcmu-dif conformance {} --destroy-data", args.device)));
    }
    let mut disk = open(&args.device)?;
    let failed = |e: ConformanceError| CliError::from("conformance", &args.device, &e);
    if let Some(other) = &args.against {
        let mut second = open(other)?;
        let options = differential::Options { commands: args.commands, seed: args.seed };
        let report = differential::run(&mut disk, &mut second, &options).map_err(failed)?;
        if args.json.json {
            output::json(&report)?;
        } else {
            output::print(&in_words(&report))?;
        }
        return Ok(if report.differences == 0 { ExitCode::SUCCESS } else { ExitCode::from(1) });
    }
    let clauses = clauses::run(&mut disk).map_err(failed)?;
    let count = |wanted: fn(&Verdict) -> bool| clauses.iter().filter(|c| wanted(&c.verdict)).count();
    let table = Table {
        passed: count(|v| *v == Verdict::Pass),
        failed: count(|v| matches!(v, Verdict::Fail(_))),
        not_applicable: count(|v| matches!(v, Verdict::NotApplicable(_))),
        disk: disk.facts.clone(),
        clauses,
    };
    if args.json.json {
        output::json(&table)?;
    } else {
        let rows = table.clauses.iter().map(|c| {
            let (word, why) = match &c.verdict {
                Verdict::Pass => ("pass", String::new()),
                Verdict::Fail(how) => ("FAIL", format!(": {how}")),
                Verdict::NotApplicable(why) => ("n/a", format!(": {why}")),
            };
            vec![word.to_owned(), c.clause.to_owned(), format!("{}{why}", c.what)]
        });
        let facts = &table.disk;
        let text = output::table(&["", "CLAUSE", "DEMAND"], rows);
        output::print(&format!(
            "{}: {} blocks of {}, protection type {}\n{text}\n\n{} passed, {} failed, {} not applicable",
            facts.name,
            facts.blocks,
            facts.block_size,
            facts.pi_type,
            table.passed,
            table.failed,
            table.not_applicable
        ))?;
    }
    Ok(if table.failed == 0 { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

fn in_words(report: &differential::Report) -> String {
    let mut text = format!(
        "{} commands to {} and {}: {} ended well on both, {} failed alike, {} differ",
        report.commands,
        report.first.name,
        report.second.name,
        report.good,
        report.equal_errors,
        report.differences
    );
    for (name, count) in &report.expected {
        let clause = differential::EXPECTATIONS.iter().find(|e| e.name == *name).map_or("", |e| e.clause);
        text += &format!("\nexpected, {count} times: {name}. {clause}");
    }
    for d in &report.listed {
        text += &format!("\n{}: {}\n    {}\n    {}", d.number, d.command, d.first, d.second);
    }
    text
}

/// A device node, or `vhost:WWN`.
fn open(name: &str) -> Result<Disk, CliError> {
    let initiator: Box<dyn Initiator> = if let Some(wwpn) = name.strip_prefix("vhost:") {
        Box::new(
            VhostPi::connect(wwpn)
                .map_err(|e: VhostError| CliError::from("conformance", name, &e).maybe_next(e.next_step()))?,
        )
    } else {
        Box::new(SgInitiator::open(Path::new(name)).map_err(|e| {
            CliError::from("conformance", name, &e)
                .then("give a SCSI disk's node: /dev/sgN (lsscsi --generic shows them)")
        })?)
    };
    Disk::look(initiator).map_err(|e| CliError::from("conformance", name, &e))
}
