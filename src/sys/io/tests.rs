//! What both backends promise: the same tests run on io_uring and on the pool of threads.

use super::*;
use crate::sys::{exec::join_all, mem::Buffer, run_on};

fn on_both(test: impl AsyncFn(Io) + Copy + 'static) {
    for backend in [Backend::Uring, Backend::Threads] {
        run_on(backend, async move |io| test(io).await);
    }
}

fn temp() -> Rc<File> {
    Rc::new(tempfile::tempfile().unwrap())
}

#[test]
fn scattered_writes_are_read_back_in_order() {
    on_both(async |io| {
        let file = temp();
        let mut sg = Sg::new();
        for i in 0..3000u32 {
            sg.append(&Buffer::from_slice(&i.to_le_bytes()).sg());
        }
        assert!(sg.segments() > IOV_MAX);
        io.write(&file, 100, &sg, true).await.unwrap();
        let back = Buffer::zeroed(sg.len() + 50);
        back.sg().fill(0, back.len(), 0xff);
        io.read_or_zero(&file, 100, &back.sg()).await.unwrap();
        assert_eq!(back.sg().slice(0, sg.len()).mismatch(&sg), None);
        assert!(back.sg().slice(sg.len(), 50).is_zero());
    });
}

#[test]
fn many_operations_are_in_flight_at_once() {
    on_both(async |io| {
        let file = temp();
        let io = &io;
        let file = &file;
        join_all((0..1000u64).map(|i| async move {
            io.write(file, i * 8, &Buffer::from_slice(&i.to_le_bytes()).sg(), false).await.unwrap();
        }))
        .await;
        let all = Buffer::zeroed(8000);
        assert_eq!(io.read(file, 0, &all.sg()).await.unwrap(), 8000);
        assert!(all.to_vec().chunks(8).enumerate().all(|(i, b)| b == (i as u64).to_le_bytes()));
    });
}

#[test]
fn a_dropped_future_lets_its_operation_finish() {
    on_both(async |io| {
        let file = temp();
        {
            let data = Buffer::from_slice(&[7; 4096]);
            let sg = data.sg();
            let mut write = Box::pin(io.write(&file, 0, &sg, false));
            assert!(poll_fn(|cx| Poll::Ready(write.as_mut().poll(cx).is_pending())).await);
        }
        while io.in_flight() > 0 {
            io.sleep(Duration::from_millis(1)).await;
        }
        let back = Buffer::zeroed(4096);
        io.read(&file, 0, &back.sg()).await.unwrap();
        assert_eq!(back.to_vec(), [7; 4096]);
    });
}

#[test]
fn results_are_seen_without_a_system_call_and_are_there_at_the_next_turn() {
    on_both(async |io| {
        let file = temp();
        let data = Buffer::from_slice(&[7; 4096]);
        let sg = data.sg();
        let mut write = Box::pin(io.write(&file, 0, &sg, false));
        assert!(poll_fn(|cx| Poll::Ready(write.as_mut().poll(cx).is_pending())).await);
        while io.in_flight() > 0 {
            io.turn(Wait::No).unwrap();
            let begun = Instant::now();
            while io.in_flight() > 0 && !io.has_results() {
                assert!(begun.elapsed() < Duration::from_secs(60), "the result is never seen");
            }
        }
        assert!(!io.has_results(), "it was taken");
        write.await.unwrap();
    });
}

#[test]
fn errors_are_the_kernels_own() {
    on_both(async |io| {
        let file = Rc::new(File::open("/dev/null").unwrap());
        let e = io.write(&file, 0, &Buffer::zeroed(8).sg(), false).await.unwrap_err();
        assert_eq!(e.raw_os_error(), Some(libc::EBADF));
    });
}

#[test]
fn a_hole_reads_as_zeros_and_the_size_stays() {
    on_both(async |io| {
        let file = temp();
        io.write(&file, 0, &Buffer::from_slice(&[1; 16384]).sg(), false).await.unwrap();
        io.fallocate(&file, Fallocate::PunchHole, 4096, 65536).await.unwrap();
        assert_eq!(file.metadata().unwrap().len(), 16384);
        let back = Buffer::zeroed(16384);
        io.read(&file, 0, &back.sg()).await.unwrap();
        assert!(back.sg().slice(4096, 12288).is_zero() && !back.sg().is_zero());
    });
}

#[test]
fn a_blocking_call_runs_elsewhere_and_a_panic_in_it_is_an_error() {
    on_both(async |io| {
        let here = std::thread::current().id();
        assert!(io.blocking(move || std::thread::current().id() != here).await.unwrap());
        assert!(io.blocking(|| panic!("as it should")).await.is_err());
    });
}

#[test]
fn sleeps_end_in_order_of_their_length() {
    on_both(async |io| {
        let order = RefCell::new(Vec::new());
        join_all([30u64, 10, 20].map(|ms| {
            let (io, order) = (&io, &order);
            async move {
                io.sleep(Duration::from_millis(ms)).await;
                order.borrow_mut().push(ms);
            }
        }))
        .await;
        assert_eq!(*order.borrow(), [10, 20, 30]);
    });
}

#[test]
fn a_watched_descriptor_wakes_the_turn() {
    on_both(async |_| {});
    for backend in [Backend::Uring, Backend::Threads] {
        let io = Io::new(backend).unwrap();
        let fd = rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap();
        let watch = io.watch(fd.try_clone().unwrap()).unwrap();
        for _ in 0..3 {
            io.turn(Wait::AtMost(Duration::from_millis(1))).unwrap();
            assert!(!watch.take_ready());
            rustix::io::write(&fd, &1u64.to_ne_bytes()).unwrap();
            io.turn(Wait::Event).unwrap();
            assert!(watch.take_ready());
            rustix::io::read(&fd, &mut [0u8; 8]).unwrap();
        }
    }
}

/// A UIO device can be opened once, so a LUN that is started again needs the last one's doorbell closed.
#[test]
fn what_was_watched_is_closed_when_the_io_is_gone_and_not_some_time_later() {
    for backend in [Backend::Uring, Backend::Threads] {
        for round in 0..50 {
            let (reader, writer) = rustix::pipe::pipe().unwrap();
            let io = Io::new(backend).unwrap();
            let watch = io.watch(reader).unwrap();
            io.turn(Wait::AtMost(Duration::from_millis(1))).unwrap();
            drop((watch, io));
            assert_eq!(rustix::io::write(&writer, &[1]), Err(rustix::io::Errno::PIPE), "{backend}, {round}");
        }
    }
}

#[test]
fn no_result_of_the_pool_is_slept_through_however_results_and_looks_fall_together() {
    let (ended, end) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        run_on(Backend::Threads, async |io| {
            let io = &io;
            join_all((0..3).map(|_| async move {
                for _ in 0..20_000 {
                    io.blocking(|| ()).await.unwrap();
                }
            }))
            .await;
        });
        let _ = ended.send(());
    });
    end.recv_timeout(Duration::from_secs(300)).expect("a result came, and nobody was woken for it");
}
