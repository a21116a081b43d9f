//! How it is drawn: a line that sums up, a table of LUNs, one of jobs; on a terminal, or once as text.

use ratatui::{
    Frame,
    layout::{Alignment, Constraint, Layout, Rect},
    style::{Style, Stylize},
    text::{Line, Text},
    widgets::{Cell, Paragraph, Row as Cells, Table},
};

use super::{
    rates::{self, Row, View},
    sample::{Job, Sample},
};
use crate::{cli::output, control::client::ClientError, lun::chain};

/// How much of the screen jobs take at most, their heading included.
const JOB_LINES: u16 = 6;

/// What is not known.
const UNKNOWN: &str = "–";

/// A column of the table of LUNs.
struct Column {
    heading: &'static str,
    /// The width on a terminal; of the first, at least that.
    width: u16,
    /// Where there is no room for all, those of a higher number go first.
    rank: u8,
    cell: fn(&Row) -> String,
}

const fn column(heading: &'static str, width: u16, rank: u8, cell: fn(&Row) -> String) -> Column {
    Column { heading, width, rank, cell }
}

/// The columns. Depth is the average of the interval, percentiles are of reads and writes together.
const COLUMNS: &[Column] = &[
    column("NAME", 10, 0, |r| r.name.clone()),
    column("STATE", 8, 0, |r| r.state.clone()),
    column("IN FLIGHT", 9, 6, |r| known(r.in_flight, |n| n.to_string())),
    column("DEPTH", 6, 2, |r| known(r.rates.and_then(|r| r.queue_depth), |n| format!("{n:.1}"))),
    column("READ/s", 8, 1, |r| rate(r, |r| r.rd_operations)),
    column("WRITE/s", 8, 1, |r| rate(r, |r| r.wr_operations)),
    column("RD MB/s", 8, 3, |r| megabytes(r, |r| r.rd_bytes)),
    column("WR MB/s", 8, 3, |r| megabytes(r, |r| r.wr_bytes)),
    column("P50 µs", 8, 5, |r| latency(r, |p| p.p50_us)),
    column("P99 µs", 8, 2, |r| latency(r, |p| p.p99_us)),
    column("P99.9 µs", 8, 5, |r| latency(r, |p| p.p999_us)),
    column("PI", 5, 4, |r| r.pi.clone()),
    column("CHECKED/s", 9, 7, |r| known(r.rates.and_then(|r| r.verified), whole)),
    // Guard, application tag, reference tag: since the LUN started.
    column("G/A/R ERR", 9, 1, errors),
];

/// The columns that fit.
fn fitting(width: u16) -> Vec<&'static Column> {
    let mut columns: Vec<_> = COLUMNS.iter().collect();
    // One blank between two.
    let needs = |columns: &[&Column]| columns.iter().map(|c| c.width + 1).sum::<u16>().saturating_sub(1);
    while needs(&columns) > width {
        let Some(last) = columns.iter().map(|c| c.rank).max().filter(|rank| *rank > 0) else { break };
        columns.retain(|c| c.rank != last);
    }
    columns
}

fn known<T>(value: Option<T>, text: impl Fn(T) -> String) -> String {
    value.map_or_else(|| UNKNOWN.to_owned(), text)
}

fn whole(number: f64) -> String {
    format!("{number:.0}")
}

fn rate(row: &Row, of: fn(&rates::Rates) -> f64) -> String {
    known(row.rates.as_ref().map(of), whole)
}

fn megabytes(row: &Row, of: fn(&rates::Rates) -> f64) -> String {
    known(row.rates.as_ref().map(of), |bytes| format!("{:.1}", bytes / 1e6))
}

fn latency(row: &Row, of: fn(&rates::Percentiles) -> f64) -> String {
    let took = row.rates.and_then(|r| r.latency.read_write);
    known(took.as_ref().map(of), |us| if us < 10.0 { format!("{us:.1}") } else { whole(us) })
}

fn errors(row: &Row) -> String {
    known(row.protection, |p| format!("{}/{}/{}", p.guard_errors, p.app_errors, p.ref_errors))
}

/// Whether somebody should look at it.
fn is_bad(row: &Row) -> bool {
    let errors = row.protection.is_some_and(|p| p.guard_errors + p.app_errors + p.ref_errors + p.torn > 0);
    errors || matches!(row.state.as_str(), "failed" | "silent")
}

