//! Work on images, for the benches that do some.

use std::{cell::Cell, process::Command, rc::Rc};

use tcmu_dif::sys::{
    exec::Executor,
    io::{Io, Wait},
    mem::{Buffer, Sg},
};

/// Keeps `depth` pieces of work under way until `count` are done, each a task of its own as a LUN's commands are, with a buffer of `bytes`.
pub fn drive<F: Future<Output = ()>>(
    io: &Io,
    depth: usize,
    count: u64,
    bytes: usize,
    work: impl Fn(u64, Sg) -> F + Clone + 'static,
) {
    let next = Rc::new(Cell::new(0));
    let exec = Executor::new();
    for _ in 0..depth {
        let (next, work, buffer) = (next.clone(), work.clone(), Buffer::zeroed(bytes).sg());
        exec.spawn(async move {
            loop {
                let i: u64 = next.get();
                if i == count {
                    return;
                }
                next.set(i + 1);
                work(i, buffer.clone()).await;
            }
        });
    }
    while exec.tasks() > 0 {
        exec.run_ready();
        let wait = if exec.has_ready() || exec.tasks() == 0 { Wait::No } else { Wait::Event };
        io.turn(wait).expect("the I/O backend works");
    }
}

/// Runs qemu-img and gives what it says.
pub fn qemu_img(args: &[&str]) -> String {
    let out = Command::new("qemu-img").args(args).output();
    let out = out.expect("qemu-img cannot be run: apt-get install qemu-utils");
    assert!(out.status.success(), "qemu-img {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8_lossy(&out.stdout).into_owned()
}
