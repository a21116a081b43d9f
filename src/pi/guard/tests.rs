//! Every kernel against the crate `crc`: guards, tuples made, tuples compared, copies; on random data, for every single bit, at
//! odd addresses, in lists cut anywhere.

use super::{tags::Guards, *};
use crate::{
    pi::tuple::Tuple,
    storage::sim::{Rng, scaled},
    sys::mem::{Buffer, Sg},
    units::BlockSize,
};

const ORACLE: crc::Crc<u16> = crc::Crc::<u16>::new(&crc::CRC_16_T10_DIF);
const SIZES: [BlockSize; 2] = [BlockSize::B512, BlockSize::B4096];

/// What this machine runs, and the model of what it may not run; or those alone that `TCMU_DIF_GUARD_ONLY` names, with commas, for
/// a processor that is emulated and slow (`cargo xtask emulate-guard`).
fn kernels() -> impl Iterator<Item = Guard> {
    let only = std::env::var("TCMU_DIF_GUARD_ONLY").ok();
    let wanted = move |g: &Guard| match &only {
        Some(only) => only.split(',').any(|name| name == g.kernel().name()),
        None => true,
    };
    Guard::all().chain([Guard(Kernel::GfniInPlainRust)]).filter(wanted)
}

fn bytes(size: BlockSize) -> usize {
    size.bytes() as usize
}

/// The same bytes in segments cut at random places, at odd addresses.
fn scatter(bytes: &[u8], rng: &mut Rng) -> Sg {
    let mut sg = Sg::new();
    let mut at = 0;
    let longest = [40, 700, 9000, 100_000][rng.below(4) as usize];
    while at < bytes.len() {
        let n = (1 + rng.below(longest) as usize).min(bytes.len() - at);
        let odd = rng.below(65) as usize;
        let part = Buffer::zeroed(n + odd).sg().slice(odd, n);
        part.copy_in(0, &bytes[at..at + n]);
        sg.append(&part);
        at += n;
    }
    sg
}

fn guards_of(guard: Guard, data: Blocks<'_>) -> Vec<u16> {
    let mut got = Vec::new();
    guard.guards(data, |i, crc| {
        assert_eq!(i, got.len(), "in order");
        got.push(crc);
    });
    got
}

fn random_tags(rng: &mut Rng) -> Tags {
    let step = if rng.one_in(2) { 1 } else { 0 };
    // Often so high that it wraps within the run.
    let reference = if rng.one_in(3) { u32::MAX - rng.below(20) as u32 } else { rng.next() as u32 };
    Tags { app: rng.next() as u16, reference, step }
}

fn tuples_of(data: &[u8], size: BlockSize, tags: Tags) -> Vec<u8> {
    let tuple = |(i, block): (usize, &[u8])| {
        let reference = tags.reference.wrapping_add(tags.step.wrapping_mul(i as u32));
        Tuple { guard: ORACLE.checksum(block), app: tags.app, reference }.to_bytes()
    };
    data.chunks(bytes(size)).enumerate().flat_map(tuple).collect()
}

#[test]
fn the_kernels_that_were_tested_are_named() {
    for kernel in Kernel::ALL {
        let tested = match (kernel.available(), kernel) {
            (true, _) => "tested on this processor",
            (false, Kernel::Gfni) => {
                "NOT RUN, this processor lacks it; its sequence was tested in plain Rust"
            }
            (false, _) => "NOT RUN, this processor lacks it",
        };
        eprintln!("guard kernel {:<12} {tested}", kernel.name());
    }
    assert!(Kernel::Fast.available() && Kernel::Slice16.available());
    if let Ok(only) = std::env::var("TCMU_DIF_GUARD_ONLY") {
        let tested: Vec<&str> = kernels().map(|g| g.kernel().name()).collect();
        assert_eq!(tested.join(","), only, "every kernel that is named has to be one that can be run");
    }
}

#[test]
fn every_kernel_equals_the_oracle_on_random_data_for_any_number_of_blocks() {
    let mut rng = Rng::new(1);
    for size in SIZES {
        for count in (0..20).chain([31, 64, 65]) {
            let data = rng.bytes(bytes(size) * count);
            let want: Vec<u16> = data.chunks(bytes(size)).map(|b| ORACLE.checksum(b)).collect();
            // Some bytes too many, which make no block.
            let sg = Buffer::from_slice(&[&data[..], &[1; 9]].concat()).sg();
            for guard in kernels() {
                let got = guards_of(guard, Blocks::of(&sg, size));
                assert_eq!(got, want, "{:?} {count} × {size:?}", guard.kernel());
            }
        }
    }
}

