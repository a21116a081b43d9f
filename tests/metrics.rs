//! Metrics as a scraper sees them: what is counted after real I/O, in a form that Prometheus' own tools take, and what clients cannot
//! do to each other; the documentation and the dashboard name the metrics that there are.

#![allow(clippy::unwrap_used)] // A test may panic.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{Read, Write},
    net::{Shutdown, TcpStream},
    os::unix::{
        fs::{FileExt, PermissionsExt},
        net::UnixStream,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use serde_json::Value;
use tcmu_dif::{
    control::{
        Registry,
        metrics::{
            declared::{self, ALL},
            http::{MAX_CLIENTS, MAX_HEAD, Server},
        },
    },
    image::{create::create_qcow2, qcow2::CreateOptions},
    lun::config::DeviceConfig,
    sys,
};

#[allow(dead_code)] // QMP's tests use more of it.
#[path = "common/qmp_rig.rs"]
mod rig;

use rig::{MIB, Rig};

fn manifest(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// `TCMU_DIF_BLESS=1` writes the table anew.
#[test]
fn the_documentation_has_the_table_of_metrics() {
    let path = manifest("docs/metrics.md");
    let text = std::fs::read_to_string(&path).unwrap();
    let table = declared::documentation();
    let from = text.find("| metric |").unwrap();
    let to = text.find("\n\n## Dashboard").unwrap() + 1;
    if std::env::var_os("TCMU_DIF_BLESS").is_some() {
        std::fs::write(&path, format!("{}{table}{}", &text[..from], &text[to..])).unwrap();
    } else {
        assert_eq!(text[from..to], table, "run this test with TCMU_DIF_BLESS=1 to write the table anew");
    }
}

/// Every expression of a dashboard.
fn expressions<'a>(value: &'a Value, found: &mut Vec<&'a str>) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                match value.as_str() {
                    Some(text) if ["expr", "definition"].contains(&key.as_str()) => found.push(text),
                    _ => expressions(value, found),
                }
            }
        }
        Value::Array(list) => list.iter().for_each(|value| expressions(value, found)),
        _ => {}
    }
}

#[test]
fn the_dashboard_names_metrics_that_there_are_and_shows_most_of_them() {
    let text = std::fs::read_to_string(manifest("dist/grafana/tcmu-dif.json")).unwrap();
    let dashboard: Value = serde_json::from_str(&text).unwrap();
    let mut all = Vec::new();
    expressions(&dashboard, &mut all);
    let samples: BTreeSet<String> =
        ALL.iter().flat_map(|m| m.of.suffixes().iter().map(|suffix| format!("{}{suffix}", m.name))).collect();
    let mut shown = BTreeSet::new();
    for expr in &all {
        let words: Vec<&str> = expr
            .split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
            .filter(|word| word.starts_with("tcmu_dif"))
            .collect();
        assert!(!words.is_empty(), "names no metric: {expr}");
        for word in words {
            assert!(samples.contains(word), "there is no {word}: {expr}");
            shown.insert(word);
        }
    }
    assert!(shown.len() * 2 > ALL.len(), "{shown:?}");
}

/// An answer: its status, its headers, its body.
fn answer(mut stream: impl Read) -> (String, String, String) {
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        // One that is sent away has asked in vain, and what it has sent is not read.
        Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => {}
        other => assert!(other.is_ok(), "{other:?}"),
    }
    let text = String::from_utf8(bytes).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let (status, headers) = head.split_once("\r\n").unwrap_or((head, ""));
    (status.to_owned(), headers.to_owned(), body.to_owned())
}

struct Scraped {
    rig: Rig,
    _server: Server,
}

