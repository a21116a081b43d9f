//! LUNs that are declared in files: `/etc/tcmu-dif/luns.d/NAME.toml`, in the words of `tcmu-dif create`.
//!
//! A look at the directory makes what is declared and not there, and takes down what was declared and is not any more. What somebody uses it
//! leaves alone, and says so. A LUN that was made by hand is its maker's, whatever a file says of its name. A declared LUN without a serial number
//! gets one the first time, which is kept: it is the same disk after a reboot.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{
    Admin, Refusal,
    create::differences,
    luns::refused,
    order::{Order, Words},
};
use crate::{
    daemon::settings::Shared,
    files,
    image::null,
    kernel::{fabric, names::Name},
    lun::state_file::{NewerVersion, StateFile, check_version},
};

/// Where the administrator declares LUNs.
pub const LUNS_D: &str = "/etc/tcmu-dif/luns.d";

/// The folder of the serial numbers that were given.
const SERIALS: &str = "serials";

/// The LUNs of a directory.
#[derive(Debug, Clone)]
pub struct Declared {
    /// Who makes them.
    pub admin: Admin,
    /// The directory's name is in them; if it isn't there, none is declared.
    pub settings: Shared,
}

/// The serial number of a declared LUN, and the image that it belongs to.
#[derive(Debug, Serialize, Deserialize)]
struct Given {
    image: PathBuf,
    number: String,
}

/// What became of a declared LUN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Brought {
    /// It was made.
    Made,
    /// It was there, as declared.
    There,
}

impl crate::daemon::declaring::Declared for Declared {
    /// Failures are logged, and keep no other LUN from coming.
    fn bring(&self) {
        let dir = self.settings.get().luns_d;
        let files = match read(&dir) {
            Ok(files) => files,
            Err(e) => {
                tracing::error!("{}: {e}; the LUNs stay as they are", dir.display());
                return;
            }
        };
        let mut known = self.known();
        for name in known.clone().into_iter().filter(|name| !files.contains_key(name)) {
            if self.drop_one(&name) {
                known.remove(&name);
                self.remember(&known);
            }
        }
        for (name, order) in files {
            // Noted before it is made: what a crash leaves half made is ours to take down.
            let ours = !known.insert(name.clone());
            if !ours {
                self.remember(&known);
            }
            match order.map_err(|e| (e, ours)).and_then(|order| self.one(&order, ours)) {
                Ok(Brought::Made) => tracing::info!(lun = name, "declared, and made"),
                Ok(Brought::There) => tracing::debug!(lun = name, "declared, and there"),
                Err((e, keep)) => {
                    if !keep {
                        known.remove(&name);
                        self.remember(&known);
                    }
                    tracing::error!(lun = name, "declared: {}", e.in_one_line());
                }
            }
        }
    }
}

impl Declared {
    /// Makes one, or sees that it is there. The failure says whether the name stays one of ours.
    fn one(&self, order: &Order, ours: bool) -> Result<Brought, (Refusal, bool)> {
        let declared = order;
        let order = &self.follow(declared).map_err(|e| (e, ours))?;
        let name = &order.name;
        let places = &self.admin.places;
        let found = places.find("create", name).map_err(|e| (e, ours))?;
        if let Some(there) = found {
            let config = order.config().map_err(|e| (e, ours))?;
            let exports =
                fabric::of(&places.tree, &there).map_err(|e| (refused("create", name, &e), ours))?;
            let differences = differences(order, &config, &there, &exports);
            if differences.is_empty() {
                return Ok(Brought::There);
            }
            let is = format!("it is there, with {}", differences.join(", "));
            if !ours {
                let next =
                    format!("delete it, and reload: tcmu-dif delete {name} && systemctl reload tcmu-dif");
                return Err((
                    Refusal::new("create", name, format!("{is}, and was made by hand")).then(next),
                    false,
                ));
            }
            tracing::info!(lun = %name, "{is}: making it anew");
            self.admin.delete(name, false).map_err(|e| {
                let reason = format!("{is}, and stays so: {}", e.reason);
                (Refusal { reason, ..e }, true)
            })?;
        }
        // A create that fails leaves nothing that could be ours.
        let Order { serial, .. } = self.with_serial(declared).map_err(|e| (e, false))?;
        self.admin.create(&Order { serial, ..order.clone() }).map_err(|e| (e, false))?;
        Ok(Brought::Made)
    }