#[test]
fn every_kernel_sees_every_single_bit_of_a_block_as_the_oracle_does() {
    for size in SIZES {
        let data = Buffer::zeroed(8 * bytes(size));
        let sg = data.sg();
        // Eight bits at a time, each in a block of its own.
        for first in (0..bytes(size) * 8).step_by(8) {
            let mut want = [0; 8];
            for (block, want) in want.iter_mut().enumerate() {
                let mut one = [0; 4096];
                one[first / 8] = 0x80 >> block;
                *want = ORACLE.checksum(&one[..bytes(size)]);
                sg.copy_in(block * bytes(size) + first / 8, &[one[first / 8]]);
            }
            // The model takes its time; of the long blocks it sees one byte in eight.
            let model = size == BlockSize::B512 || first % 64 == 8 * (first / 64 % 8);
            for guard in kernels().filter(|g| model || g.kernel() != Kernel::GfniInPlainRust) {
                assert_eq!(guards_of(guard, Blocks::of(&sg, size)), want, "{:?} bit {first}", guard.kernel());
            }
            (0..8).for_each(|block| sg.copy_in(block * bytes(size) + first / 8, &[0]));
        }
    }
}

#[test]
fn every_kernel_takes_blocks_at_any_address() {
    let mut rng = Rng::new(2);
    for size in SIZES {
        let data = rng.bytes(bytes(size) * 9);
        let want: Vec<u16> = data.chunks(bytes(size)).map(|b| ORACLE.checksum(b)).collect();
        for offset in 0..65 {
            let part = Buffer::zeroed(data.len() + offset).sg().slice(offset, data.len());
            part.copy_in(0, &data);
            for guard in kernels() {
                assert_eq!(guards_of(guard, Blocks::of(&part, size)), want, "{:?} +{offset}", guard.kernel());
            }
        }
    }
}

#[test]
fn tuples_are_made_the_same_wherever_segments_are_cut_with_and_without_a_copy() {
    let mut rng = Rng::new(3);
    for _ in 0..scaled(150) {
        let size = SIZES[rng.below(2) as usize];
        let count = rng.below(27) as usize;
        let data = rng.bytes(bytes(size) * count);
        let tags = random_tags(&mut rng);
        let want = tuples_of(&data, size, tags);
        let from = scatter(&data, &mut rng);
        for guard in kernels() {
            let mut got = vec![0xee; want.len()];
            guard.generate(Blocks::of(&from, size), tags, &mut got);
            assert_eq!(got, want, "{:?} {size:?} {tags:?}", guard.kernel());
            let to = scatter(&vec![0xee; data.len()], &mut rng);
            let mut got = vec![0xee; want.len()];
            guard.copy_and_generate(Blocks::of(&from, size), Blocks::of(&to, size), tags, &mut got);
            assert_eq!(got, want, "{:?} {size:?} {tags:?}, copied", guard.kernel());
            assert!(to.to_vec() == data, "{:?} {size:?}: the copy", guard.kernel());
        }
    }
}

#[test]
fn interleaved_transfers_are_split_and_joined_while_they_are_checked() {
    let mut rng = Rng::new(4);
    for _ in 0..scaled(100) {
        let size = SIZES[rng.below(2) as usize];
        let count = rng.below(20) as usize;
        let data = rng.bytes(bytes(size) * count);
        let tags = random_tags(&mut rng);
        let tuples = tuples_of(&data, size, tags);
        let blocks = data.chunks(bytes(size)).zip(tuples.chunks(8));
        let interleaved: Vec<u8> = blocks.flat_map(|(b, t)| [b, t].concat()).collect();
        let wire = scatter(&interleaved, &mut rng);
        let suspicious = |i, guard| panic!("block {i} with guard {guard:04x}");
        for guard in kernels().filter(|_| tags.app != 0xffff) {
            let wire = Blocks::interleaved(&wire, size);
            assert!(wire.tuples() == tuples);
            let plain = scatter(&vec![0; data.len()], &mut rng);
            let to = Blocks::of(&plain, size);
            guard.copy_and_verify(wire, to, tags, Mask::ALL, &tuples, suspicious);
            assert!(plain.to_vec() == data, "{:?}: split", guard.kernel());
            let back = scatter(&vec![0; interleaved.len()], &mut rng);
            let to = Blocks::interleaved(&back, size);
            guard.copy_and_verify(Blocks::of(&plain, size), to, tags, Mask::ALL, &tuples, suspicious);
            to.put_tuples(&tuples);
            assert!(back.to_vec() == interleaved, "{:?}: joined", guard.kernel());
        }
    }
}

