//! Commands that wait, on a clock of the test's.

use proptest::prelude::*;

use super::*;

const SECOND: Duration = Duration::from_secs(1);

struct Clock {
    throttle: Throttle,
    rows: Rows<u32>,
    start: Instant,
    now: Instant,
    next: u32,
}

impl Clock {
    fn new(limits: &str) -> Clock {
        let now = Instant::now();
        let throttle = Throttle::new(Limits::default());
        throttle.set(limits.parse().unwrap(), now);
        Clock { throttle, rows: Rows::new(), start: now, now, next: 0 }
    }

    fn put(&mut self, writes: bool, bytes: u64) -> u32 {
        self.next += 1;
        self.rows.push(Cost { writes, bytes }, self.next, self.now);
        self.next
    }

    fn go(&mut self) -> Vec<u32> {
        let mut gone = Vec::new();
        self.rows.release(&self.throttle, false, self.now, |what| gone.push(what));
        gone
    }

    /// Turns the clock to each moment at which something is due, until all have passed; gives when each did.
    fn run(&mut self) -> Vec<(Duration, u32)> {
        let mut passed = Vec::new();
        while !self.rows.is_empty() {
            passed.extend(self.go().into_iter().map(|what| (self.now - self.start, what)));
            if let Some(due) = self.rows.due() {
                assert!(due > self.now, "whoever waits, waits for something");
                self.now = due;
            }
        }
        passed
    }
}

#[test]
fn commands_pass_in_their_order_at_the_rate() {
    let mut c = Clock::new("iops=10");
    for i in 0..20 {
        c.put(i % 3 == 0, 512);
    }
    let passed = c.run();
    let names: Vec<u32> = passed.iter().map(|(_, what)| *what).collect();
    assert_eq!(names, (1..=20).collect::<Vec<_>>());
    assert_eq!(passed.last().unwrap().0, SECOND * 19 / 10);
    let counts = c.throttle.get().counts;
    assert_eq!((counts.delayed, counts.waiting), (19, 0));
    assert_eq!(counts.waited, (1..20).map(|i| SECOND * i / 10).sum::<Duration>());
}

#[test]
fn reads_that_have_room_do_not_wait_for_writes_that_have_none() {
    let mut c = Clock::new("iops_wr=10,bps=1000000");
    let writes: Vec<u32> = (0..5).map(|_| c.put(true, 1)).collect();
    let reads: Vec<u32> = (0..5).map(|_| c.put(false, 1)).collect();
    let mut first = vec![writes[0]];
    first.extend(reads);
    assert_eq!(c.go(), first);
    assert_eq!(c.throttle.get().counts.waiting, 4);
}

#[test]
fn a_big_read_is_not_starved_by_small_writes_that_would_fit() {
    let mut c = Clock::new("bps=1000");
    c.put(true, 100);
    let big = c.put(false, 5000);
    assert_eq!(c.go().len(), 1);
    let small: Vec<u32> = (0..50).map(|_| c.put(true, 1)).collect();
    let passed = c.run();
    assert_eq!(passed[0], (SECOND / 10, big), "first come, first served, and once the bucket is empty");
    assert_eq!(passed.len(), 1 + small.len());
}

#[test]
fn a_long_command_counts_for_as_many_as_it_has_of_the_size() {
    let mut c = Clock::new("iops=10,iops_size=4096");
    for bytes in [40960, 512, 512] {
        c.put(false, bytes);
    }
    let at: Vec<Duration> = c.run().into_iter().map(|(at, _)| at).collect();
    assert_eq!(at, [Duration::ZERO, SECOND, SECOND * 11 / 10]);
}

#[test]
fn limits_that_change_count_at_once_and_those_that_stay_keep_what_has_passed() {
    let mut c = Clock::new("iops=10");
    for _ in 0..4 {
        c.put(false, 1);
    }
    assert_eq!(c.go(), [1]);
    assert!(!c.rows.may_go(&c.throttle));
    c.throttle.set("iops=10,bps=5".parse().unwrap(), c.now);
    assert!(c.rows.may_go(&c.throttle));
    assert!(c.go().is_empty(), "to set a limit again is no way around it");
    c.throttle.set("iops=20".parse().unwrap(), c.now);
    assert_eq!((c.go(), c.rows.due()), (vec![2, 3], Some(c.now + SECOND / 20)));
    c.throttle.set(Limits::default(), c.now);
    assert!(!c.throttle.is_on() && c.rows.may_go(&c.throttle));
    assert_eq!(c.go(), [4]);
}

#[test]
fn what_is_taken_back_costs_nothing_and_a_stop_lets_all_go() {
    let mut c = Clock::new("iops=10");
    for _ in 0..6 {
        c.put(true, 1);
    }
    assert_eq!(c.go(), [1]);
    assert_eq!(c.rows.take_if(|what| *what == 3), [3]);
    c.now += SECOND / 10;
    assert_eq!(c.go(), [2]);
    c.now += SECOND / 10;
    assert_eq!(c.go(), [4]);
    let mut gone = Vec::new();
    c.rows.release(&c.throttle, true, c.now, |what| gone.push(what));
    assert_eq!((gone, c.rows.due()), (vec![5, 6], None));
}

proptest! {
    #[test]
    fn over_any_window_each_limit_holds_and_everybody_passes_in_the_order_of_his_row(
        limits in prop::sample::select(vec![
            "iops=50", "bps=5000", "iops_rd=10,iops_wr=30", "bps_rd=3000,iops=40", "iops=20,iops_max=60,iops_max_length=2,bps_wr=4000",
        ]),
        commands in prop::collection::vec((any::<bool>(), 1u64..2000, 0u64..50), 1..80),
    ) {
        let mut c = Clock::new(limits);
        let mut passed = Vec::new();
        for (writes, bytes, pause) in &commands {
            let until = c.now + Duration::from_millis(*pause);
            while let Some(due) = c.rows.due().filter(|due| *due <= until) {
                c.now = due;
                passed.extend(c.go().into_iter().map(|what| (c.now - c.start, what)));
            }
            c.now = until;
            c.put(*writes, *bytes);
            passed.extend(c.go().into_iter().map(|what| (c.now - c.start, what)));
        }
        passed.extend(c.run());
        prop_assert_eq!(passed.len(), commands.len());
        for way in [false, true] {
            let row: Vec<u32> = passed.iter().map(|p| p.1).filter(|w| commands[*w as usize - 1].0 == way).collect();
            prop_assert!(row.is_sorted());
        }
        let set: Limits = limits.parse().unwrap();
        for ((_, of, way), rate) in ALL.into_iter().zip(set.rates).filter(|(_, r)| r.rate > 0) {
            let counted: Vec<(Duration, u64)> = passed.iter().filter_map(|(at, what)| {
                let (writes, bytes, _) = commands[*what as usize - 1];
                let mine = way == Way::Both || (way == Way::Write) == writes;
                mine.then_some((*at, if of == Of::Bytes { bytes } else { 1 }))
            }).collect();
            let room = if rate.max > 0 { rate.max * rate.length.max(1) } else { rate.rate / 10 };
            for from in 0..counted.len() {
                let mut sum = 0;
                for (at, units) in &counted[from..] {
                    sum += units;
                    let biggest = if of == Of::Bytes { 2000 } else { 1 };
                    let most = amount(room.max(biggest)) + u128::from(rate.rate) * (*at - counted[from].0).as_nanos();
                    prop_assert!(amount(sum) <= most);
                }
            }
        }
    }
}