    /// The order with the image that the LUN has now: a mirror may have moved it from the one that is declared, which has missed what was written
    /// since. So a reboot brings up the new one, and the log says what to edit.
    fn follow(&self, order: &Order) -> Result<Order, Refusal> {
        let moves = self.admin.places.moves(&order.name);
        let failed = |e: io::Error| Refusal::from("declared", moves.path().display(), &e);
        let Some(moved) = moves.from(&order.image).map_err(failed)? else { return Ok(order.clone()) };
        let to = moved.config().map_err(|e| Refusal::from("declared", moves.path().display(), &e))?;
        tracing::warn!(
            lun = %order.name,
            "{}.toml names {}, and a mirror has moved the LUN to {}, which it gets: edit the file",
            order.name,
            order.image.display(),
            to.image.display()
        );
        Ok(Order { image: to.image, format: to.format, sidecar: to.sidecar, ..order.clone() })
    }

    /// The order with the serial number that it had the last time.
    fn with_serial(&self, order: &Order) -> Result<Order, Refusal> {
        if order.serial.is_some() {
            return Ok(order.clone());
        }
        let file = self.serial_file(order.name.as_str());
        let failed = |e: io::Error| Refusal::from("serial", file.path().display(), &e);
        let newer = |e: io::Error| {
            let next = NewerVersion::of(&e).map(NewerVersion::next_step);
            failed(e).maybe_next(next)
        };
        let moves = self.admin.places.moves(&order.name);
        let mut given = file.load::<Given>().map_err(newer)?;
        if let Some(there) = given.as_mut().filter(|given| given.image != order.image) {
            // The declaration names what a mirror has moved the LUN to: it is the same disk.
            let moved = moves.from(&there.image).map_err(failed)?.and_then(|moved| moved.config().ok());
            if moved.is_some_and(|to| to.image == order.image) {
                there.image.clone_from(&order.image);
                file.save(&*there, true).map_err(failed)?;
            }
        }
        let given = given.filter(|given| given.image == order.image);
        let serial = match given {
            Some(given) => given.number,
            None => {
                let serial = uuid::Uuid::new_v4().to_string();
                file.save(&Given { image: order.image.clone(), number: serial.clone() }, true)
                    .map_err(failed)?;
                serial
            }
        };
        Ok(Order { serial: Some(serial), ..order.clone() })
    }

    fn serial_file(&self, name: &str) -> StateFile {
        StateFile::new(&self.admin.places.state_dir, SERIALS, &format!("declared:{name}"))
    }

    /// Takes down what is declared no more. True if there is nothing left of it.
    fn drop_one(&self, name: &str) -> bool {
        let gone =
            Name::new(name).map_err(|e| Refusal::new("delete", name, e.to_string())).and_then(|name| {
                match self.admin.places.find("delete", &name)? {
                    Some(_) => self.admin.delete(&name, false).map(|_| true),
                    None => Ok(false),
                }
            });
        match gone {
            Ok(was_there) => {
                if was_there {
                    tracing::info!(lun = name, "declared no more, and taken down; its image stays");
                }
                if let Err(e) = self.serial_file(name).remove() {
                    tracing::warn!(lun = name, "its serial number stays noted: {e}");
                }
                true
            }
            Err(e) => {
                tracing::warn!(lun = name, "declared no more, and still there: {}", e.reason);
                false
            }
        }
    }

    fn known_file(&self) -> PathBuf {
        self.admin.places.run.path().join("declared.json")
    }

    /// The names that were declared the last time, since the host was booted.
    fn known(&self) -> BTreeSet<String> {
        let path = self.known_file();
        let read = match fs::read(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return BTreeSet::new(),
            read => read.and_then(|text| Known::parse(&path, &text)),
        };
        read.unwrap_or_else(|e| {
            let next = NewerVersion::of(&e).map(|newer| format!("; next: {}", newer.next_step()));
            tracing::warn!(
                "{e}{}; what was declared and is no more has to be deleted by hand",
                next.unwrap_or_default()
            );
            BTreeSet::new()
        })
    }