/// What all LUNs do together.
fn summary(view: &View) -> String {
    let online = view.luns.iter().filter(|l| l.state == "online").count();
    let luns = if view.luns.len() == 1 { "LUN" } else { "LUNs" };
    let mut text = format!("{} {luns}, {online} online", view.luns.len());
    if view.interval_seconds.is_some() {
        let sum =
            |of: fn(&rates::Rates) -> f64| view.luns.iter().filter_map(|l| l.rates.as_ref()).map(of).sum();
        let operations: f64 =
            sum(|r| r.rd_operations + r.wr_operations + r.unmap_operations + r.flush_operations);
        let bytes: f64 = sum(|r| r.rd_bytes + r.wr_bytes);
        text.push_str(&format!(": {operations:.0} IOPS, {:.1} MB/s", bytes / 1e6));
    }
    text
}

fn job(job: &Job) -> Vec<String> {
    let percent = job.current_progress.saturating_mul(100).checked_div(job.total_progress).unwrap_or(100);
    vec![job.id.clone(), job.kind.clone(), job.status.clone(), format!("{percent} %")]
}

const JOB_HEADINGS: [&str; 4] = ["JOB", "TYPE", "STATUS", "DONE"];

/// All of it as text.
pub fn text(view: &View) -> String {
    let headings: Vec<&str> = COLUMNS.iter().map(|c| c.heading).collect();
    let rows = view.luns.iter().map(|l| COLUMNS.iter().map(|c| (c.cell)(l)).collect());
    let mut text = summary(view);
    if !view.luns.is_empty() {
        text.push_str(&format!("\n{}", output::table(&headings, rows)));
    }
    if !view.jobs.is_empty() {
        text.push_str(&format!("\n\n{}", output::table(&JOB_HEADINGS, view.jobs.iter().map(job))));
    }
    text
}

/// What stands on the terminal.
pub struct Screen {
    last: Sample,
    view: View,
    /// Why there is nothing newer.
    trouble: Option<String>,
    /// The first LUN that is shown.
    first: usize,
}

impl Screen {
    /// After the first look.
    pub fn of(first: Sample) -> Screen {
        Screen { view: rates::view(None, first.clone()), last: first, trouble: None, first: 0 }
    }

    /// After another look: what it showed, or why it failed; then the last figures stay, and are said to be old.
    pub fn take(&mut self, look: Result<Sample, ClientError>) {
        match look {
            Ok(sample) => {
                self.view = rates::view(Some(&self.last), sample.clone());
                self.last = sample;
                self.trouble = None;
                self.scroll(0);
            }
            Err(e) => self.trouble = Some(format!("not up to date: {}", chain(&e))),
        }
    }

    /// Moves down the LUNs by that many; up, if it is less than none.
    pub fn scroll(&mut self, by: isize) {
        self.first = self.first.saturating_add_signed(by).min(self.view.luns.len().saturating_sub(1));
    }

    /// Draws it.
    pub fn draw(&self, frame: &mut Frame) {
        let jobs = match self.view.jobs.len() {
            0 => 0,
            some => u16::try_from(some + 2).unwrap_or(JOB_LINES).min(JOB_LINES),
        };
        let parts =
            [Constraint::Length(2), Constraint::Min(2), Constraint::Length(jobs), Constraint::Length(1)];
        let [head, luns, jobs, foot] = Layout::vertical(parts).areas(frame.area());
        frame.render_widget(Paragraph::new(Line::from(summary(&self.view)).bold()), head);
        self.draw_luns(frame, luns);
        self.draw_jobs(frame, jobs);
        let foot_line = match &self.trouble {
            Some(trouble) => Line::from(trouble.as_str()).red(),
            None => Line::from(self.reason().unwrap_or_else(|| "q quits, arrows scroll".to_owned())),
        };
        frame.render_widget(Paragraph::new(foot_line), foot);
    }

    /// Why the first of the failed LUNs failed.
    fn reason(&self) -> Option<String> {
        self.view.luns.iter().find_map(|l| Some(format!("{}: {}", l.name, l.reason.as_ref()?)))
    }

    fn draw_luns(&self, frame: &mut Frame, area: Rect) {
        let number = |text: String| Cell::from(Text::from(text).alignment(Alignment::Right));
        // Names and words to the left, numbers to the right.
        let cell = |c: &Column, text: String| match c.heading {
            "NAME" | "STATE" | "PI" => Cell::from(text),
            _ => number(text),
        };
        let columns = fitting(area.width);
        let header =
            Cells::new(columns.iter().map(|c| cell(c, c.heading.to_owned()))).style(Style::new().bold());
        let rows = self.view.luns.iter().skip(self.first).map(|l| {
            let style = if is_bad(l) { Style::new().red() } else { Style::new() };
            Cells::new(columns.iter().map(|c| cell(c, (c.cell)(l)))).style(style)
        });
        let widths = columns.iter().enumerate().map(|(i, c)| match i {
            0 => Constraint::Min(c.width),
            _ => Constraint::Length(c.width),
        });
        frame.render_widget(Table::new(rows, widths).header(header), area);
    }

