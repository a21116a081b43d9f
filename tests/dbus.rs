//! The D-Bus service on a private bus under our own policy file, asked by other people's clients: `gdbus` calls as targetcli's GLib does.
//!
//! What tcmu-runner does as the owner of the name is played here by a stand-in; the VM suite has the real one (`tools.*`).
#![allow(clippy::unwrap_used)] // A test may panic.

use std::{
    fs,
    os::unix::net::UnixStream,
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use tcmu_dif::{
    admin::{config_check, images},
    dbus::{Offer, Service},
    image::Format,
};
use zbus::{Connection, connection::Builder, fdo::RequestNameFlags, interface};

const NAME: &str = "org.kernel.TCMUService1";
const ROOT: &str = "/org/kernel/TCMUService1";
const PATIENCE: Duration = Duration::from_secs(30);

/// A bus that denies what the system's denies, and has our policy.
struct Bus {
    dir: tempfile::TempDir,
    daemon: Option<Child>,
}

impl Bus {
    fn new() -> Bus {
        let dir = tempfile::tempdir().unwrap();
        let policy = Path::new(env!("CARGO_MANIFEST_DIR")).join("dist/dbus/tcmu-dif.conf");
        // For the stand-in, which tcmu-runner.conf of its package would let.
        let config = format!(
            r#"<busconfig><type>system</type><listen>unix:path={}</listen><auth>EXTERNAL</auth>
               <policy context="default">
                 <allow user="*"/><deny own="*"/><deny send_type="method_call"/>
                 <allow send_type="signal"/><allow send_requested_reply="true" send_type="method_return"/>
                 <allow send_requested_reply="true" send_type="error"/><allow receive_type="method_call"/>
                 <allow receive_type="method_return"/><allow receive_type="error"/><allow receive_type="signal"/>
                 <allow send_destination="org.freedesktop.DBus"/>
               </policy>
               <include>{}</include></busconfig>"#,
            dir.path().join("bus").display(),
            policy.display(),
        );
        fs::write(dir.path().join("config"), config).unwrap();
        Bus { dir, daemon: None }
    }

    fn address(&self) -> String {
        format!("unix:path={}", self.dir.path().join("bus").display())
    }

    fn start(&mut self) {
        let config = format!("--config-file={}", self.dir.path().join("config").display());
        let mut daemon = Command::new("dbus-daemon");
        daemon.args([&config, "--nofork", "--nopidfile", "--nosyslog"]).stdout(Stdio::null());
        self.daemon = Some(daemon.spawn().expect("dbus-daemon: package dbus"));
        // The socket is there a moment before somebody listens.
        until("the bus", || UnixStream::connect(self.dir.path().join("bus")).is_ok());
    }

    fn stop(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            daemon.kill().unwrap();
            daemon.wait().unwrap();
        }
        let _ = fs::remove_file(self.dir.path().join("bus"));
    }

    fn service(&self) -> Service {
        Service::begin(Offer {
            subtype: "dif".into(),
            description: config_check::DESCRIPTION.into(),
            check: Arc::new(|text| {
                config_check::check(text, Path::new("/none")).map(drop).map_err(|e| e.in_one_line())
            }),
            address: Some(self.address()),
        })
    }

    /// What GLib's own client says.
    fn call(&self, path: &str, method: &str, words: &[&str]) -> Result<String, String> {
        let mut gdbus = Command::new("gdbus");
        gdbus.args(["call", "--address", &self.address(), "--dest", NAME, "--object-path", path]);
        let out =
            gdbus.args(["--method", method]).args(words).output().expect("gdbus: package libglib2.0-bin");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if out.status.success() { Ok(text(&out.stdout)) } else { Err(text(&out.stderr)) }
    }

    fn objects(&self) -> Result<String, String> {
        self.call(ROOT, "org.freedesktop.DBus.ObjectManager.GetManagedObjects", &[])
    }

    fn is_offered(&self) -> bool {
        self.objects().is_ok_and(|o| o.contains("/org/kernel/TCMUService1/dif"))
    }
}

impl Drop for Bus {
    fn drop(&mut self) {
        self.stop();
    }
}

fn until(what: &str, done: impl Fn() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < end, "{what} did not come");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The policy lets root alone.
fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("NOT RUN: the policy lets nobody but root own the name");
    }
    root
}

