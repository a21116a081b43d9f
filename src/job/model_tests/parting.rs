//! Where commands pass a mirror by for good, nothing may be left that a successor would take it up from: it would not know what they change.

use super::*;

/// A mirror whose last moment is watched: whether it was still attached then, and whether that came at all.
async fn watched(how: impl AsyncFnOnce(&Mirror<Disk>)) -> (Outcome, Option<bool>) {
    let mut rng = Rng::new(7);
    let (ground, _) = ground(1, &mut rng);
    let front = Rc::new(Front::new(open(&ground.source, false).await));
    let target = Rc::new(open(&ground.target, false).await);
    let (seen, f) = (Rc::new(Cell::new(None)), front.clone());
    let saw = seen.clone();
    let hooks = Hooks {
        tell: Box::new(move |told| {
            if let Told::Parting = told {
                assert_eq!(saw.replace(Some(f.mirror().is_some())), None, "it parts once");
            }
        }),
        sleep: Box::new(|_| Box::pin(yield_now())),
    };
    let map = DirtyMap::new(SIZE, GRANULE, ground.kept.clone());
    let settings = Settings::default();
    let mirror = Rc::new(Mirror::new("m".into(), (front.volume(), target), map, settings, 0, hooks));
    front.attach(mirror.clone()).await;
    write(&*front, 0, &stamped(1, 0)).await.unwrap();
    mirror.scan(true).await;
    until(&front, &mirror, || mirror.is_ready()).await;
    assert_eq!(seen.get(), None, "it goes on");
    how(&mirror).await;
    let outcome = front.drive(&mirror, async || Ok(())).await;
    assert!(mirror.has_parted() && front.mirror().is_none());
    (outcome, seen.get())
}

#[test]
fn whatever_ends_a_mirror_it_parts_before_a_command_can_pass_it_by() {
    block_on(async {
        let parted = Some(true);
        assert_eq!(watched(async |m| m.cancel(true)).await, (Outcome::Cancelled, parted));
        assert_eq!(watched(async |m| m.cancel(false)).await, (Outcome::Ended(Ending::Leave), parted));
        assert_eq!(watched(async |m| m.complete().unwrap()).await, (Outcome::Ended(Ending::Pivot), parted));
        let failed = Outcome::Failed("it cannot".to_owned());
        assert_eq!(watched(async |m| m.give_up("it cannot")).await, (failed, parted));
    });
}
