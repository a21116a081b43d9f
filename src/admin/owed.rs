//! Declared LUNs that could not be made, and may yet be: which they are, when each is tried again, and what is worth saying of it.
//!
//! An image may come later than the daemon: with a mount, a server, a copy that is under way. Looking at the image is cheap and done every time. A LUN
//! whose image is there and that fails all the same costs more (objects in the kernel, a sidecar that is read), so the time
//! between two tries doubles. An image that is another host's is not waited for: that host may give it back for a moment only, when its daemon is
//! started anew. The same failure is said once. Called by [`super::declared`], on its thread.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use super::{Refusal, order::Order};
use crate::image::{
    nbd::is_uri,
    owner::{self, HostId},
};

/// The time until the second try of a LUN whose image is there; the daemon's loop asks that often.
const FIRST: Duration = Duration::from_secs(5);
/// The longest time between two tries.
const LONGEST: Duration = Duration::from_secs(60);

/// Those LUNs.
#[derive(Debug, Default)]
pub(super) struct Owed(Mutex<BTreeMap<String, One>>);

#[derive(Debug, Clone)]
struct One {
    order: Order,
    /// Why not, as it was said.
    said: String,
    /// How often it has failed with its image there.
    failed: u32,
    /// When it may be tried with its image there.
    next: Instant,
}

/// How another try has ended.
pub(super) enum Tried {
    /// The LUN is there.
    Made,
    /// It is not, and may still come.
    Failed(Refusal),
    /// It is not, and will not without somebody's doing.
    GivenUp(Refusal),
}

/// The host that has that image or had it last, if it is shared by hosts and that is not this one.
pub(super) fn other_host_of(image: &Path) -> Option<String> {
    if is_uri(image) {
        return None;
    }
    let record = owner::read(image).ok()??;
    let here = HostId::this().is_ok_and(|here| here.id == record.host.id);
    (!here).then_some(record.host.name)
}

impl Owed {
    /// Begins anew: all that is declared is about to be tried.
    pub(super) fn clear(&self) {
        self.with(BTreeMap::clear);
    }

    /// That one could not be made, and may yet be.
    pub(super) fn note(&self, order: &Order, refusal: &Refusal, now: Instant) {
        let said = refusal.in_one_line();
        let one = One { order: order.clone(), said, failed: 0, next: now };
        self.with(|all| all.insert(order.name.to_string(), one));
    }

    /// Whether there are any.
    pub(super) fn is_any(&self) -> bool {
        self.with(|all| !all.is_empty())
    }

    /// Tries each whose time has come. `look` says what is wrong with the image; `make` makes the LUN. Gives the failures that have not been said.
    pub(super) fn again(
        &self,
        now: Instant,
        look: impl Fn(&Order) -> Result<(), Tried>,
        make: impl Fn(&Order) -> Tried,
    ) -> Vec<(String, String)> {
        let mut news = Vec::new();
        for (name, one) in self.with(|all| all.clone()) {
            let (tried, failed) = match look(&one.order) {
                // As soon as the image is there it is tried.
                Err(failed) => (failed, 0),
                Ok(()) if now < one.next => continue,
                Ok(()) => (make(&one.order), one.failed + 1),
            };
            let (refusal, keep) = match tried {
                Tried::Made => {
                    self.with(|all| all.remove(&name));
                    continue;
                }
                Tried::Failed(refusal) => (refusal, true),
                Tried::GivenUp(refusal) => (refusal, false),
            };
            let said = refusal.in_one_line();
            if said != one.said {
                news.push((name.clone(), said.clone()));
            }
            let wait = FIRST.saturating_mul(1 << failed.saturating_sub(1).min(8)).min(LONGEST);
            let next = if failed == 0 { now } else { now + wait };
            self.with(|all| match keep {
                true => all.insert(name, One { said, failed, next, ..one }),
                false => all.remove(&name),
            });
        }
        news
    }

    /// Why that one is not there, as it was said.
    #[cfg(test)]
    pub(super) fn said(&self, name: &str) -> Option<String> {
        self.with(|all| all.get(name).map(|one| one.said.clone()))
    }

