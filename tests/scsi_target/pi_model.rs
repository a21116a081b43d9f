//! Random commands with good and bad protection information, against a model that reads SBC-4's tables as they stand:
//! status, sense, LBA, data and tuples have to be the same, over a real protected image, for every type, both block sizes
//! and both transfers.

use tcmu_dif::{
    pi::{PiType, Transfer, Tuple},
    sys,
    units::BlockSize,
};

use super::{
    memory::{cdb, scale},
    pi_bench::{BLOCKS, Dice, Pi, guard, long},
};

type Sense = (u8, u8, u8);
/// What a command should come to: data and tuples, or sense and INFORMATION.
type Want = Result<(Vec<u8>, Vec<u8>), (Sense, Option<u64>)>;

const BAD_CDB: (Sense, Option<u64>) = ((5, 0x24, 0), None);
const NO_COMMAND: (Sense, Option<u64>) = ((5, 0x20, 0), None);

/// What a command may expect of tags: the first reference tag, and the application tag with its mask.
type Expected = Option<(u32, u16, u16)>;

struct Model {
    kind: PiType,
    size: usize,
    blocks: Vec<(Vec<u8>, Tuple)>,
    dpicz: bool,
    ato: bool,
    rwwp: bool,
}

/// Columns of the tables: guard, application tag, reference tag.
fn row(field: u8) -> [bool; 3] {
    match field {
        1 | 5 => [true, true, true],
        2 => [false, true, true],
        4 => [true, false, false],
        _ => [false, false, false],
    }
}

impl Model {
    fn new(kind: PiType, size: usize) -> Model {
        let blocks = vec![(vec![0; size], Tuple::ESCAPE); BLOCKS as usize];
        Model { kind, size, blocks, dpicz: false, ato: true, rwwp: false }
    }

    fn allowed(&self, field: u8, expected: Expected, writes: bool) -> Result<(), (Sense, Option<u64>)> {
        if field > 5 {
            return Err(BAD_CDB);
        }
        if field > 0 && self.kind == PiType::Type2 && expected.is_none() {
            return Err(NO_COMMAND);
        }
        if field == 0 && writes && self.rwwp {
            return Err(BAD_CDB);
        }
        Ok(())
    }

    fn on_medium(&self, field: u8) -> [bool; 3] {
        match (field, self.dpicz) {
            (0, false) => [true; 3],
            (0, true) => [false; 3],
            _ => row(field),
        }
    }

    /// The qualifier of the first check that a block fails.
    fn check(
        &self,
        i: u64,
        lba: u64,
        data: &[u8],
        t: Tuple,
        on: [bool; 3],
        expected: Expected,
    ) -> Option<u8> {
        let escape = match self.kind {
            PiType::Type3 => t.app == 0xffff && t.reference == 0xffff_ffff,
            _ => t.app == 0xffff,
        };
        if escape {
            return None;
        }
        if on[0] && t.guard != guard(data) {
            return Some(1);
        }
        if let Some((_, tag, mask)) = expected
            && on[1]
            && self.ato
            && (tag ^ t.app) & mask != 0
        {
            return Some(2);
        }
        let reference = match (self.kind, expected) {
            (PiType::Type1, _) => Some(lba as u32),
            (PiType::Type2, Some((first, ..))) => Some(first.wrapping_add(i as u32)),
            _ => None,
        };
        match reference {
            Some(r) if on[2] && r != t.reference => Some(3),
            _ => None,
        }
    }

    fn check_all(&self, lba: u64, blocks: &[(Vec<u8>, Tuple)], on: [bool; 3], expected: Expected) -> Want {
        for (i, (data, t)) in blocks.iter().enumerate() {
            let at = lba + i as u64;
            if let Some(qualifier) = self.check(i as u64, at, data, *t, on, expected) {
                return Err(((0xb, 0x10, qualifier), Some(at)));
            }
        }
        Ok(Default::default())
    }

    fn range(&self, lba: u64, n: u64) -> &[(Vec<u8>, Tuple)] {
        &self.blocks[lba as usize..(lba + n) as usize]
    }

    fn read(&self, lba: u64, n: u64, field: u8, expected: Expected) -> Want {
        self.allowed(field, expected, false)?;
        self.check_all(lba, self.range(lba, n), self.on_medium(field), expected)?;
        let data = self.range(lba, n).iter().flat_map(|b| b.0.clone()).collect();
        let tuples = self.range(lba, n).iter().flat_map(|b| b.1.to_bytes()).collect();
        Ok((data, if field > 0 { tuples } else { vec![] }))
    }

