//! `cargo bench --bench guard`: the guard kernels that this machine runs, beside the crate `crc`, in one run. Ratios count; an
//! absolute figure is a note.

use std::{hint::black_box, time::Instant};

use tcmu_dif::pi::guard::Guard;

const BUFFER: usize = 64 << 10;
const ROUNDS: usize = 2000;

fn gigabytes_per_second(mut pass: impl FnMut()) -> f64 {
    pass();
    let start = Instant::now();
    for _ in 0..ROUNDS {
        pass();
    }
    (BUFFER * ROUNDS) as f64 / start.elapsed().as_secs_f64() / 1e9
}

fn main() {
    let data: Vec<u8> = (0..BUFFER).map(|i| (i * 131 + i / 512) as u8).collect();
    println!("CRC-16/T10-DIF over a buffer of 64 KiB in cache, GB/s");
    println!("{:<12} {:>12} {:>12}", "kernel", "512 B", "4096 B");
    for guard in Guard::all() {
        let speed = |block| {
            gigabytes_per_second(|| {
                guard.blocks(black_box(&data), block, |_, crc| {
                    black_box(crc);
                })
            })
        };
        println!("{:<12} {:>12.1} {:>12.1}", guard.kernel().name(), speed(512), speed(4096));
    }
    let oracle = crc::Crc::<u16, crc::Table<16>>::new(&crc::CRC_16_T10_DIF);
    let speed = |block| {
        gigabytes_per_second(|| {
            for chunk in black_box(&data).chunks(block) {
                black_box(oracle.checksum(chunk));
            }
        })
    };
    println!("{:<12} {:>12.1} {:>12.1}", "crate crc", speed(512), speed(4096));
}
