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

/// Answers with the second byte of the CDB; the first tells how: 1 sleeps that many milliseconds, 2 for ever,
/// 4 holds up the whole thread for that many milliseconds.
struct Echo {
    io: Io,
    running: Cell<usize>,
}

impl Service for Echo {
    async fn execute(self: Rc<Self>, command: Command) -> Completion {
        self.running.set(self.running.get() + 1);
        match command.cdb[0] {
            1 => self.io.sleep(Duration::from_millis(command.cdb[2].into())).await,
            2 => std::future::pending().await,
            3 => panic!("as it should"),
            4 => std::thread::sleep(Duration::from_millis(command.cdb[2].into())),
            _ => {}
        }
        command.data.fill(0, command.data.len(), command.cdb[1]);
        self.running.set(self.running.get() - 1);
        Completion::status(command.cdb[1] & 0xfe)
    }

    async fn background(self: Rc<Self>) {
        std::future::pending().await
    }

    async fn message(self: Rc<Self>, message: Message, load: Load) {
        if let Message::Resize(_, back) = message {
            assert!(load.in_flight >= self.running.get());
            let _ = back.send(Ok(()));
        }
    }
}

fn start(device: Device, backend: Backend) -> (Outbox, JoinHandle<Result<(), LoopError>>) {
    let (outbox, inbox) = inbox::channel().unwrap();
    let thread = std::thread::spawn(move || {
        let io = Io::new(backend).unwrap();
        let ring = Ring::attach(device).unwrap();
        let echo = Rc::new(Echo { io: io.clone(), running: Cell::new(0) });
        EventLoop::new(ring, io, Executor::new(), echo, inbox).run()
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
        kernel.queue(&[1, 0, 200, 0, 0, 0], Data::None).unwrap();
    }
    let waits = kernel.submit(&[0, 6, 0, 0, 0, 0], Data::None).unwrap();
    let (outbox, thread) = start(kernel.device().unwrap(), backend_from_env());
    std::thread::sleep(Duration::from_millis(50));
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