    fn remember(&self, known: &BTreeSet<String>) {
        let path = self.known_file();
        // A newer version's stays for that one, and has been told of.
        let newer = fs::read(&path).and_then(|text| Known::parse(&path, &text));
        if newer.is_err_and(|e| NewerVersion::of(&e).is_some()) {
            return;
        }
        let text = serde_json::to_vec(&Known { version: KNOWN_VERSION, names: known.clone() })
            .map_err(io::Error::other);
        if let Err(e) = text.and_then(|text| files::replace(&path, &text, false)) {
            tracing::error!("{}: {e}", path.display());
        }
    }
}

/// The version of `declared.json`. What is a list alone is from before it had one.
const KNOWN_VERSION: u32 = 1;

/// `declared.json`.
#[derive(Debug, Serialize, Deserialize)]
struct Known {
    version: u32,
    names: BTreeSet<String>,
}

impl Known {
    fn parse(path: &Path, text: &[u8]) -> io::Result<BTreeSet<String>> {
        if let Ok(names) = serde_json::from_slice(text) {
            return Ok(names);
        }
        check_version(path, text, KNOWN_VERSION)?;
        Ok(serde_json::from_slice::<Known>(text)?.names)
    }
}

/// What a directory's `NAME.toml`s declare, by name; none if there is no directory.
fn read(dir: &Path) -> io::Result<BTreeMap<String, Result<Order, Refusal>>> {
    let mut out = BTreeMap::new();
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(out),
        Err(e) => return Err(e),
    };
    for entry in entries {
        let path = entry?.path();
        let Some(stem) = path.file_stem().filter(|_| path.extension().is_some_and(|x| x == "toml")) else {
            continue;
        };
        let name = stem.to_string_lossy().into_owned();
        // What makes no sense may be that of a LUN that is there: it is none that is declared no more.
        out.insert(name.clone(), parse(&path, &name));
    }
    Ok(out)
}