    /// What a block gets that is written without a tuple.
    fn made(&self, i: u64, lba: u64, data: &[u8], expected: Expected) -> Tuple {
        let app = match expected {
            Some((_, tag, mask)) if self.ato && tag & mask != 0xffff => tag & mask,
            _ => 0,
        };
        let reference = match (self.kind, expected) {
            (PiType::Type2, Some((first, ..))) => first.wrapping_add(i as u32),
            (PiType::Type3, _) => 0,
            _ => lba as u32,
        };
        Tuple { guard: guard(data), app, reference }
    }

    fn put(&mut self, lba: u64, sent: Vec<(Vec<u8>, Tuple)>, field: u8, expected: Expected) {
        for (i, (data, t)) in sent.into_iter().enumerate() {
            let at = lba + i as u64;
            let t = if field > 0 { t } else { self.made(i as u64, at, &data, expected) };
            self.blocks[at as usize] = (data, t);
        }
    }

    fn write(&mut self, lba: u64, sent: Vec<(Vec<u8>, Tuple)>, field: u8, expected: Expected) -> Want {
        self.allowed(field, expected, true)?;
        self.check_all(lba, &sent, row(field), expected)?;
        self.put(lba, sent, field, expected);
        Ok(Default::default())
    }

    fn verify(&self, lba: u64, n: u64, sent: &[(Vec<u8>, Tuple)], field: u8, expected: Expected) -> Want {
        self.allowed(field, expected, false)?;
        if sent.is_empty() {
            self.check_all(lba, self.range(lba, n), self.on_medium(field), expected)?;
            return Ok(Default::default());
        }
        self.check_all(lba, sent, row(field), expected)?;
        if field == 0 {
            self.check_all(lba, self.range(lba, n), self.on_medium(0), expected)?;
        }
        let pairs = || self.range(lba, n).iter().zip(sent).enumerate();
        if let Some((i, _)) = pairs().find(|(_, (ours, theirs))| ours.0 != theirs.0) {
            return Err(((0xe, 0x1d, 0), Some(lba + i as u64)));
        }
        for (i, (ours, theirs)) in pairs().filter(|_| field > 0) {
            let three = self.kind == PiType::Type3;
            let differs = [
                field != 2 && ours.1.guard != theirs.1.guard,
                self.ato && ours.1.app != theirs.1.app,
                (self.ato || !three) && ours.1.reference != theirs.1.reference,
            ];
            if let Some(tag) = differs.iter().position(|d| *d) {
                return Err(((0xe, 0x10, tag as u8 + 1), Some(lba + i as u64)));
            }
        }
        Ok(Default::default())
    }

    fn or(&mut self, lba: u64, sent: Vec<(Vec<u8>, Tuple)>, field: u8) -> Want {
        self.allowed(field, None, true)?;
        self.check_all(lba, &sent, row(field), None)?;
        self.check_all(lba, self.range(lba, sent.len() as u64), self.on_medium(field), None)?;
        let both = self.range(lba, sent.len() as u64).iter().zip(&sent).map(|(ours, theirs)| {
            let data: Vec<u8> = ours.0.iter().zip(&theirs.0).map(|(a, b)| a | b).collect();
            let t = Tuple { guard: guard(&data), ..theirs.1 };
            (data, t)
        });
        let both = both.collect();
        self.put(lba, both, field, None);
        Ok(Default::default())
    }

    /// `sent`: the blocks to compare with, then those to write.
    fn compare_and_write(&mut self, lba: u64, sent: Vec<(Vec<u8>, Tuple)>, field: u8) -> Want {
        self.allowed(field, None, true)?;
        let n = sent.len() / 2;
        self.check_all(lba, &sent[..n], row(field), None)?;
        self.check_all(lba, &sent[n..], row(field), None)?;
        self.check_all(lba, self.range(lba, n as u64), self.on_medium(field), None)?;
        let ours: Vec<u8> = self.range(lba, n as u64).iter().flat_map(|b| b.0.clone()).collect();
        let theirs: Vec<u8> = sent[..n].iter().flat_map(|b| b.0.clone()).collect();
        if let Some(byte) = ours.iter().zip(&theirs).position(|(a, b)| a != b) {
            return Err(((0xe, 0x1d, 0), Some(byte as u64)));
        }
        self.put(lba, sent[n..].to_vec(), field, None);
        Ok(Default::default())
    }