#[test]
fn glibs_client_finds_the_object_and_is_told_what_is_wrong_with_a_string() {
    if !is_root() {
        return;
    }
    let mut bus = Bus::new();
    bus.start();
    let _service = bus.service();
    until("the object", || bus.is_offered());
    let objects = bus.objects().unwrap();
    // The one object, or targetcli shows the subtype twice; and its property, which targetcli prints as help.
    assert_eq!(objects.matches("'ConfigDesc'").count(), 1, "{objects}");
    let told = objects.split_once("'ConfigDesc': <").unwrap().1;
    // In whichever quotes: there are some in the text.
    assert!(told[1..].starts_with("/PATH/OF/IMAGE"), "{objects}");
    let object = format!("{ROOT}/dif");
    let xml = bus.call(&object, "org.freedesktop.DBus.Introspectable.Introspect", &[]).unwrap();
    for part in ["CheckConfig", "ChangeMedium", "ConfigDesc"] {
        assert!(xml.contains(part), "{part}: {xml}");
    }

    let image = bus.dir.path().join("a.qcow2");
    images::create_new(&image, Format::Qcow2, 1 << 20).unwrap();
    let check = |text: String| bus.call(&object, "org.kernel.TCMUService1.CheckConfig", &[&text]).unwrap();
    assert_eq!(check(format!("dif/{}", image.display())).trim(), "(true, 'success')");
    let said = check("dif//none.qcow2;pi=type1".into());
    assert!(said.starts_with("(false, ") && said.contains("tcmu-dif image create"), "{said}");
    let said =
        bus.call(&object, "org.kernel.TCMUService1.ChangeMedium", &["vm1", "1048576", "dif//a"]).unwrap();
    assert!(said.starts_with("(-95, ") && said.contains("delete the LUN"), "{said}");
}

#[test]
fn a_bus_that_comes_late_and_one_that_comes_back_are_used() {
    if !is_root() {
        return;
    }
    let mut bus = Bus::new();
    let service = bus.service();
    std::thread::sleep(Duration::from_millis(300));
    for _ in 0..2 {
        bus.start();
        until("the object", || bus.is_offered());
        bus.stop();
    }
    bus.start();
    until("the object", || bus.is_offered());
    drop(service);
    until("the end", || bus.objects().is_err());
}

/// tcmu-runner's part of the bus.
struct Manager(Arc<Mutex<Vec<String>>>);

#[interface(name = "org.kernel.TCMUService1.HandlerManager1")]
impl Manager {
    #[zbus(name = "RegisterHandler")]
    fn register(&self, subtype: &str, description: &str) -> (bool, String) {
        assert!(description.contains("pi=type1"));
        self.0.lock().unwrap().push(subtype.to_owned());
        (true, "succeeded".to_owned())
    }
}

async fn stand_in(bus: &Bus, seen: &Arc<Mutex<Vec<String>>>) -> Connection {
    let path = format!("{ROOT}/HandlerManager1");
    let builder = Builder::address(bus.address().as_str()).serve_at(path, Manager(seen.clone()));
    let connection = builder.build().await.unwrap();
    // As g_bus_own_name does: it waits for the name if another has it.
    connection.request_name_with_flags(NAME, RequestNameFlags::empty()).await.unwrap();
    connection
}

#[test]
fn another_owner_of_the_name_is_registered_with_whether_it_came_first_or_second() {
    if !is_root() {
        return;
    }
    let mut bus = Bus::new();
    bus.start();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let first = zbus::block_on(stand_in(&bus, &seen));
    let _service = bus.service();
    until("the registration", || *seen.lock().unwrap() == ["dif"]);
    // As tcmu-runner passes a question on.
    let (ours, path) = (format!("{NAME}.HandlerManager1.dif"), format!("{ROOT}/HandlerManager1/dif"));
    let (ok, why): (bool, String) = zbus::block_on(async {
        let call =
            first.call_method(Some(ours.as_str()), path.as_str(), Some(NAME), "CheckConfig", &"dif/relative");
        call.await.unwrap().body().deserialize().unwrap()
    });
    assert!(!ok && why.contains("is not absolute"), "{why}");

    zbus::block_on(first.close()).unwrap();
    until("the name", || bus.is_offered());
    let _second = zbus::block_on(stand_in(&bus, &seen));
    until("the second registration", || seen.lock().unwrap().len() == 2);
    std::thread::sleep(Duration::from_secs(5));
    assert_eq!(seen.lock().unwrap().len(), 2, "registered more than once with one owner");
}