impl Scraped {
    fn new() -> Scraped {
        let rig = Rig::new(Registry::default());
        let server = Server::unix(&rig.dir.path().join("metrics.sock"), rig.luns.clone()).unwrap();
        Scraped { rig, _server: server }
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.rig.dir.path().join("metrics.sock")).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        stream
    }

    fn ask(&self, request: &str) -> (String, String, String) {
        let mut stream = self.connect();
        // One that is sent away may be so before it has asked.
        let _ = stream.write_all(request.as_bytes());
        answer(stream)
    }

    fn metrics(&self, headers: &str) -> String {
        let (status, head, body) =
            self.ask(&format!("GET /metrics HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n"));
        assert_eq!(status, "HTTP/1.1 200 OK");
        assert!(head.contains(&format!("Content-Length: {}", body.len())), "{head}");
        body
    }
}

/// The value of a sample. `None` if there is none.
fn value(text: &str, sample: &str) -> Option<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix(sample)?.strip_prefix(' '));
    line.map(|value| value.parse().unwrap())
}

/// Runs a judge over a text, which has to find no fault.
#[track_caller]
fn judged(program: &str, args: &[&str], package: &str, text: &str) {
    let spawned = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child =
        spawned.unwrap_or_else(|e| panic!("{program} cannot be run ({e}): apt-get install {package}"));
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let out = child.wait_with_output().unwrap();
    let said = [out.stdout, out.stderr].map(|b| String::from_utf8(b).unwrap()).concat();
    assert!(out.status.success() && said.is_empty(), "{said}\n{text}");
}

/// Debian's python3-prometheus-client reads OpenMetrics by the letter.
const STRICT: &str = "import sys\n\
    from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse\n\
    assert sum(len(family.samples) for family in parse(sys.stdin.read())) > 100\n";

fn flip(image: &Path, at: u64) {
    let file = File::options().read(true).write(true).open(image).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 4], at).unwrap();
}

