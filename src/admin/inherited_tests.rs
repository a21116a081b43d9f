//! Both sides on the fake kernel: what one host's kernel keeps of a LUN is there in the other's, for the exports there.
#![allow(clippy::unwrap_used)] // A test may panic.

use std::path::PathBuf;

use super::*;
use crate::{
    handover::State,
    kernel::{
        backstore::{self, Spec},
        fake::{Fake, Node},
        names::Name,
    },
    units::BlockSize,
};

/// A kernel with one LUN.
struct Kernel {
    tree: Fake,
    store: Backstore,
    exports: Vec<Export>,
}

fn wwn(n: u8) -> Wwn {
    Wwn::new(&format!("naa.50014050000000{n:02x}")).unwrap()
}

fn build(tree: &Fake, name: &str, wwns: &[Wwn], inherited: &Inherited) -> Result<PathBuf, ConfigfsError> {
    let spec = Spec {
        name: Name::new(name).unwrap(),
        dev_config: "dif//vm1.raw".into(),
        capacity: 1 << 20,
        block_size: BlockSize::B512,
        serial: "s".into(),
        write_cache: true,
    };
    let mut undo = Undo::new(tree);
    let path = backstore::create(tree, &spec, &mut undo)?;
    inherited.before_exports(tree, &path, &mut undo)?;
    for (wwn, fabric) in wwns.iter().zip([Fabric::Loopback, Fabric::Vhost, Fabric::Vhost]) {
        let made = fabric::create(tree, &path, fabric, wwn, &mut undo)?;
        inherited.exported(tree, &path, &made)?;
    }
    undo.keep();
    Ok(path)
}

impl Kernel {
    fn with(name: &str, wwns: &[Wwn], inherited: &Inherited) -> Kernel {
        let tree = Fake::new();
        build(&tree, name, wwns, inherited).unwrap();
        let store = backstore::find(&tree, "dif", name).unwrap().unwrap();
        let exports = fabric::of(&tree, &store).unwrap();
        Kernel { tree, store, exports }
    }

    fn link(&self, n: usize) -> PathBuf {
        self.exports[n].lun_path().join(&self.exports[n].link)
    }

    fn nexus(&self, n: usize) -> String {
        reservations::nexus(&self.tree, &self.exports[n]).unwrap().unwrap()
    }

    fn register(&self, n: usize, key: u64) {
        self.tree.register(&self.store.path, &self.link(n), &self.nexus(n), key);
    }

    fn reserve(&self, n: usize, kind: u64) {
        self.tree.reserve(&self.store.path, &self.link(n), &self.nexus(n), kind, true);
    }

    fn held(&self) -> Held {
        reservations::of(&self.tree, &self.store.path).unwrap()
    }

    fn set(&self, attr: &str, value: &str) {
        self.tree.write(&self.store.path.join(attr), value).unwrap();
    }

    fn told(&self) -> (Option<Reservations>, Option<Alua>) {
        let reservations = reservations_of(&self.tree, &self.store, &self.exports, &self.held()).unwrap();
        (reservations, alua_of(&self.tree, &self.store, &self.exports).unwrap())
    }

    /// Why reservations stay.
    fn refusal(&self) -> Failure {
        match reservations_of(&self.tree, &self.store, &self.exports, &self.held()).unwrap_err() {
            Stays::Because(failure) => failure,
            Stays::Kernel(e) => panic!("{e}"),
        }
    }
}

/// The exports of one kernel, as they are called there and in another.
fn names(from: &[Wwn], to: &[Wwn]) -> Vec<(ExportName, (Fabric, Wwn))> {
    let fabrics = [Fabric::Loopback, Fabric::Vhost, Fabric::Vhost];
    let of = |((from, to), fabric): ((&Wwn, &Wwn), Fabric)| {
        ((fabric.word().to_owned(), from.to_string()), (fabric, to.clone()))
    };
    from.iter().zip(to).zip(fabrics).map(of).collect()
}

fn first() -> Vec<Wwn> {
    [1, 2, 3].map(wwn).to_vec()
}

