//! What EXTENDED COPY does with protection information, from one protected logical unit to another: which tuples stand at the
//! destination, and that nothing that has changed on the way is written.

use std::{cell::RefCell, rc::Rc};

use tcmu_dif::{
    pi::{Exposure, PiType, Transfer, Tuple},
    scsi::{
        Target,
        neighbour::{Along, Answer, Answering, Designator, Errand, Neighbour, Neighbours, Undone},
    },
    sys::{self, io::Io, mem::Buffer},
    units::{BlockSize, ByteOffset},
    volume::{Volume, WriteFlags},
};

use super::{
    copy::xcopy,
    memory::{GOOD, cdb, scale},
    pi_bench::{BLOCKS, Dice, Pi, guard},
};

/// Does something to the blocks that are answered.
type Tamper = Box<dyn Fn(&mut Vec<u8>, &mut Option<Along>)>;

/// A logical unit that answers on the spot, with somebody between.
struct Next<V: Volume> {
    target: Rc<Target<V>>,
    tamper: Rc<RefCell<Tamper>>,
}

impl<V: Volume + 'static> Neighbour for Next<V> {
    fn number(&self) -> u64 {
        7
    }

    fn ask(&self, errand: Errand) -> Answering {
        let (target, tamper) = (self.target.clone(), self.tamper.clone());
        Box::pin(async move {
            let mut answer = target.run_errand(errand).await.map_err(Undone::Failed)?;
            if let Answer::Data(data, along) = &mut answer {
                tamper.borrow()(data, along);
            }
            Ok(answer)
        })
    }
}

/// The only neighbour, whose name is the source's.
struct Only<V: Volume>(Rc<Target<V>>, Rc<RefCell<Tamper>>);

const SOURCE: [u8; 8] = [0x39; 8];

impl<V: Volume + 'static> Neighbours for Only<V> {
    fn named(&self, who: &Designator) -> Vec<Rc<dyn Neighbour>> {
        let next = Next { target: self.0.clone(), tamper: self.1.clone() };
        if who.value == SOURCE { vec![Rc::new(next)] } else { Vec::new() }
    }

    fn should_end(&self) -> bool {
        false
    }
}

struct Pair {
    source: Pi,
    destination: Pi,
    tamper: Rc<RefCell<Tamper>>,
}

impl Pair {
    async fn new(io: &Io, kind: PiType, size: BlockSize, seen: (Exposure, Exposure)) -> Pair {
        let way = Transfer::Separate;
        let source = Pi::beside(io, kind, size, (way, seen.0), |_| {}).await;
        let tamper: Rc<RefCell<Tamper>> = Rc::new(RefCell::new(Box::new(|_, _| {})));
        let only = Rc::new(Only(source.target.clone(), tamper.clone()));
        let destination = Pi::beside(io, kind, size, (way, seen.1), |c| c.neighbours = Some(only)).await;
        Pair { source, destination, tamper }
    }

    fn tamper(&self, how: impl Fn(&mut Vec<u8>, &mut Option<Along>) + 'static) {
        *self.tamper.borrow_mut() = Box::new(how);
    }

    /// EXTENDED COPY to the destination, of the source's blocks or of its own.
    async fn copy(&self, own: bool, blocks: u64, from: u64, to: u64) -> (u8, u8, u8) {
        let mine = tcmu_dif::scsi::naa_from_serial("serial-1").to_be_bytes();
        let size = self.destination.size.bytes() as u32;
        let mut list = vec![1, 0, 0, 64, 0, 0, 0, 0, 0, 0, 0, 28, 0, 0, 0, 0];
        for name in [SOURCE, mine] {
            list.extend([0xe4, 0, 0, 0, 1, 3, 0, 8]);
            list.extend(name);
            list.extend([0; 12]);
            list.extend(size.to_be_bytes());
        }
        list.extend([2, 0, 0, 0x18, 0, u8::from(own), 0, 1, 0, 0]);
        list.extend((blocks as u16).to_be_bytes());
        list.extend(from.to_be_bytes());
        list.extend(to.to_be_bytes());
        self.destination.plain(&xcopy(list.len()), &list).await.sense
    }

    async fn put(&self, lba: u64, data: &[u8], tuples: Vec<u8>) {
        put(&self.source, lba, data, tuples).await;
    }
}

/// Blocks with these tuples, past the target.
async fn put(pi: &Pi, lba: u64, data: &[u8], tuples: Vec<u8>) {
    let (at, from) = (ByteOffset(lba * pi.size.bytes()), Buffer::from_slice(data).sg());
    pi.volume.write_with_tuples(at, &from, tuples, WriteFlags::default()).await.unwrap();
}