    fn write_same(
        &mut self,
        lba: u64,
        n: u64,
        one: (Vec<u8>, Tuple),
        field: u8,
        unmap: bool,
        expected: Expected,
    ) -> Want {
        self.allowed(field, expected, true)?;
        self.check_all(lba, std::slice::from_ref(&one), row(field), expected)?;
        let zero = one.0.iter().all(|b| *b == 0);
        if unmap && zero && (field == 0 || one.1 == Tuple::ESCAPE) {
            self.unmap(lba, n);
            return Ok(Default::default());
        }
        let step = u32::from(self.kind != PiType::Type3);
        let copies = (0..n).map(|i| {
            let reference = one.1.reference.wrapping_add(step.wrapping_mul(i as u32));
            (one.0.clone(), Tuple { reference, ..one.1 })
        });
        let copies = copies.collect();
        self.put(lba, copies, field, expected);
        Ok(Default::default())
    }

    fn unmap(&mut self, lba: u64, n: u64) {
        let empty = (vec![0; self.size], Tuple::ESCAPE);
        self.blocks[lba as usize..(lba + n) as usize].fill(empty);
    }

    /// Blocks to send, most of them as they should be.
    fn blocks_to_send(&self, dice: &mut Dice, lba: u64, n: u64, expected: Expected) -> Vec<(Vec<u8>, Tuple)> {
        let clean = dice.one_in(2);
        let one = |i: u64, dice: &mut Dice| {
            let data = match dice.below(8) {
                0 => vec![0; self.size],
                1 => self.blocks[(lba + i) as usize].0.clone(),
                _ => {
                    let byte = dice.next() as u8;
                    let mut data = vec![byte; self.size];
                    data[dice.below(self.size as u64) as usize] = dice.next() as u8;
                    data
                }
            };
            let mut t = self.made(i, lba + i, &data, expected);
            if !clean && dice.one_in(3) {
                match dice.below(5) {
                    0 => t.guard ^= 1 << dice.below(16),
                    1 => t.app ^= 1 << dice.below(16),
                    2 => t.reference ^= 1 << dice.below(32),
                    3 => t = Tuple { guard: dice.next() as u16, app: 0xffff, reference: dice.next() as u32 },
                    _ => t = Tuple { guard: dice.next() as u16, ..Tuple::ESCAPE },
                }
            }
            if dice.one_in(10) {
                return self.blocks[(lba + i) as usize].clone();
            }
            (data, t)
        };
        (0..n).map(|i| one(i, dice)).collect()
    }
}

fn apart(sent: &[(Vec<u8>, Tuple)], field: u8) -> (Vec<u8>, Vec<u8>) {
    let data = sent.iter().flat_map(|b| b.0.clone()).collect();
    let tuples = sent.iter().flat_map(|b| b.1.to_bytes()).collect();
    (data, if field == 0 { vec![] } else { tuples })
}

async fn select(pi: &Pi, m: &Model) {
    let (dpicz, ato, rwwp) = (u8::from(m.dpicz) << 3, u8::from(m.ato) << 7, u8::from(m.rwwp) << 4);
    let page = [0x0a, 10, dpicz, 0x10, 0, 0x40 | ato | rwwp, 0, 0, 0, 0, 0, 0];
    let list = [&[0, 0, 0, 0][..], &page].concat();
    let answer = pi.plain(&[0x15, 0x10, 0, 0, list.len() as u8, 0], &list).await;
    assert_eq!(answer.status, 0, "{:?}", answer.sense);
}