/// A LUN with two registrations, one of which holds a reservation, and with target port groups.
fn source() -> Kernel {
    let a = Kernel::with("vm1", &first(), &Inherited::default());
    a.register(2, u64::MAX);
    a.register(0, 0xabc);
    a.reserve(0, 6);
    a.set("alua/default_tg_pt_gp/preferred", "1");
    a.tree.make_dir(&a.store.path.join("alua/far")).unwrap();
    a.set("alua/far/tg_pt_gp_id", "7");
    a.set("alua/far/alua_access_state", "2");
    a.set("alua/far/alua_access_type", "2");
    a.tree.write(&a.exports[1].lun_path().join("alua_tg_pt_gp"), "far").unwrap();
    a.tree.write(&a.exports[2].lun_path().join("alua_tg_pt_offline"), "1").unwrap();
    a
}

#[test]
fn reservations_and_port_groups_are_in_the_other_kernel_under_its_own_names_and_back() {
    let a = source();
    let (reservations, alua) = a.told();
    // As they travel.
    let state = State { reservations, alua, ..State::new(crate::handover::tests::identity()) };
    let state = State::from_bytes(&state.to_bytes().unwrap()).unwrap();
    let second = [11, 12, 13].map(wwn).to_vec();
    let inherit = |from: &[Wwn], to: &[Wwn]| {
        Inherited::of(state.reservations.as_ref(), state.alua.as_ref(), &names(from, to)).unwrap()
    };
    let b = Kernel::with("vm2", &second, &inherit(&first(), &second));
    assert_ne!(a.nexus(0), b.nexus(0));
    let Held::Persistent { registrants, holder } = b.held() else { panic!() };
    let mut found: Vec<_> = registrants.into_iter().map(|r| (r.initiator.name, r.key)).collect();
    found.sort_by_key(|(_, key)| *key);
    assert_eq!(found, [(b.nexus(0), 0xabc), (b.nexus(2), u64::MAX)]);
    let holder = holder.unwrap();
    assert_eq!((holder.initiator.name, holder.kind, holder.all_target_ports), (b.nexus(0), 6, true));
    let groups = alua::groups(&b.tree, &b.store.path).unwrap();
    assert_eq!(groups, alua::groups(&a.tree, &a.store.path).unwrap());
    let far = groups.iter().find(|g| g.name == "far").unwrap();
    let of = |attr: &str| far.attributes.get(attr).copied();
    assert_eq!((far.id, of("alua_access_state"), of("alua_access_type")), (Some(7), Some(2), Some(2)));
    for n in 0..3 {
        let of = |k: &Kernel| alua::membership(&k.tree, &k.exports[n]).unwrap();
        assert_eq!(of(&a), of(&b), "{n}");
    }
    // Back, under the first names: what is told there is what was told here, but for names and order.
    let (there, groups) = b.told();
    let back = Inherited::of(there.as_ref(), groups.as_ref(), &names(&second, &first())).unwrap();
    let a2 = Kernel::with("vm1", &first(), &back);
    let sorted = |told: (Option<Reservations>, Option<Alua>)| {
        let mut reservations = told.0.unwrap();
        reservations.registrations.sort_by(|a, b| a.key.cmp(&b.key));
        (reservations, told.1)
    };
    assert_eq!(sorted(a2.told()), sorted(a.told()));
}

#[test]
fn a_lun_without_any_of_it_says_nothing() {
    let a = Kernel::with("vm1", &first(), &Inherited::default());
    assert_eq!(a.told(), (None, None));
    assert_eq!(Inherited::of(None, None, &[]).unwrap(), Inherited::default());
}

#[test]
fn every_step_that_fails_leaves_the_other_kernel_as_it_was_and_a_delete_leaves_nothing() {
    let (reservations, alua) = source().told();
    let inherited = Inherited::of(reservations.as_ref(), alua.as_ref(), &names(&first(), &first())).unwrap();
    let tree = Fake::new();
    let before = tree.snapshot();
    let mut failed = 0;
    for step in 0.. {
        tree.changes_left.set(Some(step));
        let done = build(&tree, "vm1", &first(), &inherited);
        tree.changes_left.set(None);
        if done.is_ok() {
            break;
        }
        failed += 1;
        assert_eq!(tree.snapshot(), before, "step {step}");
        // Nothing that was prepared is left for the next who comes.
        build(&tree, "vm1", &first(), &Inherited::default()).unwrap();
        let store = backstore::find(&tree, "dif", "vm1").unwrap().unwrap();
        assert_eq!(reservations::of(&tree, &store.path).unwrap(), Held::NOTHING, "step {step}");
        for export in fabric::of(&tree, &store).unwrap() {
            fabric::remove(&tree, &export).unwrap();
        }
        store.remove(&tree).unwrap();
    }
    assert!(failed > 30, "{failed}");
    let store = backstore::find(&tree, "dif", "vm1").unwrap().unwrap();
    for export in fabric::of(&tree, &store).unwrap() {
        fabric::remove(&tree, &export).unwrap();
    }
    store.remove(&tree).unwrap();
    assert_eq!(tree.snapshot(), before);
}

