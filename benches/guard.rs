//! `cargo bench --bench guard [-- --json FILE]`: the guard kernels that this machine runs, beside the crates `crc` and
//! `crc-fast`, ISA-L where Debian's `libisal2` is installed, and what the memory allows, all in one run. Ratios count; an absolute
//! figure is a note.
//!
//! Every figure is the best of many short rounds, and the rows take turns, so that what else the machine does hits all alike.
#![allow(clippy::unwrap_used)] // A bench may panic.

use std::{
    fmt::Write as _,
    hint::black_box,
    time::{Duration, Instant},
};

use crc_fast::CrcAlgorithm;
use serde_json::{Value, json};
use tcmu_dif::{
    pi::{
        guard::{Blocks, Guard, Kernel, Mask, Tags, isal::IsaL},
        tuple::{TUPLE_LEN, Tuple},
    },
    sys::mem::{Buffer, Sg},
    units::BlockSize,
};

const TAGS: Tags = Tags { app: 0, reference: 1000, step: 1 };
const SIZES: [BlockSize; 2] = [BlockSize::B512, BlockSize::B4096];

/// A row: its name and what it does once.
struct Row<'a> {
    name: String,
    work: Box<dyn FnMut() + 'a>,
}

impl<'a> Row<'a> {
    fn new(name: impl Into<String>, work: impl FnMut() + 'a) -> Row<'a> {
        Row { name: name.into(), work: Box::new(work) }
    }
}

/// Seconds for one call of each row: the best of `rounds` rounds of `calls` calls, the rows taking turns.
fn measure(rows: &mut [Row<'_>], rounds: usize, calls: u32) -> Vec<f64> {
    let mut best = vec![Duration::MAX; rows.len()];
    for _ in 0..=rounds {
        for (row, best) in rows.iter_mut().zip(&mut best) {
            let start = Instant::now();
            (0..calls).for_each(|_| (row.work)());
            *best = start.elapsed().min(*best);
        }
    }
    best.iter().map(|b| b.as_secs_f64() / f64::from(calls)).collect()
}

/// A way to get one guard at a time.
type OneGuard<'a> = Box<dyn Fn(&[u8]) -> u16 + 'a>;

/// The others in the field.
fn peers(isal: Option<IsaL>) -> Vec<(&'static str, OneGuard<'static>)> {
    static ORACLE: crc::Crc<u16, crc::Table<16>> = crc::Crc::<u16, crc::Table<16>>::new(&crc::CRC_16_T10_DIF);
    let mut out: Vec<(&'static str, OneGuard<'static>)> = vec![
        ("crate crc, Table<16>", Box::new(|block| ORACLE.checksum(block))),
        ("crate crc-fast", Box::new(|block| crc_fast::checksum(CrcAlgorithm::Crc16T10Dif, block) as u16)),
    ];
    if let Some(isal) = isal {
        out.push(("ISA-L", Box::new(move |block| isal.guard(block))));
    }
    out
}

fn tuple(guard: u16, i: usize) -> [u8; TUPLE_LEN] {
    Tuple { guard, app: TAGS.app, reference: TAGS.reference + i as u32 }.to_bytes()
}

/// The bytes of a list of one segment.
fn with(sg: &Sg, f: impl FnOnce(&[u8])) {
    let mut f = Some(f);
    sg.for_each(0, sg.len(), |bytes| (f.take().unwrap())(bytes));
}

fn read(sg: &Sg) {
    with(sg, |bytes| {
        let mut sums = [0u64; 32];
        for chunk in bytes.as_chunks::<256>().0 {
            for (sum, word) in sums.iter_mut().zip(chunk.as_chunks::<8>().0) {
                *sum ^= u64::from_ne_bytes(*word);
            }
        }
        black_box(sums);
    });
}

fn noise(len: usize) -> Buffer {
    let bytes: Vec<u8> = (0..len).map(|i| (i.wrapping_mul(2654435761) >> 11) as u8).collect();
    Buffer::from_slice(&bytes)
}

/// Tuples made for a whole buffer.
fn generate_rows<'a>(
    data: &'a Sg,
    size: BlockSize,
    peers: &'a [(&'static str, OneGuard<'a>)],
) -> Vec<Row<'a>> {
    let block = size.bytes() as usize;
    let tuples = data.len() / block * TUPLE_LEN;
    let mut rows: Vec<Row<'_>> = Guard::all()
        .map(|guard| {
            let mut out = vec![0; tuples];
            Row::new(format!("tcmu-dif {}", guard.kernel().name()), move || {
                guard.generate(Blocks::of(black_box(data), size), TAGS, black_box(&mut out));
            })
        })
        .collect();
    rows.extend(peers.iter().map(|(name, guard)| {
        let mut out = vec![0; tuples];
        Row::new(*name, move || {
            with(black_box(data), |bytes| {
                let slots = out.as_chunks_mut::<TUPLE_LEN>().0.iter_mut();
                for (i, (block, slot)) in bytes.chunks_exact(block).zip(slots).enumerate() {
                    *slot = tuple(guard(block), i);
                }
            });
            black_box(&mut out);
        })
    }));
    rows
}

