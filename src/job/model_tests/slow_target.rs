//! Targets that are slow: of two copies of a granule the older one must not come last.

use std::{
    future::Future,
    pin::Pin,
    time::{Duration, Instant},
};

use super::*;

/// Has a mirror go on until that holds.
async fn go_on<T>(drive: &mut Pin<Box<impl Future<Output = T>>>, holds: impl Fn() -> bool) {
    poll_fn(|cx| {
        assert!(drive.as_mut().poll(cx).is_pending(), "it has ended");
        cx.waker().wake_by_ref();
        if holds() { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}

#[test]
fn a_copy_that_the_target_takes_late_never_undoes_a_newer_one() {
    block_on(async {
        let (ground, front, mirror, _) = still(false, Settings::default()).await;
        write(&*front, 0, &stamped(1, 0)).await.unwrap();
        mirror.scan(false).await;
        let (go, before) = (ground.target.image.hold_next_write(), ground.target.image.ops());
        let (f, m) = (front.clone(), mirror.clone());
        let mut drive = Box::pin(async move { f.drive(&m, async || Ok(())).await });
        // What there was is read, and on its way.
        go_on(&mut drive, || ground.target.image.log()[before as usize..].contains(&OpKind::Write)).await;
        write(&*front, 0, &stamped(2, 0)).await.unwrap();
        // Guests are idle for so long that more than one piece may be copied at a time.
        let idle = Instant::now();
        go_on(&mut drive, || idle.elapsed() > Duration::from_millis(60)).await;
        go.set(true);
        go_on(&mut drive, || mirror.is_ready()).await;
        same_on_both(&ground);
        assert_eq!(ground.target.image.peek(0, 512), stamped(2, 0));
    });
}