#[test]
fn what_a_lun_has_done_is_exposed_in_a_form_that_prometheus_takes() {
    let scraped = Scraped::new();
    let rig = &scraped.rig;
    let mut guest = rig.protected("vm1", 8 * MIB);
    let overlay = rig.dir.path().join("q.qcow2");
    let at = overlay.clone();
    sys::run(async move |io| create_qcow2(&io, &at, &CreateOptions::new(16 * MIB)).await.unwrap());
    // No name that the command line would take, but one that configfs does.
    let mut other = rig.start("a \"quoted\\\" name", DeviceConfig::new(&overlay), 16 * MIB);
    assert_eq!((guest.write(0, &[1; 8192]), guest.write(16, &[2; 512])), (0, 0));
    assert_eq!((guest.read(0, 4), guest.flush()), (0, 0));
    assert_ne!(guest.read(u32::MAX, 1), 0);
    flip(&rig.dir.path().join("vm1.raw"), 100);
    assert_ne!(guest.read(0, 1), 0);
    assert_eq!((other.write(0, &[1; 4096]), other.read(0, 8)), (0, 0));
    let mut talk = rig.talk();
    talk.get("pi-scrub", serde_json::json!({ "device": "vm1", "speed": 0 }));
    talk.job();
    let copy = rig.dir.path().join("copy.qcow2");
    let name = "a \"quoted\\\" name";
    talk.get(
        "drive-mirror",
        serde_json::json!({ "device": name, "job-id": "copy", "target": copy, "format": "qcow2", "sync": "full" }),
    );
    let mut wait = 0..1000;
    while talk.get("query-block-jobs", serde_json::json!({}))[0]["ready"] != true {
        wait.next().expect("the mirror never catches up");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }

    let text = scraped.metrics("");
    for (sample, want) in [
        ("tcmu_dif_luns", 2),
        ("tcmu_dif_qmp_clients", 1),
        ("tcmu_dif_lun_online{lun=\"vm1\"}", 1),
        ("tcmu_dif_lun_restarts_total{lun=\"vm1\"}", 0),
        ("tcmu_dif_lun_capacity_bytes{lun=\"vm1\"}", 8 << 20),
        ("tcmu_dif_lun_in_flight{lun=\"vm1\"}", 0),
        // With the TEST UNIT READY that got the unit attention.
        ("tcmu_dif_lun_commands_total{lun=\"vm1\"}", 7),
        ("tcmu_dif_lun_operations_total{lun=\"vm1\",kind=\"write\"}", 2),
        ("tcmu_dif_lun_operations_total{lun=\"vm1\",kind=\"read\"}", 1),
        ("tcmu_dif_lun_operations_total{lun=\"vm1\",kind=\"flush\"}", 1),
        ("tcmu_dif_lun_failed_operations_total{lun=\"vm1\",kind=\"read\"}", 1),
        ("tcmu_dif_lun_invalid_operations_total{lun=\"vm1\",kind=\"read\"}", 1),
        ("tcmu_dif_lun_transferred_bytes_total{lun=\"vm1\",kind=\"write\"}", 8704),
        ("tcmu_dif_lun_command_duration_seconds_count{lun=\"vm1\",opcode=\"READ\"}", 3),
        ("tcmu_dif_lun_command_duration_seconds_bucket{lun=\"vm1\",opcode=\"WRITE\",le=\"+Inf\"}", 2),
        ("tcmu_dif_lun_errors_total{lun=\"vm1\",key=\"0Bh\",asc=\"10h\",ascq=\"01h\"}", 1),
        ("tcmu_dif_lun_errors_total{lun=\"vm1\",key=\"05h\",asc=\"21h\",ascq=\"00h\"}", 1),
        ("tcmu_dif_lun_errors_total{lun=\"vm1\",key=\"06h\",asc=\"29h\",ascq=\"00h\"}", 1),
        ("tcmu_dif_pi_errors_total{lun=\"vm1\",tag=\"guard\"}", 1),
        ("tcmu_dif_pi_generated_blocks_total{lun=\"vm1\"}", 17),
        ("tcmu_dif_pi_verified_blocks_total{lun=\"vm1\"}", 4),
        ("tcmu_dif_scrub_running{lun=\"vm1\"}", 0),
        ("tcmu_dif_scrub_done_bytes{lun=\"vm1\"}", 8 << 20),
        ("tcmu_dif_scrub_mismatched_blocks{lun=\"vm1\"}", 1),
        ("tcmu_dif_lun_operations_total{lun=\"a \\\"quoted\\\\\\\" name\",kind=\"write\"}", 1),
        ("tcmu_dif_job_running{lun=\"a \\\"quoted\\\\\\\" name\",job=\"copy\"}", 1),
        ("tcmu_dif_job_ready{lun=\"a \\\"quoted\\\\\\\" name\",job=\"copy\"}", 1),
        ("tcmu_dif_job_failed{lun=\"a \\\"quoted\\\\\\\" name\",job=\"copy\"}", 0),
        ("tcmu_dif_job_done_bytes{lun=\"a \\\"quoted\\\\\\\" name\",job=\"copy\"}", 64 << 10),
        ("tcmu_dif_job_size_bytes{lun=\"a \\\"quoted\\\\\\\" name\",job=\"copy\"}", 64 << 10),
    ] {
        assert_eq!(value(&text, sample), Some(f64::from(want)), "{sample}:\n{text}");
    }
    let took = "tcmu_dif_lun_command_duration_seconds_sum{lun=\"vm1\",opcode=\"READ\"}";
    assert!(value(&text, took).unwrap() > 0.0, "{text}");
    let cache = "tcmu_dif_cache_size_bytes{lun=\"a \\\"quoted\\\\\\\" name\",cache=\"l2\"}";
    assert!(value(&text, cache).unwrap() > 0.0, "{text}");
    assert!(text.ends_with("\n# EOF\n"));

    judged("/usr/bin/python3", &["-c", STRICT], "python3-prometheus-client", &text);
    judged("promtool", &["check", "metrics"], "prometheus", &scraped.metrics("Accept: text/plain\r\n"));

    // One that has gone is told of as such.
    other.lun.stop().unwrap();
    let text = scraped.metrics("");
    assert_eq!(value(&text, "tcmu_dif_lun_online{lun=\"a \\\"quoted\\\\\\\" name\"}"), Some(0.0));
    assert_eq!(value(&text, "tcmu_dif_lun_online{lun=\"vm1\"}"), Some(1.0));
    rig.luns.restarted("vm1");
    assert_eq!(value(&scraped.metrics(""), "tcmu_dif_lun_restarts_total{lun=\"vm1\"}"), Some(1.0));
    guest.lun.stop().unwrap();
}