/// Tuples compared for a whole buffer.
fn verify_rows<'a>(data: &'a Sg, size: BlockSize, peers: &'a [(&'static str, OneGuard<'a>)]) -> Vec<Row<'a>> {
    let block = size.bytes() as usize;
    let mut stored = vec![0; data.len() / block * TUPLE_LEN];
    Guard::best().generate(Blocks::of(data, size), TAGS, &mut stored);
    let mut rows: Vec<Row<'_>> = Guard::all()
        .map(|guard| {
            let stored = stored.clone();
            Row::new(format!("tcmu-dif {}", guard.kernel().name()), move || {
                let (data, stored) = (Blocks::of(black_box(data), size), black_box(&stored));
                guard.verify(data, TAGS, Mask::ALL, stored, |i, _| panic!("block {i}"));
            })
        })
        .collect();
    rows.extend(peers.iter().map(|(name, guard)| {
        let stored = stored.clone();
        Row::new(*name, move || {
            with(black_box(data), |bytes| {
                let slots = black_box(&stored).as_chunks::<TUPLE_LEN>().0.iter();
                for (i, (block, slot)) in bytes.chunks_exact(block).zip(slots).enumerate() {
                    assert!(*slot == tuple(guard(block), i));
                }
            });
        })
    }));
    rows
}

/// Tuples made while the buffer is copied; ISA-L has a function for it, the others copy a block and look at it then.
fn copy_rows<'a>(
    data: &'a Sg,
    to: &'a Sg,
    size: BlockSize,
    peers: &'a [(&'static str, OneGuard<'a>)],
    isal: Option<IsaL>,
) -> Vec<Row<'a>> {
    let block = size.bytes() as usize;
    let tuples = data.len() / block * TUPLE_LEN;
    let mut rows: Vec<Row<'_>> = Guard::all()
        .map(|guard| {
            let mut out = vec![0; tuples];
            Row::new(format!("tcmu-dif {}", guard.kernel().name()), move || {
                let (from, to) = (Blocks::of(black_box(data), size), Blocks::of(to, size));
                guard.copy_and_generate(from, to, TAGS, black_box(&mut out));
            })
        })
        .collect();
    type Copier<'a> = Box<dyn Fn(&mut [u8], &[u8]) -> u16 + 'a>;
    let copiers = peers.iter().map(|(name, guard)| {
        let copier: Copier<'_> = match isal {
            Some(isal) if *name == "ISA-L" => Box::new(move |to, from| isal.copy(to, from)),
            _ => Box::new(move |to, from| {
                to.copy_from_slice(from);
                guard(from)
            }),
        };
        (*name, copier)
    });
    rows.extend(copiers.map(|(name, copier)| {
        let (mut out, mut to) = (vec![0; tuples], vec![1; data.len()]);
        Row::new(name, move || {
            with(black_box(data), |bytes| {
                let blocks = bytes.chunks_exact(block).zip(to.chunks_exact_mut(block));
                let slots = out.as_chunks_mut::<TUPLE_LEN>().0.iter_mut();
                for (i, ((from, to), slot)) in blocks.zip(slots).enumerate() {
                    *slot = tuple(copier(to, from), i);
                }
            });
            black_box((&mut out, &mut to));
        })
    }));
    rows
}

/// A table as it is printed and as it goes into the JSON: a row's name, and its figure in each column.
struct Table {
    title: String,
    columns: Vec<String>,
    rows: Vec<(String, Vec<Option<f64>>)>,
}

impl Table {
    fn new(title: impl Into<String>) -> Table {
        Table { title: title.into(), columns: Vec::new(), rows: Vec::new() }
    }

    fn column(&mut self, column: impl Into<String>, figures: impl IntoIterator<Item = (String, f64)>) {
        let index = self.columns.len();
        self.columns.push(column.into());
        for (name, figure) in figures {
            let row = match self.rows.iter().position(|(n, _)| *n == name) {
                Some(row) => row,
                None => {
                    self.rows.push((name, Vec::new()));
                    self.rows.len() - 1
                }
            };
            self.rows[row].1.resize(index, None);
            self.rows[row].1.push(Some(figure));
        }
    }