fn tuple(bytes: &[u8]) -> Tuple {
    Tuple::from_bytes(bytes.try_into().unwrap())
}

/// One that an initiator, or this handler, may have given that block.
fn any_tuple(dice: &mut Dice, kind: PiType, ours: bool, lba: u64, data: &[u8]) -> Tuple {
    let own = Tuple::new(kind, guard(data), tcmu_dif::units::Lba(lba));
    match kind {
        _ if ours => own,
        PiType::Type1 => Tuple { app: dice.below(0xffff) as u16, ..own },
        _ => Tuple { app: dice.below(0xffff) as u16, reference: dice.next() as u32, ..own },
    }
}

/// The tuple that a block is to have at its destination.
fn want(kind: PiType, came: Tuple, both: bool, lba: u64, data: &[u8]) -> Tuple {
    let own = Tuple::new(kind, guard(data), tcmu_dif::units::Lba(lba));
    match kind {
        _ if came.is_escape(kind) || !both => own,
        PiType::Type3 => came,
        _ => Tuple { app: came.app, ..own },
    }
}

#[test]
fn guards_go_with_the_blocks_and_tags_where_they_are_initiators_on_both_sides() {
    use Exposure::{Initiator, Target};
    let mut dice = Dice(3);
    for kind in PiType::ALL {
        for seen in [(Target, Target), (Target, Initiator), (Initiator, Target), (Initiator, Initiator)] {
            let size = if dice.one_in(2) { BlockSize::B512 } else { BlockSize::B4096 };
            let seed = dice.next();
            sys::run(async move |io| random_copies(&io, kind, size, seen, seed).await);
        }
    }
}

/// Random copies, from the other and within, against a model of data and tuples.
async fn random_copies(io: &Io, kind: PiType, size: BlockSize, seen: (Exposure, Exposure), seed: u64) {
    let pair = Pair::new(io, kind, size, seen).await;
    let (mut dice, n) = (Dice(seed), size.bytes() as usize);
    let ours = seen.0 == Exposure::Target;
    let mut blocks = vec![(vec![0; n], Tuple::ESCAPE); BLOCKS as usize];
    let mut there = blocks.clone();
    for lba in (0..BLOCKS).filter(|lba| lba % 5 != 0) {
        let data = dice.bytes(n);
        let tuple = any_tuple(&mut dice, kind, ours, lba, &data);
        pair.put(lba, &data, tuple.to_bytes().to_vec()).await;
        blocks[lba as usize] = (data, tuple);
    }
    for _ in 0..scale(12) {
        let len = 1 + dice.below(BLOCKS / 2);
        let (from, to) = (dice.below(BLOCKS - len + 1), dice.below(BLOCKS - len + 1));
        let own = dice.one_in(3);
        assert_eq!(pair.copy(own, len, from, to).await, GOOD);
        let both = if own {
            seen.1 == Exposure::Initiator
        } else {
            seen == (Exposure::Initiator, Exposure::Initiator)
        };
        let moved = if own { &there } else { &blocks }[from as usize..(from + len) as usize].to_vec();
        for (lba, (data, came)) in (to..).zip(moved) {
            let tuple = want(kind, came, both, lba, &data);
            there[lba as usize] = (data, tuple);
        }
    }
    let (data, tuples) = pair.destination.medium(0, BLOCKS).await;
    for (lba, (want, came)) in there.iter().enumerate() {
        assert!(data[lba * n..][..n] == want[..], "{kind} {seen:?} {seed:#x}: data of {lba}");
        assert_eq!(tuple(&tuples[lba * 8..][..8]), *came, "{kind} {seen:?} {seed:#x}: tuple of {lba}");
    }
    let (data, tuples) = pair.source.medium(0, BLOCKS).await;
    for (lba, (want, came)) in blocks.iter().enumerate() {
        assert!(data[lba * n..][..n] == want[..] && tuple(&tuples[lba * 8..][..8]) == *came, "the source");
    }
    // And a plain read finds nothing wrong.
    let read = pair.destination.get(&cdb(0x88, 0, 0, BLOCKS), BLOCKS as usize * n).await;
    assert_eq!(read.sense, GOOD);
}

