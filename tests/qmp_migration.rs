//! LUNs that go and come over QMP: what the daemon is asked, and what clients are told of it.

#![allow(clippy::unwrap_used)] // A test may panic.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use serde_json::{Map, Value, json};
use tcmu_dif::control::{Comes, Host, Incoming, Progress, Registry, To, qmp::Error};

#[path = "common/qmp_rig.rs"]
#[allow(dead_code)] // Others use more of it.
mod rig;
#[path = "common/qmp_schema.rs"]
#[allow(dead_code)] // Others use more of it.
mod schema;

use rig::{Rig, Talk};
use schema::Schema;

/// Notes what the daemon is asked to do.
#[derive(Clone, Default)]
struct Asked(Arc<Mutex<Vec<String>>>);

impl Host for Asked {
    fn resize(&self, _: &str, _: u64) -> Result<(), Error> {
        unreachable!("nobody asks for that")
    }

    fn add(&self, _: &str, _: Map<String, Value>) -> Result<Value, Error> {
        unreachable!("nobody asks for that")
    }

    fn del(&self, _: &str, _: bool) -> Result<Value, Error> {
        unreachable!("nobody asks for that")
    }

    fn hand_over(
        &self,
        _: &Registry,
        device: &str,
        to: &To<'_>,
        progress: &dyn Progress,
    ) -> Result<Value, Error> {
        let To { uri: to, certificates, hostname, blk, .. } = *to;
        let tls = certificates.map(|dir| format!(" {dir} {}", hostname.unwrap_or("-"))).unwrap_or_default();
        let blk = if blk { " with its storage" } else { "" };
        self.0.lock().unwrap().push(format!("hand over {device} {to}{tls}{blk}"));
        match to {
            "unix:/there" => {
                progress.goes();
                Ok(json!({ "device": device, "uri": to, "answered": true, "left": null }))
            }
            _ => Err(Error::generic("nobody is there")),
        }
    }

    fn listen(&self, from: &To<'_>, comes: &Comes<'_>) -> Result<Box<dyn Incoming>, Error> {
        let To { uri, certificates, .. } = *from;
        let name = comes.device.unwrap_or("-");
        let image =
            comes.image.map(|at| format!(" {at} {}", comes.format.unwrap_or("-"))).unwrap_or_default();
        self.0.lock().unwrap().push(format!("listen {uri} {name} {}{image}", certificates.unwrap_or("-")));
        match uri {
            "unix:/taken" => Err(Error::generic("somebody listens there")),
            _ => Ok(Box::new(Coming { asked: self.clone(), comes: uri == "unix:/comes" })),
        }
    }

    fn quit(&self) {
        unreachable!("nobody asks for that")
    }
}

/// A source that comes once the test says `go`, or never.
struct Coming {
    asked: Asked,
    comes: bool,
}