async fn run(pi: &Pi, seed: u64, commands: usize, kind: PiType) {
    let mut dice = Dice(seed);
    let mut m = Model::new(kind, pi.size.bytes() as usize);
    for step in 0..commands {
        if dice.one_in(25) {
            (m.dpicz, m.ato, m.rwwp) = (dice.one_in(3), !dice.one_in(3), dice.one_in(5));
            select(pi, &m).await;
        }
        let n = 1 + dice.below(5);
        let lba = if dice.one_in(2) { dice.below(8) } else { dice.below(BLOCKS - 6) };
        let field = if dice.one_in(20) { 6 + dice.below(2) as u8 } else { dice.below(6) as u8 };
        let is_long = kind == PiType::Type2 && !dice.one_in(4);
        let expected = is_long.then(|| {
            let reference = if dice.one_in(6) { dice.next() as u32 } else { 0x1000 + lba as u32 };
            (reference, [0, 0x55][dice.below(2) as usize], [0, 0xff, 0xffff][dice.below(3) as usize])
        });
        let flags = field << 5;
        let make = |short: u8, action: u8, flags: u8, n: u64| match expected {
            Some(e) => long(action, flags, lba, n, e),
            None => cdb(short, flags, lba, n),
        };
        let (want, answer, tuples) = match dice.below(8) {
            0..2 => {
                let c = make([0x28, 0x88, 0xa8][dice.below(3) as usize], 0x09, flags, n);
                let got = pi.receive(&c, n, field > 0).await;
                let want = m.read(lba, n, field, expected);
                (want, got.answer.clone(), (got.data, got.tuples))
            }
            2..4 => {
                let sent = m.blocks_to_send(&mut dice, lba, n, expected);
                let (data, tuples) = apart(&sent, field);
                let c = make([0x2a, 0x8a, 0xaa][dice.below(3) as usize], 0x0b, flags, n);
                (m.write(lba, sent, field, expected), pi.send(&c, &data, &tuples).await, Default::default())
            }
            4 => {
                let check = !dice.one_in(3);
                let mut sent = m.blocks_to_send(&mut dice, lba, n, expected);
                if dice.one_in(2) {
                    sent = m.range(lba, n).to_vec();
                }
                let c = make(0x8f, 0x0a, flags | u8::from(check) << 1, n);
                let (data, tuples) = apart(&sent, field);
                let sent = if check { sent } else { vec![] };
                let want = m.verify(lba, n, &sent, field, expected);
                let answer = if check { pi.send(&c, &data, &tuples).await } else { pi.plain(&c, &[]).await };
                (want, answer, Default::default())
            }
            5 => {
                let one = m.blocks_to_send(&mut dice, lba, 1, expected).remove(0);
                let unmap = dice.one_in(2);
                let one = if unmap && dice.one_in(2) { (vec![0; m.size], Tuple::ESCAPE) } else { one };
                let (data, tuples) = apart(std::slice::from_ref(&one), field);
                let c = make(0x93, 0x0d, flags | u8::from(unmap) << 3, n);
                let answer = pi.send(&c, &data, &tuples).await;
                (m.write_same(lba, n, one, field, unmap, expected), answer, Default::default())
            }
            6 if dice.one_in(2) => {
                let mut list = vec![0, 22, 0, 16, 0, 0, 0, 0];
                list.extend(lba.to_be_bytes());
                list.extend((n as u32).to_be_bytes());
                list.extend([0; 4]);
                let answer = pi.plain(&[0x42, 0, 0, 0, 0, 0, 0, 0, list.len() as u8, 0], &list).await;
                m.unmap(lba, n);
                (Ok(Default::default()), answer, Default::default())
            }
            6 => {
                let sent = m.blocks_to_send(&mut dice, lba, n, None);
                let (data, tuples) = apart(&sent, field);
                let answer = pi.send(&cdb(0x8b, flags, lba, n), &data, &tuples).await;
                (m.or(lba, sent, field), answer, Default::default())
            }
            _ => {
                let mut sent = m.blocks_to_send(&mut dice, lba, n, None);
                if dice.one_in(2) {
                    sent = m.range(lba, n).to_vec();
                }
                sent.extend(m.blocks_to_send(&mut dice, lba, n, None));
                let (data, tuples) = apart(&sent, field);
                let mut c = cdb(0x89, flags, lba, 0);
                c[13] = n as u8;
                let answer = pi.send(&c, &data, &tuples).await;
                (m.compare_and_write(lba, sent, field), answer, Default::default())
            }
        };
        let about = format!("seed {seed:#x} step {step} {kind} field {field} lba {lba}+{n} {expected:?}");
        match want {
            Ok(data) => {
                assert_eq!(
                    (answer.status, answer.sense, answer.information),
                    (0, (0, 0, 0), None),
                    "{about}"
                );
                assert!(tuples == data, "data or tuples differ: {about}");
            }
            Err((sense, information)) => {
                assert_eq!((answer.status, answer.sense), (2, sense), "{about}");
                assert_eq!(answer.information, information, "{about}");
            }
        }
    }
    let (data, tuples) = pi.medium(0, BLOCKS).await;
    for (i, block) in m.blocks.iter().enumerate() {
        assert!(data[i * m.size..][..m.size] == block.0, "seed {seed:#x}: data of block {i}");
        assert_eq!(tuples[i * 8..][..8], block.1.to_bytes(), "seed {seed:#x}: tuple of block {i}");
    }
}

#[test]
fn random_commands_come_to_what_the_tables_say() {
    sys::run(async |io| {
        for kind in PiType::ALL {
            for size in [BlockSize::B512, BlockSize::B4096] {
                for transfer in [Transfer::Interleaved, Transfer::Separate] {
                    let pi = Pi::new(&io, kind, size, transfer).await;
                    let seed = u64::from(kind.number()) << 16 | size.bytes() | transfer as u64;
                    run(&pi, seed, scale(150), kind).await;
                }
            }
        }
    });
}
