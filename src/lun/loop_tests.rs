//! The event loop against the embedded kernel, with a service that knows no SCSI: what the loop itself promises.

use std::{
    cell::Cell,
    rc::Rc,
    sync::mpsc::sync_channel,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use super::{
    event_loop::{EventLoop, Load, LoopError, Service},
    inbox::{self, Message, Outbox, Pulse},
    throttle::{Cost, Throttle, limits::Limits},
};
use crate::{
    peer::kernel::{Data, Kernel, KernelError, Options},
    ring::{Command, Completion, Device, Ring},
    sys::{
        backend_from_env,
        exec::Executor,
        io::{Backend, Io},
    },
};

/// Answers with the second byte of the CDB; the first tells how: 1 sleeps that many milliseconds (its third byte, and 256 times its fourth), 2 for ever,
/// 4 holds up the whole thread for that many milliseconds.
struct Echo {
    io: Io,
    running: Cell<usize>,
    throttle: Throttle,
}

impl Service for Echo {
    async fn execute(&self, command: &Command, _: Instant) -> Completion {
        self.running.set(self.running.get() + 1);
        match command.cdb[0] {
            1 => {
                let ms = u16::from_le_bytes([command.cdb[2], command.cdb[3]]);
                self.io.sleep(Duration::from_millis(ms.into())).await;
            }
            2 => std::future::pending().await,
            3 => panic!("as it should"),
            4 => std::thread::sleep(Duration::from_millis(command.cdb[2].into())),
            _ => {}
        }
        command.data.fill(0, command.data.len(), command.cdb[1]);
        self.running.set(self.running.get() - 1);
        Completion::status(command.cdb[1] & 0xfe)
    }

    fn throttle(&self) -> &Throttle {
        &self.throttle
    }

    fn cost(&self, command: &Command) -> Option<Cost> {
        // The sixth byte of the CDB says whether it is limited, and how.
        let writes = command.cdb[5] & 1 != 0;
        (command.cdb[5] != 0).then_some(Cost { writes, bytes: 512 })
    }

    async fn background(self: Rc<Self>) {
        std::future::pending().await
    }

    async fn message(self: Rc<Self>, message: Message, load: Load) {
        match message {
            Message::Resize(_, back) => {
                assert!(load.in_flight >= self.running.get());
                let _ = back.send(Ok(()));
            }
            Message::Limit(limits, back) => {
                self.throttle.set(limits, Instant::now());
                let _ = back.send(Ok(()));
            }
            _ => {}
        }
    }
}

fn start(device: Device, backend: Backend) -> (Outbox, JoinHandle<Result<(), LoopError>>) {
    let (outbox, inbox) = inbox::channel().unwrap();
    let thread = std::thread::spawn(move || {
        let io = Io::new(backend).unwrap();
        let ring = Ring::attach(device).unwrap();
        let echo = Rc::new(Echo {
            io: io.clone(),
            running: Cell::new(0),
            throttle: Throttle::new(Limits::default()),
        });
        EventLoop::new(ring, io, Executor::new(), echo, inbox, true).run()
    });
    (outbox, thread)
}

fn kernel() -> Kernel {
    Kernel::new(Options { cmdr_size: 128 << 10, ..Options::default() }).unwrap()
}

#[test]
fn every_command_is_answered_at_every_depth() {
    for depth in [1usize, 7, 64, 400] {
        let mut kernel = kernel();
        let (outbox, thread) = start(kernel.device().unwrap(), backend_from_env());
        let (mut sent, mut done) = (0u32, 0u32);
        while done < 3000 {
            while kernel.in_flight() < depth && sent < 3000 {
                match kernel.queue(&[0, sent as u8, 0, 0, 0, 0], Data::In(512)) {
                    Ok(_) => sent += 1,
                    Err(KernelError::Full) => break,
                    Err(e) => panic!("{e}"),
                }
            }
            kernel.ring_doorbell().unwrap();
            for ended in kernel.wait(Duration::from_secs(20)).unwrap() {
                assert_eq!((ended.data.len(), ended.data[0] & 0xfe), (512, ended.status));
                done += 1;
            }
        }
        outbox.send(Message::Stop);
        thread.join().unwrap().unwrap();
    }
}

#[test]
fn a_slow_command_holds_up_nobody() {
    let mut kernel = kernel();
    let (outbox, thread) = start(kernel.device().unwrap(), backend_from_env());
    let slow = kernel.submit(&[1, 2, 250, 0, 0, 0], Data::None).unwrap();
    for i in 0..50u8 {
        let id = kernel.submit(&[0, i, 0, 0, 0, 0], Data::None).unwrap();
        assert_eq!(kernel.wait(Duration::from_secs(20)).unwrap()[0].id, id);
    }
    assert_eq!(kernel.wait(Duration::from_secs(20)).unwrap()[0].id, slow);
    outbox.send(Message::Stop);
    thread.join().unwrap().unwrap();
}

#[test]
fn stopping_answers_what_is_under_way_and_takes_nothing_new() {
    let mut kernel = kernel();
    let (outbox, thread) = start(kernel.device().unwrap(), backend_from_env());
    for _ in 0..20 {
        kernel.submit(&[1, 4, 100, 0, 0, 0], Data::None).unwrap();
    }
    std::thread::sleep(Duration::from_millis(30));
    outbox.send(Message::Stop);
    thread.join().unwrap().unwrap();
    assert_eq!(kernel.ended().unwrap().len(), 20);
    // A command that comes now waits for the next handler.
    kernel.submit(&[0, 8, 0, 0, 0, 0], Data::None).unwrap();
    assert_eq!(kernel.ended().unwrap().len(), 0);
    let (outbox, thread) = start(kernel.device().unwrap(), backend_from_env());
    assert_eq!(kernel.wait(Duration::from_secs(20)).unwrap()[0].status, 8);
    outbox.send(Message::Stop);
    thread.join().unwrap().unwrap();
}

#[test]
fn task_management_takes_back_what_has_not_started() {
    let mut kernel = kernel();
    // 256 run at once; the 257th waits behind them.
    for _ in 0..256 {
        kernel.queue(&[1, 0, 0xd0, 0x07, 0, 0], Data::None).unwrap();
    }
    let waits = kernel.submit(&[0, 6, 0, 0, 0, 0], Data::None).unwrap();
    let (outbox, thread) = start(kernel.device().unwrap(), backend_from_env());
    // The second answer comes in a later turn than the first, in which as many were started as run at once.
    for _ in 0..2 {
        outbox.pulse().ask();
        wait_for(&outbox.pulse());
    }
    let running = 1;
    kernel.submit_tmr(1, &[waits, running]).unwrap();
    let first = kernel.wait(Duration::from_secs(20)).unwrap().remove(0);
    assert_eq!((first.id, first.status), (waits, 0x40));
    let mut rest = 0;
    while rest < 256 {
        rest += kernel.wait(Duration::from_secs(20)).unwrap().iter().filter(|e| e.status == 0).count();
    }
    outbox.send(Message::Stop);
    thread.join().unwrap().unwrap();
}

#[test]
fn a_store_that_never_answers_holds_up_neither_messages_nor_other_luns_nor_their_stop() {
    let (mut hung, mut healthy) = (kernel(), kernel());
    let (stuck, _never_ends) = start(hung.device().unwrap(), backend_from_env());
    let (outbox, thread) = start(healthy.device().unwrap(), backend_from_env());
    // More than run at once.
    let ids: Vec<u16> = (0..300).map(|_| hung.submit(&[2, 0, 0, 0, 0, 0], Data::None).unwrap()).collect();
    // The second answer comes in a later turn than the first, in which as many were started as run at once.
    for _ in 0..2 {
        stuck.pulse().ask();
        wait_for(&stuck.pulse());
    }
    hung.submit_tmr(1, &[ids[0], ids[299]]).unwrap();
    let aborted = hung.wait(Duration::from_secs(20)).unwrap();
    assert_eq!(
        (aborted.len(), aborted[0].id, aborted[0].status),
        (1, ids[299], 0x40),
        "the other has started"
    );
    stuck.pulse().ask();
    wait_for(&stuck.pulse());
    let (back, answer) = sync_channel(1);
    stuck.send(Message::Resize(0, back));
    answer.recv_timeout(Duration::from_secs(20)).unwrap().unwrap();
    for i in 0..20u8 {
        let id = healthy.submit(&[0, i, 0, 0, 0, 0], Data::None).unwrap();
        assert_eq!(healthy.wait(Duration::from_secs(20)).unwrap()[0].id, id);
    }
    stuck.send(Message::Stop);
    outbox.send(Message::Stop);
    thread.join().unwrap().unwrap();
    assert_eq!(hung.in_flight(), 299);
}

#[test]
fn a_broken_entry_faults_its_device_and_no_other() {
    let (mut broken, mut healthy) = (kernel(), kernel());
    let (_, first) = start(broken.device().unwrap(), backend_from_env());
    let (outbox, second) = start(healthy.device().unwrap(), backend_from_env());
    broken.submit(&[1, 0, 20, 0, 0, 0], Data::None).unwrap();
    std::thread::sleep(Duration::from_millis(5));
    broken.submit_raw(&[1, 0, 0, 0, 0, 0, 0, 0], None).unwrap();
    let error = first.join().unwrap().unwrap_err();
    assert_eq!(error.to_string(), "the device is faulted");
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(source.contains("its length is 0"), "{source}");
    let id = healthy.submit(&[0, 2, 0, 0, 0, 0], Data::None).unwrap();
    assert_eq!(healthy.wait(Duration::from_secs(20)).unwrap()[0].id, id);
    outbox.send(Message::Stop);
    second.join().unwrap().unwrap();
}

#[test]
fn messages_are_answered_by_a_sleeping_and_by_a_busy_loop() {
    let mut kernel = kernel();
    let (outbox, thread) = start(kernel.device().unwrap(), backend_from_env());
    for round in 0..40 {
        if round % 2 == 0 {
            kernel.submit(&[1, 0, 1, 0, 0, 0], Data::None).unwrap();
        }
        let (back, answer) = sync_channel(1);
        outbox.send(Message::Resize(0, back));
        answer.recv_timeout(Duration::from_secs(20)).unwrap().unwrap();
    }
    outbox.send(Message::Stop);
    thread.join().unwrap().unwrap();
}

fn limit(outbox: &Outbox, limits: &str) {
    let (back, answer) = sync_channel(1);
    outbox.send(Message::Limit(limits.parse().unwrap(), back));
    answer.recv_timeout(Duration::from_secs(20)).unwrap().unwrap();
}

/// A command that counts as a read, or as a write.
fn limited(writes: bool) -> [u8; 6] {
    [0, 0, 0, 0, 0, if writes { 1 } else { 2 }]
}

#[test]
fn within_any_time_no_more_commands_are_answered_than_the_limit_says() {
    let mut kernel = kernel();
    let (outbox, thread) = start(kernel.device().unwrap(), backend_from_env());
    limit(&outbox, "iops=100");
    let begun = Instant::now();
    for _ in 0..40 {
        kernel.submit(&limited(false), Data::None).unwrap();
    }
    let mut done = 0;
    while done < 40 {
        done += kernel.wait(Duration::from_secs(20)).unwrap().len();
        // Ten at once, and one each hundredth of a second. A slow machine answers fewer.
        let most = 10.0 + begun.elapsed().as_secs_f64() * 100.0;
        assert!(done as f64 <= most, "{done} > {most}");
    }
    limit(&outbox, "off");
    for _ in 0..40 {
        kernel.submit(&limited(false), Data::None).unwrap();
        assert_eq!(kernel.wait(Duration::from_secs(20)).unwrap().len(), 1);
    }
    outbox.send(Message::Stop);
    thread.join().unwrap().unwrap();
}

#[test]
fn a_command_that_waits_for_its_limit_holds_up_nobody_else_and_goes_when_the_limit_does() {
    let mut kernel = kernel();
    let (outbox, thread) = start(kernel.device().unwrap(), backend_from_env());
    // One every 1000 seconds.
    limit(&outbox, "bps_wr=1,iops_rd=1000000");
    let first = kernel.submit(&limited(true), Data::None).unwrap();
    assert_eq!(
        kernel.wait(Duration::from_secs(20)).unwrap()[0].id,
        first,
        "bigger than the bucket, and it is empty"
    );
    let held: Vec<u16> = (0..300).map(|_| kernel.submit(&limited(true), Data::None).unwrap()).collect();
    for i in 0..50u8 {
        let cdb = if i % 2 == 0 { limited(false) } else { [0; 6] };
        let id = kernel.submit(&cdb, Data::None).unwrap();
        assert_eq!(kernel.wait(Duration::from_secs(20)).unwrap()[0].id, id);
    }
    assert_eq!(kernel.in_flight(), 300);
    // It has not started: task management takes it back.
    kernel.submit_tmr(1, &held[10..12]).unwrap();
    let mut aborted = Vec::new();
    while aborted.len() < 2 {
        aborted.extend(kernel.wait(Duration::from_secs(20)).unwrap().iter().map(|e| (e.id, e.status)));
    }
    assert_eq!(aborted, [(held[10], 0x40), (held[11], 0x40)]);
    limit(&outbox, "bps_wr=1000000000");
    let mut rest = Vec::new();
    while rest.len() < 298 {
        rest.extend(kernel.wait(Duration::from_secs(20)).unwrap().iter().map(|e| e.id));
    }
    assert!(rest.iter().zip(held.iter().filter(|id| !held[10..12].contains(id))).all(|(a, b)| a == b));
    outbox.send(Message::Stop);
    thread.join().unwrap().unwrap();
}

#[test]
fn commands_that_wait_for_their_limit_are_executed_when_the_loop_stops() {
    let mut kernel = kernel();
    let (outbox, thread) = start(kernel.device().unwrap(), backend_from_env());
    limit(&outbox, "bps=1");
    for _ in 0..20 {
        kernel.queue(&limited(true), Data::None).unwrap();
    }
    kernel.ring_doorbell().unwrap();
    assert_eq!(kernel.wait(Duration::from_secs(20)).unwrap().len(), 1);
    outbox.send(Message::Stop);
    thread.join().unwrap().unwrap();
    let ended = kernel.ended().unwrap();
    assert!(ended.len() == 19 && ended.iter().all(|e| e.status == 0), "{ended:?}");
}

#[track_caller]
fn wait_for(pulse: &Pulse) {
    let end = Instant::now() + Duration::from_secs(20);
    while !pulse.is_answered() {
        assert!(Instant::now() < end, "the loop owes a sign of life");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn the_loop_shows_that_it_turns_when_it_is_idle_and_while_its_commands_wait_for_ever() {
    let mut kernel = kernel();
    let (outbox, thread) = start(kernel.device().unwrap(), backend_from_env());
    let pulse = outbox.pulse();
    assert!(pulse.is_answered(), "nothing is owed before it was asked");
    for _ in 0..3 {
        std::thread::sleep(Duration::from_millis(5));
        pulse.ask();
        wait_for(&pulse);
    }
    for _ in 0..300 {
        kernel.submit(&[1, 0, 250, 0, 0, 0], Data::None).unwrap();
    }
    pulse.ask();
    wait_for(&pulse);
    assert!(kernel.in_flight() > 0, "the commands are still waiting");
    outbox.send(Message::Stop);
    thread.join().unwrap().unwrap();
    pulse.ask();
    assert!(pulse.is_answered(), "a loop that is over owes nothing");
}

#[test]
fn a_thread_that_hangs_owes_a_sign_of_life_until_it_goes_on() {
    let mut kernel = kernel();
    let (outbox, thread) = start(kernel.device().unwrap(), backend_from_env());
    let pulse = outbox.pulse();
    let begun = Instant::now();
    for _ in 0..4 {
        kernel.submit(&[4, 0, 250, 0, 0, 0], Data::None).unwrap();
    }
    std::thread::sleep(Duration::from_millis(100));
    pulse.ask();
    pulse.ask();
    if begun.elapsed() < Duration::from_millis(200) {
        assert!(!pulse.is_answered(), "nobody can have answered");
    }
    wait_for(&pulse);
    outbox.send(Message::Stop);
    thread.join().unwrap().unwrap();
}
