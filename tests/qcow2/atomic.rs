//! `Limits::atomic_write`: where the storage keeps a page whole when power fails, the image keeps what it says, whatever it has to allocate or
//! copy for a write, and whatever is written beside it.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
};

use tcmu_dif::{
    image::qcow2::Qcow2,
    sys::{
        exec::{join, yield_now},
        mem::Buffer,
    },
    units::ByteOffset,
    volume::{Volume, WriteFlags},
};

use crate::{
    crash::{Kind, cut, disks, kinds, open_files},
    sim::{self, Cut, SimDisk},
    support::{Rng, scale},
};

const PAGE: u64 = 4096;

async fn read(image: &Qcow2<Rc<SimDisk>>, at: u64, len: u64) -> Vec<u8> {
    let to = Buffer::zeroed(len as usize).sg();
    image.read(ByteOffset(at), &to).await.unwrap();
    to.to_vec()
}

async fn write(image: &Qcow2<Rc<SimDisk>>, at: u64, bytes: &[u8]) {
    image.write(ByteOffset(at), &Buffer::from_slice(bytes).sg(), WriteFlags::default()).await.unwrap();
}

/// Gives how many cuts were judged.
async fn session(kind: Rc<Kind>, seed: u64) -> u64 {
    let Kind { name, size, under, .. } = &*kind;
    let disk = disks(&kind, seed, 6);
    [Some(&disk.0), disk.1.as_ref()].into_iter().flatten().for_each(|d| d.whole.set(PAGE));
    let image = open_files(&disk, under.as_deref()).await.unwrap();
    let piece = u64::from(image.limits().atomic_write);
    let subclusters = name.contains("subclusters");
    let expected = match image.cluster_size() {
        0..PAGE => 0,
        cluster if subclusters => PAGE.min(cluster / 32),
        _ => PAGE,
    };
    assert_eq!(piece, expected, "{name}");
    let cuts = Cell::new(0);
    let rng = RefCell::new(Rng::new(seed));
    let below = |n| rng.borrow_mut().below(n);
    let pages = size / PAGE;
    for round in 0..if piece == 0 { 0 } else { 12 * scale() } {
        let page = below(pages);
        let at = page * PAGE + below(PAGE / piece) * piece;
        image.flush().await.unwrap();
        let old = read(&image, at, piece).await;
        let new = vec![(round % 199 + 11) as u8; piece as usize];
        let busy = Cell::new(true);
        let written = async {
            write(&image, at, &new).await;
            busy.set(false);
        };
        // The target keeps everybody else off the page.
        let beside = async {
            while busy.get() {
                let other = (page + 1 + below(4).min(pages - 2)) % pages;
                let len = 1 + below(PAGE);
                match below(4) {
                    0 => image.discard(ByteOffset(other * PAGE), len).await.unwrap(),
                    _ => write(&image, other * PAGE + below(PAGE - len + 1), &vec![7; len as usize]).await,
                }
            }
        };
        let cutter = async {
            let mut last = false;
            while !last {
                last = !busy.get();
                for how in [Cut::Process, Cut::Oldest, Cut::Any, Cut::Any, Cut::Prefix] {
                    let left = cut(&disk, how, &mut rng.borrow_mut());
                    let files = (SimDisk::new(&left.0, 1, 0), left.1.map(|data| SimDisk::new(&data, 1, 0)));
                    let after = open_files(&files, under.as_deref()).await.unwrap();
                    let got = read(&after, at, piece).await;
                    assert!(got == old || got == new, "{name}, seed {seed}, {how:?}: {at} is torn");
                    cuts.set(cuts.get() + 1);
                }
                for _ in 0..below(20) {
                    yield_now().await;
                }
            }
        };
        join(join(written, beside), cutter).await;
        assert_eq!(read(&image, at, piece).await, new);
    }
    image.close().await.unwrap();
    cuts.get()
}

#[test]
fn no_cut_tears_what_the_image_says_it_writes_as_a_whole() {
    let mut cuts = 0;
    for kind in kinds() {
        cuts += sim::run(session(kind, 5));
    }
    println!("{cuts} cuts");
    assert!(cuts > 500);
}