    fn print(&self) {
        println!("\n{}\n", self.title);
        let mut head = String::from("| |");
        self.columns.iter().for_each(|c| write!(head, " {c} |").unwrap());
        println!("{head}\n|{}", " --- |".repeat(self.columns.len() + 1));
        for (name, figures) in &self.rows {
            let mut line = format!("| {name} |");
            for i in 0..self.columns.len() {
                match figures.get(i).copied().flatten() {
                    Some(figure) => write!(line, " {figure:.1} |").unwrap(),
                    None => line.push_str(" – |"),
                }
            }
            println!("{line}");
        }
    }

    fn json(&self) -> Value {
        let row = |(name, figures): &(String, Vec<Option<f64>>)| json!({ "name": name, "figures": figures });
        json!({ "title": self.title, "columns": self.columns, "rows": self.rows.iter().map(row).collect::<Vec<_>>() })
    }
}

fn processor() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = info.lines().find(|l| l.starts_with(name))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let fields = ["model name", "cpu family", "model\t"].map(|n| field(n).unwrap_or_else(|| "?".into()));
    format!("{}, family {} model {}", fields[0], fields[1], fields[2])
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let json_file = arguments.iter().position(|a| a == "--json").and_then(|i| arguments.get(i + 1));
    let isal = IsaL::load();
    let peers = peers(isal);
    println!("{}", processor());
    for kernel in Kernel::ALL.into_iter().filter(|k| !k.available()) {
        println!("kernel {}: this processor lacks it", kernel.name());
    }
    if isal.is_none() {
        println!("ISA-L: no libisal.so.2 here (Debian's package libisal2)");
    }

    let mut tables = Vec::new();
    let mut making = Table::new("Tuples made, GB/s of data");
    let mut comparing = Table::new("Tuples compared, GB/s of data");
    let mut copying = Table::new("Tuples made while blocks are copied, GB/s of data");
    for (len, name, rounds, calls) in [(64 << 10, "64 KiB", 300, 20), (256 << 20, "256 MiB", 6, 1)] {
        let (data, target) = (noise(len), noise(len));
        let (data, to) = (data.sg(), target.sg());
        for size in SIZES {
            let column = |table: &mut Table, mut rows: Vec<Row<'_>>| {
                let seconds = measure(&mut rows, rounds, calls);
                let speeds = seconds.iter().map(|s| len as f64 / s / 1e9);
                let names = rows.iter().map(|r| r.name.clone());
                table.column(format!("{name}, {} B", size.bytes()), names.zip(speeds).collect::<Vec<_>>());
            };
            let mut rows = generate_rows(&data, size, &peers);
            rows.push(Row::new("bound: reading alone", || read(black_box(&data))));
            column(&mut making, rows);
            let mut rows = verify_rows(&data, size, &peers);
            rows.push(Row::new("bound: reading alone", || read(black_box(&data))));
            column(&mut comparing, rows);
            let mut rows = copy_rows(&data, &to, size, &peers, isal);
            rows.push(Row::new("bound: memcpy alone", || to.copy_from(0, black_box(&data))));
            column(&mut copying, rows);
        }
    }
    let mut command = Table::new("One command of 4 KiB, nanoseconds");
    let data = noise(4096);
    let data = data.sg();
    for size in SIZES {
        let name = format!("{} × {} B", 4096 / size.bytes(), size.bytes());
        for (what, mut rows) in
            [("made", generate_rows(&data, size, &peers)), ("compared", verify_rows(&data, size, &peers))]
        {
            let seconds = measure(&mut rows, 300, 200);
            let figures = rows.iter().map(|r| r.name.clone()).zip(seconds.iter().map(|s| s * 1e9));
            command.column(format!("{name}, {what}"), figures.collect::<Vec<_>>());
        }
    }
    tables.extend([making, comparing, copying, command]);
    tables.iter().for_each(Table::print);
    if let Some(file) = json_file {
        let kernels: Vec<&str> = Guard::all().map(|g| g.kernel().name()).collect();
        let value = json!({
            "processor": processor(),
            "kernels": kernels,
            "isal": isal.is_some(),
            "tables": tables.iter().map(Table::json).collect::<Vec<_>>(),
        });
        std::fs::write(file, format!("{value:#}\n")).unwrap();
    }
}