    fn with<T>(&self, f: impl FnOnce(&mut BTreeMap<String, One>) -> T) -> T {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;
    use crate::{admin::order::Words, kernel::names::Name};

    fn order(name: &str) -> Order {
        let words: Words = toml::from_str("image = '/a.raw'").unwrap();
        words.order(Name::new(name).unwrap()).unwrap()
    }

    fn refusal(why: &str) -> Refusal {
        Refusal::new("create", "/a.raw", why)
    }

    #[test]
    fn an_image_that_is_not_there_is_looked_for_each_time_and_said_once_and_its_lun_comes_as_soon_as_it_is() {
        let (owed, now) = (Owed::default(), Instant::now());
        assert!(!owed.is_any());
        owed.note(&order("vm1"), &refusal("no such file"), now);
        let none = |_: &Order| Err(Tried::Failed(refusal("no such file")));
        for i in 1..10 {
            let made = |_: &Order| -> Tried { panic!("it was tried without an image") };
            assert_eq!(owed.again(now + FIRST * i, none, made), []);
            assert!(owed.is_any());
        }
        // Another reason is said.
        let busy = |_: &Order| Err(Tried::Failed(refusal("the image is in use")));
        let news = owed.again(now, busy, |_| Tried::Made);
        assert_eq!(news, [("vm1".to_owned(), "create: /a.raw: the image is in use".to_owned())]);
        assert_eq!(owed.again(now, busy, |_| Tried::Made), []);
        let tried = RefCell::new(Vec::new());
        let make = |order: &Order| {
            tried.borrow_mut().push(order.name.to_string());
            Tried::Made
        };
        assert_eq!(owed.again(now, |_| Ok(()), make), []);
        assert_eq!(*tried.borrow(), ["vm1"]);
        assert!(!owed.is_any());
    }

    #[test]
    fn what_fails_with_its_image_there_is_tried_ever_more_rarely_and_at_once_when_the_image_has_been_away() {
        let (owed, begun) = (Owed::default(), Instant::now());
        owed.note(&order("vm1"), &refusal("no such file"), begun);
        let tries = RefCell::new(Vec::new());
        let at = RefCell::new(0u64);
        let make = |_: &Order| {
            tries.borrow_mut().push(*at.borrow());
            Tried::Failed(refusal("the sidecar is of another image"))
        };
        let mut news = 0;
        for seconds in (0..300).step_by(5) {
            *at.borrow_mut() = seconds;
            news += owed.again(begun + Duration::from_secs(seconds), |_| Ok(()), make).len();
        }
        assert_eq!(*tries.borrow(), [0, 5, 15, 35, 75, 135, 195, 255]);
        assert_eq!(news, 1);
        *at.borrow_mut() = 300;
        let away = |_: &Order| Err(Tried::Failed(refusal("no such file")));
        assert_eq!(owed.again(begun + Duration::from_secs(300), away, make).len(), 1);
        assert_eq!(owed.again(begun + Duration::from_secs(300), |_| Ok(()), make).len(), 1);
        assert_eq!(tries.borrow().last(), Some(&300));
    }

    #[test]
    fn an_image_of_another_host_is_told_from_one_of_this_host_and_from_one_that_nobody_shares() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("a.raw");
        std::fs::write(&image, "").unwrap();
        assert_eq!(other_host_of(&image), None);
        assert_eq!(other_host_of(Path::new("nbd://store/a")), None);
        let here = owner::Claim::of_this_host().unwrap();
        owner::share(&image, &here).unwrap();
        assert_eq!(other_host_of(&image), None);
        let other = dir.path().join("b.raw");
        std::fs::write(&other, "").unwrap();
        let there = HostId { id: [7; 16], name: "host-b".into() };
        // It has given it back, as it does when its daemon is started anew.
        owner::share(&other, &owner::Claim { host: there, ..here }).unwrap();
        assert_eq!(other_host_of(&other).as_deref(), Some("host-b"));
        let (owed, now) = (Owed::default(), Instant::now());
        owed.note(&order("vm1"), &refusal("no such file"), now);
        let gone = |_: &Order| Err(Tried::GivenUp(refusal("host host-b has it")));
        assert_eq!(owed.again(now, gone, |_| panic!("it was tried")).len(), 1);
        assert!(!owed.is_any());
    }

    #[test]
    fn one_that_fails_keeps_no_other_from_coming_and_what_needs_somebody_is_given_up() {
        let (owed, now) = (Owed::default(), Instant::now());
        for name in ["a", "b", "c"] {
            owed.note(&order(name), &refusal("no such file"), now);
        }
        let make = |order: &Order| match order.name.as_str() {
            "a" => Tried::GivenUp(refusal("it was made by hand")),
            "b" => Tried::Failed(refusal("busy")),
            _ => Tried::Made,
        };
        assert_eq!(owed.again(now, |_| Ok(()), make).len(), 2);
        let left: Vec<_> = owed.with(|all| all.keys().cloned().collect());
        assert_eq!(left, ["b"]);
        owed.clear();
        assert!(!owed.is_any());
    }
}
