//! Metrics as text: OpenMetrics 1.0, and for those who ask for nothing newer Prometheus' text format 0.0.4.
//!
//! Samples are put in any order, and come out by metric, as both formats demand. The formats differ in little: the older one names
//! a counter by its sample, knows neither infos nor units, and has no end.

use std::{collections::BTreeMap, fmt::Write, time::Duration};

use super::declared::{ALL, Metric, Type};
use crate::lun::measured::Histogram;

/// How it is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// OpenMetrics 1.0.0.
    OpenMetrics,
    /// Prometheus' own before that.
    Classic,
}

impl Format {
    /// What a client takes, by its Accept header.
    pub fn of(accept: Option<&str>) -> Format {
        match accept {
            Some(a) if a.contains("text/plain") && !a.contains("application/openmetrics-text") => {
                Format::Classic
            }
            _ => Format::OpenMetrics,
        }
    }

    /// The media type.
    pub fn content_type(self) -> &'static str {
        match self {
            Format::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Format::Classic => "text/plain; version=0.0.4; charset=utf-8",
        }
    }
}

/// Samples on their way to text.
#[derive(Debug, Default)]
pub struct Samples(BTreeMap<&'static str, String>);

impl Samples {
    /// A sample of a counter, a gauge or an info. `labels` are the values of those that are declared.
    pub(super) fn put(&mut self, metric: &'static Metric, labels: &[&str], value: u64) {
        let name = format!("{}{}", metric.name, metric.of.suffixes()[0]);
        let labels = label_set(metric, labels, None);
        self.line(metric, &name, &labels, &value.to_string());
    }

    /// A sample that is a time.
    pub(super) fn put_seconds(&mut self, metric: &'static Metric, labels: &[&str], time: Duration) {
        let name = format!("{}{}", metric.name, metric.of.suffixes()[0]);
        let labels = label_set(metric, labels, None);
        self.line(metric, &name, &labels, &format!("{}.{:09}", time.as_secs(), time.subsec_nanos()));
    }

    /// A histogram of times.
    pub(super) fn put_histogram(&mut self, metric: &'static Metric, labels: &[&str], histogram: &Histogram) {
        let bucket = format!("{}_bucket", metric.name);
        let mut below = 0;
        for (i, count) in histogram.buckets.iter().enumerate() {
            below += count;
            let limit = Histogram::limit(i).map_or("+Inf".to_owned(), seconds);
            let labels = label_set(metric, labels, Some(&limit));
            self.line(metric, &bucket, &labels, &below.to_string());
        }
        let all = label_set(metric, labels, None);
        self.line(metric, &format!("{}_count", metric.name), &all, &below.to_string());
        let sum = histogram.sum;
        let sum = format!("{}.{:09}", sum.as_secs(), sum.subsec_nanos());
        self.line(metric, &format!("{}_sum", metric.name), &all, &sum);
    }

    fn line(&mut self, metric: &'static Metric, name: &str, labels: &str, value: &str) {
        let lines = self.0.entry(metric.name).or_default();
        // A String takes everything.
        let _ = writeln!(lines, "{name}{labels} {value}");
    }

    /// The whole exposition.
    pub fn text(&self, format: Format) -> String {
        let mut text = String::new();
        for metric in ALL {
            let Some(lines) = self.0.get(metric.name) else { continue };
            let classic = format == Format::Classic;
            let (name, word) = match metric.of {
                Type::Counter if classic => (format!("{}_total", metric.name), "counter"),
                Type::Info if classic => (format!("{}_info", metric.name), "gauge"),
                of => (metric.name.to_owned(), of.word()),
            };
            let _ = writeln!(text, "# TYPE {name} {word}");
            if let Some(unit) = metric.unit.filter(|_| !classic) {
                let _ = writeln!(text, "# UNIT {name} {unit}");
            }
            let _ = writeln!(text, "# HELP {name} {}", metric.help);
            text.push_str(lines);
        }
        if format == Format::OpenMetrics {
            text.push_str("# EOF\n");
        }
        text
    }
}

/// `{lun="vm1",kind="read"}`.
fn label_set(metric: &Metric, values: &[&str], le: Option<&str>) -> String {
    debug_assert_eq!(metric.labels.len(), values.len(), "{}", metric.name);
    let pairs = metric.labels.iter().zip(values).map(|(name, value)| (*name, *value));
    let pairs: Vec<String> = pairs
        .chain(le.map(|value| ("le", value)))
        .map(|(name, value)| format!("{name}=\"{}\"", escaped(value)))
        .collect();
    if pairs.is_empty() { String::new() } else { format!("{{{}}}", pairs.join(",")) }
}

/// A label's value: backslash, quotation mark and line feed are escaped.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// Microseconds as seconds, as Go writes a number (OpenMetrics 1.0, "Considerations: Canonical Numbers").
fn seconds(microseconds: u64) -> String {
    let value = microseconds as f64 / 1e6;
    if value >= 1e-4 {
        // Bounds that are whole have a point all the same.
        return format!("{value:?}");
    }
    let text = format!("{value:e}");
    match text.split_once("e-") {
        Some((digits, exponent)) => format!("{digits}e-{exponent:0>2}"),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{
        super::declared::{BUILD, COMMANDS, DURATION, TRANSFERRED},
        *,
    };
    use crate::lun::measured::BUCKETS;

    fn samples() -> Samples {
        let mut samples = Samples::default();
        samples.put(&TRANSFERRED, &["a", "read"], 4096);
        samples.put(&COMMANDS, &["a\"b\\c\nd"], 3);
        samples.put(&BUILD, &["1.2.3"], 1);
        samples.put(&COMMANDS, &["b"], u64::MAX);
        samples
    }

    #[test]
    fn families_stand_together_with_type_unit_and_help_and_the_end_is_marked() {
        let text = samples().text(Format::OpenMetrics);
        let want = "\
# TYPE tcmu_dif_build info
# HELP tcmu_dif_build The daemon's version.
tcmu_dif_build_info{version=\"1.2.3\"} 1
# TYPE tcmu_dif_lun_commands counter
# HELP tcmu_dif_lun_commands SCSI commands taken from the ring, of every kind.
tcmu_dif_lun_commands_total{lun=\"a\\\"b\\\\c\\nd\"} 3
tcmu_dif_lun_commands_total{lun=\"b\"} 18446744073709551615
# TYPE tcmu_dif_lun_transferred_bytes counter
# UNIT tcmu_dif_lun_transferred_bytes bytes
# HELP tcmu_dif_lun_transferred_bytes Bytes moved between initiators and the LUN by commands that were done: read, write.
tcmu_dif_lun_transferred_bytes_total{lun=\"a\",kind=\"read\"} 4096
# EOF
";
        assert_eq!(text, want);
        assert_eq!(Samples::default().text(Format::OpenMetrics), "# EOF\n");
    }

    #[test]
    fn the_older_format_names_counters_by_their_samples_and_has_no_end() {
        let text = samples().text(Format::Classic);
        assert!(text.contains("# TYPE tcmu_dif_build_info gauge\n"), "{text}");
        assert!(text.contains("# TYPE tcmu_dif_lun_commands_total counter\n"), "{text}");
        assert!(!text.contains("# UNIT") && !text.contains("# EOF"), "{text}");
    }

    #[test]
    fn a_histograms_buckets_add_up_and_its_bounds_are_canonical_numbers() {
        let mut histogram = Histogram { sum: Duration::new(7, 5), ..Histogram::default() };
        (histogram.buckets[0], histogram.buckets[2], histogram.buckets[BUCKETS - 1]) = (1, 2, 4);
        let mut samples = Samples::default();
        samples.put_histogram(&DURATION, &["a", "READ"], &histogram);
        let text = samples.text(Format::OpenMetrics);
        for line in [
            "_bucket{lun=\"a\",opcode=\"READ\",le=\"1e-06\"} 1\n",
            "_bucket{lun=\"a\",opcode=\"READ\",le=\"2e-06\"} 1\n",
            "_bucket{lun=\"a\",opcode=\"READ\",le=\"4e-06\"} 3\n",
            "_bucket{lun=\"a\",opcode=\"READ\",le=\"1.6e-05\"} 3\n",
            "_bucket{lun=\"a\",opcode=\"READ\",le=\"0.000128\"} 3\n",
            "_bucket{lun=\"a\",opcode=\"READ\",le=\"16.777216\"} 3\n",
            "_bucket{lun=\"a\",opcode=\"READ\",le=\"+Inf\"} 7\n",
            "_count{lun=\"a\",opcode=\"READ\"} 7\n",
            "_sum{lun=\"a\",opcode=\"READ\"} 7.000000005\n",
        ] {
            assert!(text.contains(line), "{line}{text}");
        }
        assert_eq!(text.matches("_bucket").count(), BUCKETS);
    }

    #[test]
    fn a_client_gets_openmetrics_unless_it_asks_for_plain_text_alone() {
        let prometheus =
            "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1";
        for accept in [None, Some("*/*"), Some(prometheus), Some("text/html,*/*")] {
            assert_eq!(Format::of(accept), Format::OpenMetrics, "{accept:?}");
        }
        assert_eq!(Format::of(Some("text/plain;version=0.0.4")), Format::Classic);
    }
}