impl Incoming for Coming {
    fn take(&mut self, stop: &AtomicBool, comes: &dyn Fn(&str) -> bool) -> Result<bool, Error> {
        while !stop.load(Ordering::Acquire) {
            if self.comes {
                assert!(comes("vm7"), "it is wanted");
                return if self.asked.has("fail") { Err(Error::generic("no room")) } else { Ok(true) };
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(false)
    }
}

impl Drop for Coming {
    fn drop(&mut self) {
        self.asked.0.lock().unwrap().push("listens no more".into());
    }
}

impl Asked {
    fn has(&self, word: &str) -> bool {
        self.0.lock().unwrap().iter().any(|asked| asked == word)
    }
}

#[test]
fn a_handover_is_the_daemons_and_its_events_are_told() {
    let asked = Asked::default();
    let rig = Rig::new(Registry::with_host(asked.clone()));
    let mut talk = rig.talk();
    let schema = Schema(talk.get("query-qmp-schema", json!({})));
    let given = talk.get("migrate", json!({ "device": "vm1", "uri": "unix:/there" }));
    schema.check_answer("migrate", &given);
    let refused = talk.ask("migrate", json!({ "device": "vm1", "uri": "unix:/elsewhere" }));
    assert_eq!(refused["error"]["desc"], "nobody is there");
    let with =
        json!({ "device": "vm1", "uri": "tls://b:1", "tls-certificates": "/pki", "tls-hostname": "c" });
    talk.ask("migrate", with);
    let told: Vec<Value> = (0..7).map(|_| talk.event("MIGRATION")).collect();
    told.iter().for_each(|event| schema.check_event(event));
    let statuses: Vec<&Value> = told.iter().map(|event| &event["data"]["status"]).collect();
    assert_eq!(statuses, ["setup", "active", "completed", "setup", "failed", "setup", "failed"]);
    let newest = talk.get("query-migrate", json!({}));
    schema.check_answer("query-migrate", &newest);
    assert_eq!((&newest["status"], &newest["error-desc"]), (&json!("failed"), &json!("nobody is there")));
    assert_eq!((&newest["uri"], &newest["incoming"]), (&json!("tls://b:1"), &json!(false)));
    talk.get("migrate", json!({ "device": "vm1", "uri": "unix:/there", "blk": true }));
    assert_eq!(talk.get("query-migrate", json!({}))["status"], "completed");
    assert_eq!(talk.get("query-migrate", json!({ "device": "none" })), json!({}));
    let asked = asked.0.lock().unwrap().clone();
    assert_eq!(asked[..2], ["hand over vm1 unix:/there", "hand over vm1 unix:/elsewhere"]);
    let with_storage = "hand over vm1 unix:/there with its storage";
    assert_eq!(asked[2..], ["hand over vm1 tls://b:1 /pki c", with_storage]);
    let nobody = Rig::new(Registry::default());
    let refused = nobody.talk().ask("migrate", json!({ "device": "vm1", "uri": "unix:/there" }));
    assert!(refused["error"]["desc"].as_str().unwrap().contains("no daemon here"), "{refused}");
}

#[test]
fn a_source_is_waited_for_one_at_a_time_and_what_becomes_of_it_is_told() {
    let asked = Asked::default();
    let luns = Registry::with_host(asked.clone());
    let rig = Rig::new(luns.clone());
    let mut talk = rig.talk();
    let schema = Schema(talk.get("query-qmp-schema", json!({})));
    assert_eq!(talk.get("query-migrate", json!({})), json!({}));
    let told = |talk: &mut Talk, n: usize| -> Vec<(Value, Value)> {
        let event = |_| {
            let event = talk.event("MIGRATION");
            schema.check_event(&event);
            (event["data"]["device"].clone(), event["data"]["status"].clone())
        };
        (0..n).map(event).collect()
    };
    let of = |words: &[(Option<&str>, &str)]| -> Vec<(Value, Value)> {
        words.iter().map(|(device, status)| (json!(device), json!(status))).collect()
    };

    // Nobody comes, and it is waited for nobody else meanwhile.
    assert_eq!(talk.get("migrate-incoming", json!({ "uri": "unix:/never" })), json!({}));
    let waiting = talk.get("query-migrate", json!({}));
    schema.check_answer("query-migrate", &waiting);
    assert_eq!((&waiting["status"], &waiting["incoming"]), (&json!("setup"), &json!(true)));
    let refused = talk.ask("migrate-incoming", json!({ "uri": "unix:/comes" }));
    let words = refused["error"]["desc"].as_str().unwrap();
    assert!(words.contains("unix:/never") && words.contains("migrate_cancel"), "{words}");
    talk.get("migrate_cancel", json!({}));
    assert_eq!(told(&mut talk, 2), of(&[(None, "setup"), (None, "cancelled")]));
    assert!(asked.has("listens no more"));
    let refused = talk.ask("migrate_cancel", json!({}));
    assert!(refused["error"]["desc"].as_str().unwrap().contains("no source is waited for"), "{refused}");

    // One comes; one cannot be had; and where nobody can listen nothing is begun.
    talk.get("migrate-incoming", json!({ "uri": "unix:/comes", "device": "vm7" }));
    let all = [(Some("vm7"), "setup"), (Some("vm7"), "active"), (Some("vm7"), "completed")];
    assert_eq!(told(&mut talk, 3), of(&all));
    assert_eq!(talk.get("query-migrate", json!({ "device": "vm7" }))["status"], "completed");
    asked.0.lock().unwrap().push("fail".into());
    talk.get("migrate-incoming", json!({ "uri": "unix:/comes" }));
    assert_eq!(told(&mut talk, 3), of(&[(None, "setup"), (Some("vm7"), "active"), (Some("vm7"), "failed")]));
    assert_eq!(talk.get("query-migrate", json!({}))["error-desc"], "no room");
    let refused = talk.ask("migrate-incoming", json!({ "uri": "unix:/taken" }));
    assert_eq!(refused["error"]["desc"], "somebody listens there");

    // The daemon's end is the end of a wait.
    let with = json!({ "uri": "tls://[::]:1", "tls-certificates": "/pki", "image": "/new", "format": "raw" });
    talk.get("migrate-incoming", with);
    luns.wait_for_no_source();
    assert_eq!(asked.0.lock().unwrap().last().unwrap(), "listens no more");
    assert!(asked.has("listen tls://[::]:1 - /pki /new raw"));
}