#[test]
fn a_bit_that_flips_on_the_way_ends_the_copy_and_nothing_of_its_chunk_is_written() {
    for seen in [Exposure::Target, Exposure::Initiator] {
        sys::run(async move |io| {
            let size = BlockSize::B512;
            let pair = Pair::new(&io, PiType::Type1, size, (seen, seen)).await;
            let mut dice = Dice(5);
            let data = dice.bytes(64 * 512);
            let tuples: Vec<u8> = (0..64)
                .zip(data.chunks(512))
                .flat_map(|(lba, d)| any_tuple(&mut dice, PiType::Type1, true, lba, d).to_bytes())
                .collect();
            pair.put(0, &data, tuples.clone()).await;
            put(&pair.destination, 0, &data[..512].repeat(64), {
                let of = |lba| Tuple::new(PiType::Type1, guard(&data[..512]), tcmu_dif::units::Lba(lba));
                (0..64).flat_map(|lba| of(lba).to_bytes()).collect()
            })
            .await;
            let before = pair.destination.medium(0, BLOCKS).await;
            for _ in 0..40 {
                let (byte, bit) = (dice.below(64 * 512) as usize, dice.below(8));
                pair.tamper(move |data, _| data[byte] ^= 1 << bit);
                assert_eq!(pair.copy(false, 64, 0, 0).await, (0xa, 0x10, 1));
                let byte = byte / 512 * 8 + byte % 2;
                pair.tamper(move |_, along| along.as_mut().unwrap().tuples[byte] ^= 1 << bit);
                assert_eq!(pair.copy(false, 64, 0, 0).await, (0xa, 0x10, 1));
            }
            assert!(pair.destination.medium(0, BLOCKS).await == before);
            assert_eq!(pair.destination.target.pi_counters().guard_errors, 80);
            pair.tamper(|_, _| {});
            assert_eq!(pair.copy(false, 64, 0, 0).await, GOOD);
            assert!(pair.destination.medium(0, 64).await == (data, tuples));
            let counted = pair.destination.target.pi_counters();
            assert_eq!((counted.verified, counted.generated), (64, 0), "no guard was made anew");
        });
    }
}

#[test]
fn tuples_that_do_not_fit_are_no_use_and_the_blocks_get_their_own() {
    sys::run(async |io| {
        let seen = (Exposure::Initiator, Exposure::Initiator);
        let pair = Pair::new(&io, PiType::Type1, BlockSize::B512, seen).await;
        let data = Dice(9).bytes(512);
        let own = Tuple::new(PiType::Type1, guard(&data), tcmu_dif::units::Lba(8));
        pair.put(0, &data, Tuple { app: 0x1234, reference: 0, ..own }.to_bytes().to_vec()).await;
        let ways: [fn(&mut Option<Along>); 4] = [
            |along| *along = None,
            |along| along.as_mut().unwrap().at_rest.kind = PiType::Type3,
            |along| along.as_mut().unwrap().block_size = BlockSize::B4096,
            |along| along.as_mut().unwrap().tuples.truncate(7),
        ];
        for way in ways {
            pair.tamper(move |_, along| way(along));
            assert_eq!(pair.copy(false, 1, 0, 8).await, GOOD);
            assert_eq!(pair.destination.medium(8, 1).await, (data.clone(), own.to_bytes().to_vec()));
        }
        assert_eq!(pair.destination.target.pi_counters().verified, 0);
    });
}

/// Control mode page: ATO = 1 and RWWP = 1.
#[test]
fn a_unit_that_takes_nothing_without_tuples_takes_copies_that_bring_them() {
    sys::run(async |io| {
        let seen = (Exposure::Initiator, Exposure::Initiator);
        let pair = Pair::new(&io, PiType::Type1, BlockSize::B512, seen).await;
        let data = Dice(11).bytes(512);
        let came = Tuple::new(PiType::Type1, guard(&data), tcmu_dif::units::Lba(0));
        pair.put(0, &data, Tuple { app: 0x77, ..came }.to_bytes().to_vec()).await;
        let page = [0x0a, 10, 0, 0x10, 0, 0x40 | 0x80 | 0x10, 0, 0, 0, 0, 0, 0];
        let list = [&[0, 0, 0, 0][..], &page].concat();
        let select = [0x15, 0x10, 0, 0, list.len() as u8, 0];
        assert_eq!(pair.destination.plain(&select, &list).await.sense, GOOD);
        pair.destination.attention().await;
        assert_eq!(pair.copy(false, 1, 0, 8).await, GOOD);
        assert_eq!(tuple(&pair.destination.medium(8, 1).await.1), Tuple { app: 0x77, reference: 8, ..came });
        assert_eq!(pair.copy(false, 1, 1, 8).await, (0xa, 0x24, 0), "a block that has none");
    });
}