#[test]
fn a_kernel_that_does_not_take_up_what_it_is_told_is_found_out() {
    let (reservations, _) = source().told();
    let inherited = Inherited::of(reservations.as_ref(), None, &names(&first(), &first())).unwrap();
    // One in which the nexus has another name than it was given.
    let tree = Fake::new();
    let mut undo = Undo::new(&tree);
    let path = build(&tree, "vm1", &[], &Inherited::default()).unwrap();
    inherited.before_exports(&tree, &path, &mut undo).unwrap();
    let export = fabric::create(&tree, &path, Fabric::Loopback, &wwn(9), &mut undo).unwrap();
    let mistaken = Export { target: wwn(1).to_string(), ..export };
    let e = inherited.exported(&tree, &path, &mistaken).unwrap_err();
    let why = e.source.to_string();
    assert!(why.contains("has not taken up the registration") && why.contains(wwn(1).as_str()), "{why}");
}

#[test]
fn what_cannot_go_along_is_refused_with_the_initiator_and_what_to_do() {
    let a = Kernel::with("vm1", &first(), &Inherited::default());
    let elsewhere = Path::new("target/iscsi/iqn.1/tpgt_1/lun/lun_0/x");
    a.tree.register(&a.store.path, elsewhere, "iqn.2026-01.example:host", 0x77);
    let Failure { reason, next } = a.refusal();
    assert!(reason.contains("iscsi:iqn.2026-01.example:host") && reason.contains("0x77"), "{reason}");
    assert!(next.unwrap().contains("sg_persist --out --preempt --param-sark=0x77"));

    let a = source();
    let put = |attr: &str, text: &str| {
        a.tree.nodes.borrow_mut().insert(a.store.path.join(attr), Node::Attr(text.to_owned()));
    };
    put("attrib/alua_support", "0");
    assert!(a.refusal().reason.contains("attrib/alua_support"));
    put("attrib/alua_support", "1");
    assert!(a.told().0.is_some());
    put("pr/res_holder", "SPC-2 Reservation: loopback Initiator: naa.6001405000000001\n");
    let Failure { reason, next } = a.refusal();
    assert!(reason.contains("RESERVE(6)") && reason.contains("naa.6001405000000001"), "{reason}");
    assert!(next.unwrap().contains("release"));
}

#[test]
fn what_makes_no_sense_here_is_refused() {
    let (reservations, alua) = source().told();
    let exports = names(&first(), &first());
    let with = |change: &dyn Fn(&mut Reservations, &mut Alua)| {
        let (mut reservations, mut alua) = (reservations.clone().unwrap(), alua.clone().unwrap());
        change(&mut reservations, &mut alua);
        Inherited::of(Some(&reservations), Some(&alua), &exports).map(|_| ()).map_err(|e| e.reason)
    };
    assert_eq!(with(&|_, _| {}), Ok(()));
    let refused = |words: &str, change: &dyn Fn(&mut Reservations, &mut Alua)| {
        let why = with(change).unwrap_err();
        assert!(why.contains(words), "{why}");
    };
    refused("no export", &|r, _| r.registrations[0].export.1 = "naa.0".into());
    refused("no key", &|r, _| r.registrations[0].key = "0x0".into());
    refused("no key", &|r, _| r.registrations[0].key = "12".into());
    refused("unknown type 2", &|r, _| r.registrations[1].holds = Some(2));
    refused("two holders", &|r, _| r.registrations[0].holds = Some(1));
    for name in ["", "..", "a/b"] {
        refused("no name of a target port group", &|_, a| a.groups[1].name = name.into());
    }
    refused("not known here", &|_, a| {
        a.groups[1].attributes.insert("alua_of_later".into(), 1);
    });
    refused("of which nothing is told", &|_, a| a.ports[0].group = Some("none".into()));
    refused("no export", &|_, a| a.ports[0].export.0 = "iscsi".into());
}