#[test]
fn verify_names_the_blocks_that_differ_under_the_mask_and_those_that_may_be_escaped_and_no_other() {
    let mut rng = Rng::new(5);
    for _ in 0..scaled(200) {
        let size = SIZES[rng.below(2) as usize];
        let count = 1 + rng.below(27) as usize;
        let mut data = rng.bytes(bytes(size) * count);
        let tags = random_tags(&mut rng);
        let mut stored = tuples_of(&data, size, tags);
        let mask = match rng.below(4) {
            0 => Mask { guard: 0, ..Mask::ALL },
            1 => Mask { app: rng.next() as u16, ..Mask::ALL },
            2 => Mask { reference: 0, ..Mask::ALL },
            _ => Mask::ALL,
        };
        for _ in 0..rng.below(4) {
            let block = rng.below(stored.len() as u64 / 8) as usize;
            match rng.below(3) {
                0 => data[block * bytes(size) + rng.below(size.bytes()) as usize] ^= 1 << rng.below(8),
                1 => stored[block * 8 + rng.below(8) as usize] ^= 1 << rng.below(8),
                _ => stored[block * 8..][..8].fill(0xff),
            }
        }
        let masked = [&mask.guard.to_be_bytes()[..], &mask.app.to_be_bytes(), &mask.reference.to_be_bytes()];
        let masked = masked.concat();
        let want: Vec<(usize, u16)> = tuples_of(&data, size, tags)
            .chunks(8)
            .zip(stored.chunks(8))
            .enumerate()
            .filter(|(_, (a, b))| (0..8).any(|k| (a[k] ^ b[k]) & masked[k] != 0) || b[2..4] == [0xff, 0xff])
            .map(|(i, (a, _))| (i, u16::from_be_bytes([a[0], a[1]])))
            .collect();
        let from = scatter(&data, &mut rng);
        for guard in kernels() {
            let mut got = Vec::new();
            guard.verify(Blocks::of(&from, size), tags, mask, &stored, |i, crc| got.push((i, crc)));
            assert_eq!(got, want, "{:?} {size:?} {mask:?}", guard.kernel());
            let to = scatter(&vec![0; data.len()], &mut rng);
            let (mut got, blocks) = (Vec::new(), Blocks::of(&from, size));
            let suspect = |i, crc| got.push((i, crc));
            guard.copy_and_verify(blocks, Blocks::of(&to, size), tags, mask, &stored, suspect);
            assert_eq!(got, want, "{:?} {size:?} {mask:?}, copied", guard.kernel());
            assert!(to.to_vec() == data, "{:?} {size:?}: the copy", guard.kernel());
        }
    }
}

#[test]
fn a_line_of_tuples_looks_the_same_from_eight_at_a_time_and_from_one_by_one() {
    let guards: Guards = std::array::from_fn(|i| i as u8 * 7 + 1);
    let tags = Tags { app: 0x1234, reference: 0xffff_fffd, step: 1 };
    let mut line = [0; 64];
    tags::put(guards, tags, &mut line);
    assert_eq!(line[..8], [1, 8, 0x12, 0x34, 0xff, 0xff, 0xff, 0xfd]);
    assert_eq!(line[56..], [99, 106, 0x12, 0x34, 0, 0, 0, 4]);
    assert_eq!(tags::suspects(guards, tags, Mask::ALL, &line), 0);
    line[8] ^= 1;
    line[63] ^= 1;
    line[18..20].fill(0xff);
    assert_eq!(tags::suspects(guards, tags, Mask::ALL, &line), 0b1000_0110);
    assert_eq!(tags::suspects(guards, tags, Mask { reference: 0, ..Mask::ALL }, &line), 0b0000_0110);
    assert_eq!(tags::suspects(guards, tags, Mask { guard: 0, app: 0, reference: 0 }, &line), 0b0000_0100);
}

#[test]
#[ignore = "needs Debian's libisal2, which `cargo xtask test` installs as root"]
fn isa_l_agrees() {
    let isal = super::isal::IsaL::load().expect("libisal.so.2 (Debian's package libisal2)");
    let mut rng = Rng::new(6);
    let data = rng.bytes(20 * 512);
    let sg = Buffer::from_slice(&data).sg();
    let want: Vec<u16> = data.chunks(512).map(|b| isal.guard(b)).collect();
    for guard in kernels() {
        assert_eq!(guards_of(guard, Blocks::of(&sg, BlockSize::B512)), want, "{:?}", guard.kernel());
    }
    let mut copy = [0; 512];
    assert_eq!(isal.copy(&mut copy, &data[..512]), want[0]);
    assert_eq!(copy, data[..512]);
}

#[test]
fn a_kernel_that_comes_later_is_taken_only_where_it_is_a_quarter_faster() {
    let cost = |kernel, nanos| (Guard(kernel), Duration::from_nanos(nanos));
    let of = |costs: [u64; 3]| {
        let kernels = [Kernel::Gfni, Kernel::Fast, Kernel::Slice16];
        fastest_of(kernels.into_iter().zip(costs).map(|(kernel, nanos)| cost(kernel, nanos))).kernel()
    };
    assert_eq!(of([100, 300, 3000]), Kernel::Gfni);
    assert_eq!(of([100, 90, 85]), Kernel::Gfni, "no more than noise");
    assert_eq!(of([900, 800, 400]), Kernel::Slice16, "an emulated processor");
    assert_eq!(fastest_of(std::iter::empty()).kernel(), Kernel::Slice16);
    assert!(Guard::all().all(|guard| guard.cost() > Duration::ZERO));
}