fn parse(path: &Path, name: &str) -> Result<Order, Refusal> {
    let at = || path.display().to_string();
    let next = || {
        format!(
            "mend the file, and reload: systemctl reload tcmu-dif; the words are those of: tcmu-dif create --help ({})",
            at()
        )
    };
    let name =
        Name::new(name).map_err(|e| Refusal::new("luns.d", at(), e.to_string()).then("rename the file"))?;
    let text = fs::read_to_string(path).map_err(|e| Refusal::from("luns.d", at(), &e))?;
    let words: Words = toml::from_str(&text).map_err(|e| {
        let before = e.span().map_or("", |span| &text[..span.start.min(text.len())]);
        let line = before.matches('\n').count() + 1;
        Refusal::new("luns.d", at(), format!("line {line}: {}", e.message())).then(next())
    })?;
    let order = words.order(name).map_err(|e| e.then(next()))?;
    if order.size.is_some() && !null::is_null(&order.image) {
        return Err(Refusal::new("luns.d", at(), "size: a declared LUN has an image that is there already")
            .then(format!("make the image first: tcmu-dif image create {} SIZE", order.image.display())));
    }
    order.config().map_err(|e| e.then(next()))?;
    Ok(order)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        admin::luns::Places,
        daemon::{declaring::Declared as _, settings::Settings},
        image::Format,
        lun::config::DeviceConfig,
    };

    fn at(dir: &Path) -> Declared {
        let places = Places::at(&dir.join("configfs"), &dir.join("run"), &dir.join("lib"));
        fs::create_dir_all(dir.join("run")).unwrap();
        let settings = Shared::new(Settings {
            log: "info".into(),
            backend: None,
            polling: true,
            luns_d: dir.join("luns.d"),
            metrics_at: None,
            cache_size: None,
        });
        Declared { admin: Admin { places, protect: |_, _, _, _, _| Ok(()) }, settings }
    }

    #[test]
    fn without_a_directory_nothing_is_declared() {
        assert!(read(Path::new("/nonexistent/luns.d")).unwrap().is_empty());
    }

    #[test]
    fn a_file_that_makes_no_sense_is_named_with_its_line_and_the_others_count() {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in [
            ("good.toml", "image = '/a.raw'\nexport = ['vhost']\n"),
            ("vm2.toml", "image = '/a.raw'\npi = 'type1'\ncolour = 'red'\n"),
            ("vm3.toml", "image = '/a.raw'\nsize = '1G'\n"),
            ("vm4.toml", "image = 'a.raw'\n"),
            ("vm5.toml", "image = '/a.raw'\npi-mode = 'journal'\n"),
            ("no good.toml", "image = '/a.raw'\n"),
            ("README", "nothing"),
        ] {
            fs::write(dir.path().join(name), text).unwrap();
        }
        let read = read(dir.path()).unwrap();
        assert_eq!(read.len(), 6);
        assert!(read["good"].is_ok());
        for (name, words) in [
            ("vm2", "line 3: unknown field `colour`"),
            ("vm3", "size"),
            ("vm4", "absolute"),
            ("vm5", "--pi off"),
            ("no good", "name"),
        ] {
            let e = read[name].as_ref().unwrap_err();
            assert!(e.to_string().contains(words) && e.next.is_some(), "{name}: {e}");
        }
    }

    #[test]
    fn a_declared_lun_keeps_its_serial_number_as_long_as_it_has_its_image() {
        let dir = tempfile::tempdir().unwrap();
        let declared = at(dir.path());
        let order = |image: &str| {
            let words: Words = toml::from_str(&format!("image = '{image}'")).unwrap();
            words.order(Name::new("vm1").unwrap()).unwrap()
        };
        let serial = |image: &str| declared.with_serial(&order(image)).unwrap().serial.unwrap();
        let first = serial("/a.raw");
        assert_eq!(serial("/a.raw"), first);
        let other = serial("/b.raw");
        assert_ne!(other, first);
        assert!(declared.drop_one("vm1"));
        assert_ne!(serial("/b.raw"), other);
        let own = Order { serial: Some("mine".into()), ..order("/b.raw") };
        assert_eq!(declared.with_serial(&own).unwrap().serial.unwrap(), "mine");
    }

    #[test]
    fn a_declared_lun_that_a_mirror_has_moved_gets_the_image_that_it_has_and_stays_the_same_disk() {
        let dir = tempfile::tempdir().unwrap();
        let declared = at(dir.path());
        let order = |image: &str| {
            let words: Words = toml::from_str(&format!("image = '{image}'\nformat = 'raw'")).unwrap();
            words.order(Name::new("vm1").unwrap()).unwrap()
        };
        let serial = |image: &str| declared.with_serial(&order(image)).unwrap().serial.unwrap();
        let first = serial("/old.raw");
        let moves = declared.admin.places.moves(&Name::new("vm1").unwrap());
        let to = DeviceConfig { format: Some(Format::Qcow2), ..DeviceConfig::new("/new.qcow2") };
        moves.note(&DeviceConfig::new("/old.raw"), &to).unwrap();
        let followed = declared.follow(&order("/old.raw")).unwrap();
        assert_eq!((followed.image, followed.format), ("/new.qcow2".into(), Some(Format::Qcow2)));
        assert_eq!(serial("/old.raw"), first);
        // The file has been edited, as the log said.
        assert_eq!(serial("/new.qcow2"), first);
        assert_eq!(declared.follow(&order("/new.qcow2")).unwrap().image, Path::new("/new.qcow2"));
        // By hand, the image that has missed writes is refused.
        fs::write(dir.path().join("old.raw"), "").unwrap();
        let refused = declared.admin.create(&order("/old.raw")).unwrap_err();
        assert!(refused.reason.contains("was moved from this image to /new.qcow2"), "{}", refused.reason);
        assert!(refused.next.unwrap().contains("rm "));
    }

    #[test]
    fn what_was_declared_is_known_to_the_next_daemon() {
        let dir = tempfile::tempdir().unwrap();
        let declared = at(dir.path());
        assert!(declared.known().is_empty());
        let names = BTreeSet::from(["vm1".to_owned(), "vm2".to_owned()]);
        declared.remember(&names);
        assert_eq!(at(dir.path()).known(), names);
        // As it was before it had a version.
        fs::write(declared.known_file(), r#"["vm1","vm2"]"#).unwrap();
        assert_eq!(at(dir.path()).known(), names);
        // A newer one is not understood, and stays.
        let newer = r#"{"version":2,"luns":{"vm1":{}}}"#;
        fs::write(declared.known_file(), newer).unwrap();
        assert!(declared.known().is_empty());
        declared.remember(&names);
        assert_eq!(fs::read_to_string(declared.known_file()).unwrap(), newer);
        fs::remove_file(declared.known_file()).unwrap();
        declared.remember(&names);
        // Neither is in configfs any more: nothing is left of them.
        fs::create_dir_all(dir.path().join("configfs/target/core")).unwrap();
        declared.bring();
        assert!(declared.known().is_empty());
    }
}