#[test]
fn the_media_type_is_openmetrics_or_what_the_client_can_read() {
    let scraped = Scraped::new();
    let mode = std::fs::metadata(scraped.rig.dir.path().join("metrics.sock")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o660);
    let (_, head, body) = scraped.ask("GET /metrics HTTP/1.1\r\n\r\n");
    assert!(
        head.contains("Content-Type: application/openmetrics-text; version=1.0.0; charset=utf-8"),
        "{head}"
    );
    assert!(body.ends_with("# EOF\n"));
    let (_, head, body) = scraped.ask("GET /metrics HTTP/1.1\r\nAccept: text/plain\r\n\r\n");
    assert!(head.contains("Content-Type: text/plain; version=0.0.4") && !body.contains("EOF"), "{head}");
    let (status, head, body) = scraped.ask("HEAD /metrics HTTP/1.1\r\n\r\n");
    assert!(status.ends_with("200 OK") && head.contains("Content-Length: ") && body.is_empty(), "{head}");
}

#[test]
fn a_client_that_is_silent_or_talks_nonsense_hurts_nobody() {
    let scraped = Scraped::new();
    // Some never ask, and one of them has begun to.
    let mut silent: Vec<UnixStream> = (1..MAX_CLIENTS).map(|_| scraped.connect()).collect();
    silent[0].write_all(b"GET /met").unwrap();
    let long = format!("GET /metrics HTTP/1.1\r\nX: {}", "x".repeat(2 * MAX_HEAD));
    for (request, status) in [
        ("\u{1}\u{2}\u{3}\r\n\r\n", "400"),
        ("GET /qmp HTTP/1.1\r\n\r\n", "404"),
        ("DELETE /metrics HTTP/1.1\r\n\r\n", "405"),
        (&*long, "431"),
        ("GET /metrics HTTP/1.1\r\n\r\n", "200"),
    ] {
        // One that was refused keeps its place for a moment longer than its answer takes.
        let said = until_served(|| scraped.ask(request).0);
        assert!(said.contains(status), "{said}");
    }
    // One place was left; now there is none.
    silent.push(scraped.connect());
    let mut said = String::new();
    scraped.connect().read_to_string(&mut said).unwrap();
    assert!(said.starts_with("HTTP/1.1 503") && said.contains("8 clients are connected"), "{said}");
    // Those who never asked are sent away in the end, and give their places back.
    silent.iter().for_each(|s| s.shutdown(Shutdown::Both).unwrap());
    assert!(until_served(|| scraped.ask("GET /metrics HTTP/1.1\r\n\r\n").0).contains("200"));
}

/// Asks until there is a place.
fn until_served(mut ask: impl FnMut() -> String) -> String {
    let end = std::time::Instant::now() + Duration::from_secs(20);
    loop {
        let said = ask();
        if !said.contains("503") || std::time::Instant::now() > end {
            return said;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn metrics_are_served_on_a_port_of_this_host_too_and_no_more_once_the_server_has_ended() {
    let server = Server::tcp("127.0.0.1:0".parse().unwrap(), Registry::default()).unwrap();
    let address = server.address().unwrap();
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
    let (status, _, body) = answer(stream);
    assert!(status.ends_with("200 OK") && body.contains("tcmu_dif_luns 0\n"), "{status}\n{body}");
    drop(server);
    assert!(TcpStream::connect(address).is_err());
}
