//! LUNs that are declared in files: `/etc/tcmu-dif/luns.d/NAME.toml`, in the words of `tcmu-dif create`.
//!
//! A look at the directory makes what is declared and not there, and takes down what was declared and is not any more. What somebody uses it
//! leaves alone, and says so. A directory that cannot be read, or is gone, takes down nothing. A LUN that was made by hand is its maker's, whatever a file says of its name. A declared LUN without a serial number
//! gets one the first time, which is kept: it is the same disk after a reboot. One that cannot be made is tried again ([`super::owed`]).

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
    time::Instant,
};

use serde::{Deserialize, Serialize};

use super::{
    Admin, Refusal,
    create::{differences, look_at_image},
    luns::refused,
    order::{Order, Words},
    owed::{Owed, Tried, other_host_of},
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
#[derive(Debug)]
pub struct Declared {
    /// Who makes them.
    admin: Admin,
    /// The directory's name is in them.
    settings: Shared,
    owed: Owed,
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

/// Why a declared LUN is not there as declared.
struct Failed {
    refusal: Refusal,
    /// The name stays one of ours: what is there was declared.
    ours: bool,
    /// It may come without anybody's doing here.
    again: bool,
}

impl Failed {
    fn new(refusal: Refusal, ours: bool) -> Failed {
        Failed { refusal, ours, again: true }
    }

    /// Somebody has to do something first.
    fn for_good(refusal: Refusal, ours: bool) -> Failed {
        Failed { refusal, ours, again: false }
    }
}

impl crate::daemon::declaring::Declared for Declared {
    /// Failures are logged, and keep no other LUN from coming.
    fn bring(&self) -> bool {
        let dir = self.settings.get().luns_d;
        let mut known = self.known();
        let files = match read(&dir) {
            Ok(Some(files)) => files,
            Ok(None) if known.is_empty() && !self.owed.is_any() => BTreeMap::new(),
            unread => {
                let why = unread.err().map_or("it is not there any more".to_owned(), |e| e.to_string());
                let at = dir.display();
                let names = known.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
                let next = if known.is_empty() {
                    "bring it back, and reload: systemctl reload tcmu-dif".to_owned()
                } else {
                    format!(
                        "bring it back, and reload; or, if none is to be declared, make it empty (mkdir -p {at}) and reload, \
                         which takes down what nobody uses of: {names}"
                    )
                };
                tracing::error!("{at}: {why}; the LUNs stay as they are; next: {next}");
                return self.owed.is_any();
            }
        };
        self.owed.clear();
        for name in known.clone().into_iter().filter(|name| !files.contains_key(name)) {
            if self.drop_one(&name) {
                known.remove(&name);
                self.remember(&known);
            }
        }
        for (name, order) in files {
            match self.attempt(&mut known, &name, &order, false) {
                Ok(Brought::Made) => tracing::info!(lun = name, "declared, and made"),
                Ok(Brought::There) => tracing::debug!(lun = name, "declared, and there"),
                Err(failed) => {
                    let mut then = "";
                    let waits = |order: &&Order| failed.again && other_host_of(&order.image).is_none();
                    if let Some(order) = order.as_ref().ok().filter(waits) {
                        self.owed.note(order, &failed.refusal, Instant::now());
                        then = " (it is tried again every few seconds, and told of when that changes)";
                    }
                    tracing::error!(lun = name, "declared: {}{then}", failed.refusal.in_one_line());
                }
            }
        }
        self.owed.is_any()
    }

    fn again(&self) -> bool {
        let look = |declared: &Order| {
            let order = self.follow(declared, true).map_err(Tried::Failed)?;
            if let Some(host) = other_host_of(&order.image) {
                let refusal = Refusal::new("create", order.image.display(), format!("it is host {host}'s"));
                return Err(Tried::GivenUp(refusal.then("once it is to be had: systemctl reload tcmu-dif")));
            }
            let config = order.config().map_err(Tried::Failed)?;
            look_at_image(&order, &config).map(|_| ()).map_err(Tried::Failed)
        };
        let make = |order: &Order| {
            let name = order.name.as_str();
            match self.attempt(&mut self.known(), name, &Ok(order.clone()), true) {
                Ok(_) => {
                    tracing::info!(lun = name, "declared, and made by now");
                    Tried::Made
                }
                Err(failed) if failed.again => Tried::Failed(failed.refusal),
                Err(failed) => Tried::GivenUp(failed.refusal),
            }
        };
        for (name, why) in self.owed.again(Instant::now(), look, make) {
            tracing::error!(lun = name, "declared: {why}");
        }
        self.owed.is_any()
    }
}

impl Declared {
    /// Those of the directory that is set.
    pub fn new(admin: Admin, settings: Shared) -> Declared {
        Declared { admin, settings, owed: Owed::default() }
    }

    /// Makes one, and keeps account of whose it is.
    fn attempt(
        &self,
        known: &mut BTreeSet<String>,
        name: &str,
        order: &Result<Order, Refusal>,
        retry: bool,
    ) -> Result<Brought, Failed> {
        // Noted before it is made: what a crash leaves half made is ours to take down.
        let ours = !known.insert(name.to_owned());
        if !ours {
            self.remember(known);
        }
        let tried = match order {
            // A file is taken up by a reload.
            Err(refusal) => Err(Failed::for_good(refusal.clone(), ours)),
            Ok(order) => self.one(order, ours, retry),
        };
        if tried.as_ref().is_err_and(|failed| !failed.ours) {
            known.remove(name);
            self.remember(known);
        }
        tried
    }

    /// Makes one, or sees that it is there. A retry takes nothing down: that is a reload's business, for which somebody has chosen the moment.
    fn one(&self, order: &Order, ours: bool, retry: bool) -> Result<Brought, Failed> {
        let declared = order;
        let order = &self.follow(declared, retry).map_err(|e| Failed::new(e, ours))?;
        let name = &order.name;
        let places = &self.admin.places;
        let found = places.find("create", name).map_err(|e| Failed::new(e, ours))?;
        if let Some(there) = found {
            let config = order.config().map_err(|e| Failed::for_good(e, ours))?;
            let exports = fabric::of(&places.tree, &there)
                .map_err(|e| Failed::new(refused("create", name, &e), ours))?;
            let differences = differences(order, &config, &there, &exports);
            if differences.is_empty() {
                return Ok(Brought::There);
            }
            let is = format!("it is there, with {}", differences.join(", "));
            if !ours {
                let next =
                    format!("delete it, and reload: tcmu-dif delete {name} && systemctl reload tcmu-dif");
                let refusal = Refusal::new("create", name, format!("{is}, and was made by hand")).then(next);
                return Err(Failed::for_good(refusal, false));
            }
            if retry {
                let refusal = Refusal::new("create", name, is).then("systemctl reload tcmu-dif");
                return Err(Failed::for_good(refusal, true));
            }
            tracing::info!(lun = %name, "{is}: making it anew");
            self.admin.delete(name, false).map_err(|e| {
                let reason = format!("{is}, and stays so: {}", e.reason);
                Failed::for_good(Refusal { reason, ..e }, true)
            })?;
        }
        // A create that fails leaves nothing that could be ours.
        let Order { serial, .. } = self.with_serial(declared).map_err(|e| Failed::new(e, false))?;
        self.admin.create(&Order { serial, ..order.clone() }).map_err(|e| Failed::new(e, false))?;
        Ok(Brought::Made)
    }

    /// The order with the image that the LUN has now: a mirror may have moved it from the one that is declared, which has missed what was written
    /// since. So a reboot brings up the new one, and the log says what to edit, unless it has (`said`).
    fn follow(&self, order: &Order, said: bool) -> Result<Order, Refusal> {
        let moves = self.admin.places.moves(&order.name);
        let failed = |e: io::Error| Refusal::from("declared", moves.path().display(), &e);
        let Some(moved) = moves.from(&order.image).map_err(failed)? else { return Ok(order.clone()) };
        let to = moved.config().map_err(|e| Refusal::from("declared", moves.path().display(), &e))?;
        if !said {
            tracing::warn!(
                lun = %order.name,
                "{}.toml names {}, and a mirror has moved the LUN to {}, which it gets: edit the file",
                order.name,
                order.image.display(),
                to.image.display()
            );
        }
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

/// What a directory's `NAME.toml`s declare, by name; `None` if there is no directory.
fn read(dir: &Path) -> io::Result<Option<BTreeMap<String, Result<Order, Refusal>>>> {
    let mut out = BTreeMap::new();
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
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
    Ok(Some(out))
}

/// What a file declares of the LUN of that name.
pub(super) fn parse(path: &Path, name: &str) -> Result<Order, Refusal> {
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
        Declared::new(Admin { places, protect: |_, _, _, _, _| Ok(()) }, settings)
    }

    #[test]
    fn without_a_directory_nothing_is_declared() {
        assert!(read(Path::new("/nonexistent/luns.d")).unwrap().is_none());
        let dir = tempfile::tempdir().unwrap();
        assert!(!at(dir.path()).bring());
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
        let read = read(dir.path()).unwrap().unwrap();
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
        let followed = declared.follow(&order("/old.raw"), false).unwrap();
        assert_eq!((followed.image, followed.format), ("/new.qcow2".into(), Some(Format::Qcow2)));
        assert_eq!(serial("/old.raw"), first);
        // The file has been edited, as the log said.
        assert_eq!(serial("/new.qcow2"), first);
        assert_eq!(declared.follow(&order("/new.qcow2"), false).unwrap().image, Path::new("/new.qcow2"));
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
        fs::create_dir(dir.path().join("luns.d")).unwrap();
        declared.bring();
        assert!(declared.known().is_empty());
    }

    #[test]
    fn a_directory_that_is_gone_or_cannot_be_read_takes_no_lun_down_and_an_empty_one_does() {
        let dir = tempfile::tempdir().unwrap();
        let declared = at(dir.path());
        fs::create_dir_all(dir.path().join("configfs/target/core")).unwrap();
        let names = BTreeSet::from(["vm1".to_owned(), "vm2".to_owned()]);
        declared.remember(&names);
        declared.bring();
        assert_eq!(declared.known(), names);
        // Not a directory: nobody can read it as one.
        fs::write(dir.path().join("luns.d"), "").unwrap();
        declared.bring();
        assert_eq!(declared.known(), names);
        fs::remove_file(dir.path().join("luns.d")).unwrap();
        fs::create_dir(dir.path().join("luns.d")).unwrap();
        declared.bring();
        assert!(declared.known().is_empty());
    }

    #[test]
    fn a_declared_lun_whose_image_comes_later_is_tried_again_and_one_whose_file_makes_no_sense_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let (luns_d, image) = (dir.path().join("luns.d"), dir.path().join("late.raw"));
        fs::create_dir_all(dir.path().join("configfs/target/core")).unwrap();
        fs::create_dir(&luns_d).unwrap();
        fs::write(luns_d.join("bad.toml"), "colour = 'red'\n").unwrap();
        let declared = at(dir.path());
        assert!(!declared.bring());
        fs::write(luns_d.join("vm1.toml"), format!("image = '{}'\n", image.display())).unwrap();
        assert!(declared.bring());
        assert!(declared.again());
        let said = |declared: &Declared| declared.owed.said("vm1").unwrap();
        assert!(said(&declared).contains("no such file"), "{}", said(&declared));
        assert!(declared.known().is_empty());
        fs::write(&image, vec![0; 1 << 20]).unwrap();
        assert!(declared.again());
        // It was tried, as far as it goes where no daemon runs.
        assert!(!said(&declared).contains("no such file"), "{}", said(&declared));
        // A directory that is gone makes nothing forgotten.
        fs::rename(&luns_d, dir.path().join("elsewhere")).unwrap();
        assert!(declared.bring());
        fs::create_dir(&luns_d).unwrap();
        assert!(!declared.bring());
    }
}