    fn draw_jobs(&self, frame: &mut Frame, area: Rect) {
        let header = Cells::new(JOB_HEADINGS).style(Style::new().bold());
        let rows = self.view.jobs.iter().map(|j| Cells::new(job(j)));
        let widths =
            [Constraint::Min(20), Constraint::Length(10), Constraint::Length(10), Constraint::Length(6)];
        frame.render_widget(Table::new(rows, widths).header(header), area);
    }
}

#[cfg(test)]
mod tests {
    use super::{super::rates::tests::lun, *};
    use crate::cli::top::sample::Lun;
    use ratatui::{Terminal, backend::TestBackend};
    use std::{path::PathBuf, time::Duration};

    fn sample(at: u64, counted: u64) -> Sample {
        let mut bad = lun("vm2", counted / 3);
        bad.protection.as_mut().unwrap().guard_errors = 2;
        let failed = Lun {
            state: "failed".to_owned(),
            reason: Some("the image is in use".to_owned()),
            pi: "off".to_owned(),
            in_flight: None,
            traffic: None,
            times: None,
            protection: None,
            ..lun("vm3", 0)
        };
        let scrub = Job {
            id: "scrub-vm1".to_owned(),
            kind: "pi-scrub".to_owned(),
            status: "running".to_owned(),
            current_progress: 45,
            total_progress: 100,
        };
        Sample {
            at: Duration::from_secs(at),
            luns: vec![lun("vm1", counted), bad, failed],
            jobs: vec![scrub],
        }
    }

    fn drawn(screen: &Screen, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| screen.draw(frame)).unwrap();
        terminal.backend().to_string()
    }

    fn snapshot(name: &str, text: String) {
        insta::with_settings!({ snapshot_path => "../../../tests/snapshots", prepend_module_to_snapshot => false }, {
            insta::assert_snapshot!(name, text);
        });
    }

    #[test]
    fn rates_errors_and_jobs_stand_on_the_screen() {
        let mut screen = Screen::of(sample(1, 3000));
        snapshot("top_first", drawn(&screen, 130, 12));
        screen.take(Ok(sample(2, 15_345)));
        snapshot("top_second", drawn(&screen, 130, 12));
        snapshot("top_narrow", drawn(&screen, 80, 12));
        snapshot("top_once", text(&screen.view));
    }

    #[test]
    fn a_daemon_that_goes_away_leaves_the_last_figures_and_says_that_they_are_old() {
        let mut screen = Screen::of(sample(1, 3000));
        let gone = std::io::Error::from(std::io::ErrorKind::NotFound);
        screen.take(Err(ClientError::NoDaemon(PathBuf::from("/run/tcmu-dif/qmp.sock"), gone)));
        let text = drawn(&screen, 96, 12);
        assert!(text.contains("vm1") && text.contains("not up to date: no daemon listens"), "{text}");
        screen.take(Ok(sample(3, 3000)));
        assert!(!drawn(&screen, 96, 12).contains("not up to date"));
    }

    #[test]
    fn a_narrow_terminal_has_whole_columns_the_important_ones() {
        let headings = |width| fitting(width).iter().map(|c| c.heading).collect::<Vec<_>>();
        assert_eq!(headings(130).len(), COLUMNS.len());
        assert_eq!(headings(1), ["NAME", "STATE"]);
        for column in ["READ/s", "WRITE/s", "DEPTH", "P99 µs", "G/A/R ERR"] {
            assert!(headings(80).contains(&column), "{:?}", headings(80));
        }
    }

    #[test]
    fn any_size_of_terminal_is_drawn_on_and_scrolling_ends_at_the_last_lun() {
        let mut screen = Screen::of(sample(1, 3000));
        for (width, height) in [(1, 1), (20, 3), (80, 24), (300, 100)] {
            drawn(&screen, width, height);
        }
        screen.scroll(1);
        let text = drawn(&screen, 96, 12);
        assert!(!text.contains("\"vm1 ") && text.contains("\"vm2 "), "{text}");
        screen.scroll(99);
        assert!(drawn(&screen, 96, 12).contains("\"vm3 "));
        screen.scroll(-99);
        assert!(drawn(&screen, 96, 12).contains("\"vm1 "));
    }
}
