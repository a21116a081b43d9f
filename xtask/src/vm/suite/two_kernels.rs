//! A LUN that goes from one kernel to another and back with its storage, over a network that two VMs share and TLS, under load, while the daemons are killed, the network is
//! cut, or the other host has no room.
//!
//! The disk of 32 MiB: 8 are cold (written once), one is the witness's, 8 are fio's at queue depth 32, and the rest is holes. Both writers go on until their disk is gone.

use super::super::guest::{Guest, Init, Net, patience};
use super::chance::{Fault, Rng};
use super::daemon::control;
use super::handover::read_reservations;
use super::initiator::{geometry, sum_of_range};
use super::job_rounds::seed;
use super::lun::{
    assert_nothing_left, create_on_loopback, daemon_pid, delete, names, show, start_daemon, stop_daemon,
};
use super::{Run, Test, witness};
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

pub const NAME: &str = "lifecycle.handover-two-kernels";

const LIMIT: u64 = 1800;

pub const TESTS: &[Test] = &[Test {
    name: NAME,
    promise: "a LUN goes to another kernel with its storage over TLS and a network, and back, whatever fails meanwhile: one of the two serves it, with all that was answered, its names, protection, mode pages and reservations",
    limit: LIMIT,
    group: None,
    run: two_kernels,
}];

const LUN: &str = "h";
const IMAGE: &str = "/scratch/h.qcow2";
const MIB: u64 = 1 << 20;
const SIZE: u64 = 32 * MIB;
const COLD: u64 = 8 * MIB;
/// In MiB.
const WITNESS: u32 = 8;
const FIO: &str = "--direct=1 --bs=4k --offset=9M --size=8M --verify=crc32c --verify_fatal=1";
const HOLES: u64 = 17 * MIB;
/// One export writes and holds a reservation, the other is registered nowhere.
const EXPORTS: [&str; 2] = ["naa.50014050000000a1", "naa.50014050000000b2"];
const CERTIFICATES: &str = "/etc/tcmu-dif/handover";
const PORT: u16 = 10810;

/// An export's disk.
#[derive(Clone, Debug)]
struct Disk {
    device: String,
    sg: String,
}

/// The disks of a LUN's exports, in the order of [`EXPORTS`].
fn disks(guest: &mut Guest) -> Result<[Disk; 2]> {
    let found = show(guest, LUN)?;
    let of = |wwn: &str| -> Option<Disk> {
        let export = found["exports"].as_array()?.iter().find(|export| export["wwn"] == wwn)?;
        Some(Disk { device: export["device"].as_str()?.to_owned(), sg: export["sg"].as_str()?.to_owned() })
    };
    let both = of(EXPORTS[0]).zip(of(EXPORTS[1])).with_context(|| format!("a disk is missing: {found}"))?;
    Ok([both.0, both.1])
}

/// What initiators are told of the disk, and the parts that nobody writes to.
fn facts(guest: &mut Guest, disks: &[Disk; 2]) -> Result<String> {
    let sg = &disks[0].sg;
    // Unit attentions are heard once.
    let mut told = guest.sh(&format!(
        "for sg in {sg} {}; do for _ in 1 2 3 4 5; do sg_turs $sg && break; done; sg_turs $sg; done
         for page in 0x80 0x83 0xb0 0xb1 0xb2; do sg_vpd --page=$page -H {sg}; done; sg_inq -H {sg}; sg_readcap --16 {sg}",
        disks[1].sg
    ))?;
    let (bytes, block) = geometry(guest, &disks[0].device)?;
    let page = control(guest, sg)?;
    told += &format!("\n{bytes} bytes in blocks of {block}, control mode page {page:#x}\n");
    told += &read_reservations(guest, sg)?;
    for (from, length) in [(0, COLD), (HOLES, SIZE - HOLES)] {
        told += &format!("\n{from}: {}", sum_of_range(guest, &disks[0].device, from, length)?);
    }
    Ok(told)
}

/// The state that `list` tells of the LUN, if it is there.
fn state(guest: &mut Guest) -> Result<Option<String>> {
    let list = guest.json("tcmu-dif list --json")?;
    let lun = list.as_array().and_then(|luns| luns.iter().find(|lun| lun["name"] == LUN).cloned());
    Ok(lun.map(|lun| lun["state"].as_str().unwrap_or_default().to_owned()))
}

/// Whether the LUN is served: the daemon says so, and a command is answered.
fn serves(guest: &mut Guest) -> Result<bool> {
    if daemon_pid(guest).is_err() || state(guest)?.as_deref() != Some("online") {
        return Ok(false);
    }
    // One that is being made or taken down has no disks.
    let Ok(disks) = disks(guest) else { return Ok(false) };
    let read = format!(
        "timeout {} dd if={} of=/dev/null bs=4k count=1 iflag=direct status=none",
        60 * patience(),
        disks[0].device
    );
    Ok(guest.try_sh(&read)?.status == Some(0))
}

/// Makes a CA for handovers and what both hosts need of it, as docs/nbd.md says.
fn make_certificates(at: &Path) -> Result<()> {
    fs::create_dir_all(at)?;
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes";
    let signed = "-CA ca-cert.pem -CAkey ca-key.pem -CAcreateserial -days 2";
    // ca-certificates, without which no artefact is downloaded, brings openssl along.
    let script = format!(
        "set -e
         openssl req -x509 {key} -days 2 -subj '/CN=handover CA' -addext keyUsage=critical,keyCertSign,cRLSign -keyout ca-key.pem -out ca-cert.pem
         openssl req {key} -subj /CN=hosts -keyout server-key.pem -out server.csr
         printf '%s\\n' keyUsage=digitalSignature extendedKeyUsage=serverAuth subjectAltName=IP:10.9.0.1,IP:10.9.0.2 > server.ext
         openssl x509 -req {signed} -in server.csr -extfile server.ext -out server-cert.pem
         openssl req {key} -subj /CN=hosts -keyout client-key.pem -out client.csr
         printf '%s\\n' keyUsage=digitalSignature extendedKeyUsage=clientAuth > client.ext
         openssl x509 -req {signed} -in client.csr -extfile client.ext -out client-cert.pem
         rm -f ca-key.pem *.csr *.ext *.srl"
    );
    crate::sh::quiet(Command::new("sh").args(["-c", &script]).current_dir(at))
        .context("the certificates were not made")
        .map(drop)
}

/// Makes the guest a host of its own on the network: 1 or 2.
fn become_host(guest: &mut Guest, number: usize) -> Result<()> {
    fs::write(guest.share().join("copied.py"), include_str!("../guest/copied.py"))?;
    // A side of a handover waits a minute for the other, and initiators with it.
    guest.sh(&format!(
        "[ -e /etc/machine-id ] || touch /etc/machine-id; printf '%032x\\n' {number} > /tmp/machine-id
         mount --bind /tmp/machine-id /etc/machine-id && hostname host-{number}
         echo 300 > /proc/sys/kernel/hung_task_timeout_secs
         mkdir -p {CERTIFICATES} && cp /host/tls/*.pem {CERTIFICATES} && chmod 600 {CERTIFICATES}/*-key.pem
         modprobe virtio_net; for _ in $(seq 50); do [ -n \"$(ls /sys/class/net | grep -vx lo)\" ] && break; sleep 0.1; done
         ls /sys/class/net | grep -vx lo > /tmp/card
         ip address add 10.9.0.{number}/24 dev $(cat /tmp/card) && ip link set $(cat /tmp/card) up"
    ))?;
    start_daemon(guest, "auto")
}

fn two_kernels(run: &mut Run<'_>) -> Result<()> {
    let (rounds, seed) = (run.scale.pick(1, 2, 20), seed()?);
    let name = format!("{NAME}/second");
    let mut second =
        Guest::boot_on(run.lab, Init::Script, Net::With(run.guest), &name, Duration::from_secs(LIMIT))?;
    let mut pair = Pair {
        guests: [&mut *run.guest, &mut second],
        at: 0,
        disks: None,
        facts: String::new(),
        rng: Rng(seed),
        counts: BTreeMap::new(),
        longest: Duration::ZERO,
        strict: true,
    };
    let result = pair.all(rounds).with_context(|| format!("{rounds} rounds, TCMU_DIF_SEED={seed}"));
    let (counts, longest) = (pair.counts, pair.longest);
    let result = result.and_then(|()| second.assert_healthy().context("the second host"));
    second.keep_logs();
    let counts: Vec<String> = counts.iter().map(|(what, count)| format!("{what} {count}")).collect();
    run.guest.note(format!("TCMU_DIF_SEED={seed}: {}", counts.join(", ")));
    run.guest.note(format!("the longest handover that went well took {:.1} s", longest.as_secs_f64()));
    result
}

/// Where the LUN is after a handover.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Now {
    /// It has gone over.
    There,
    /// It has served on.
    Here,
    /// The same, once somebody had looked where it is.
    TakenBack,
}

/// Both hosts.
struct Pair<'a> {
    guests: [&'a mut Guest; 2],
    /// Which has the LUN.
    at: usize,
    disks: Option<[Disk; 2]>,
    /// What has to stay as it is.
    facts: String,
    rng: Rng,
    counts: BTreeMap<String, u64>,
    longest: Duration,
    /// No daemon was killed with the image that there is now: it has no leaks.
    strict: bool,
}

impl Pair<'_> {
    fn source(&mut self) -> &mut Guest {
        self.guests[self.at]
    }

    fn destination(&mut self) -> &mut Guest {
        self.guests[1 - self.at]
    }

    fn disks(&self) -> Result<[Disk; 2]> {
        self.disks.clone().context("there is no disk yet")
    }

    fn count(&mut self, what: impl Into<String>, by: u64) {
        *self.counts.entry(what.into()).or_default() += by;
    }

    fn all(&mut self, rounds: usize) -> Result<()> {
        let made = self.guests[0].share().with_file_name("tls");
        make_certificates(&made)?;
        for guest in &self.guests {
            let there = guest.share().join("tls");
            fs::create_dir(&there)?;
            for file in fs::read_dir(&made)? {
                let file = file?;
                fs::copy(file.path(), there.join(file.file_name()))?;
            }
        }
        for number in [1, 2] {
            become_host(self.guests[number - 1], number)?;
        }
        self.begin().context("the LUN is made")?;
        self.first().context("the first handover")?;
        let mut faults = Vec::new();
        for round in 1..=rounds {
            if faults.is_empty() {
                faults = self.rng.faults();
            }
            let Some(fault) = faults.pop() else { continue };
            let from = self.at + 1;
            self.round(fault)
                .with_context(|| format!("round {round}, from host {from}: {}", fault.words()))?;
        }
        self.end().context("the end")
    }

    /// Makes the LUN, with everything of which it is looked whether it goes along.
    fn begin(&mut self) -> Result<()> {
        let seed = self.rng.next();
        let guest = &mut *self.guests[self.at];
        let exports = EXPORTS.map(|wwn| format!("--export loopback:{wwn}")).join(" ");
        create_on_loopback(
            guest,
            LUN,
            &format!("--image {IMAGE} --size {SIZE} --format qcow2 --pi type1 {exports}"),
        )?;
        let disks = disks(guest)?;
        let [Disk { device, sg }, other] = &disks;
        guest.sh(&format!(
            "python3 -c 'import random, sys; sys.stdout.buffer.write(random.Random({seed}).randbytes({COLD}))' > /tmp/cold
             dd if=/tmp/cold of={device} bs=1M oflag=direct status=none && rm /tmp/cold
             fio --name=lay --filename={device} --ioengine=libaio --iodepth=32 --rw=write --do_verify=0 {FIO} > /tmp/fio.txt
             sdparm --quiet --set=D_SENSE=1 {sg}
             sg_persist --out --no-inquiry --register-ignore --param-sark=0xa1 {sg}
             sg_persist --out --no-inquiry --reserve --param-rk=0xa1 --prout-type=5 {sg}"
        ))?;
        self.facts = facts(guest, &disks)?;
        ensure!(control(guest, sg)? & 4 != 0, "the mode page was not changed");
        ensure!(self.facts.contains("Key=0xa1"), "nobody is registered: {}", self.facts);
        self.conflicts(&other.sg.clone())?;
        self.disks = Some(disks);
        self.load()
    }

    /// Who is not registered cannot write.
    fn conflicts(&mut self, sg: &str) -> Result<()> {
        let answer = self
            .source()
            .try_sh(&format!("sg_raw -s 512 -i /dev/zero {sg} 2a 00 00 00 00 00 00 00 01 00 2>&1"))?;
        ensure!(
            answer.stdout.contains("Reservation Conflict") || answer.status == Some(24),
            "a write of who is not registered: {answer:?}"
        );
        Ok(())
    }

    /// Has the witness and fio write to the disk until that is gone.
    fn load(&mut self) -> Result<()> {
        let [disk, _] = self.disks()?;
        let (seed, fio_seed) = (self.rng.next(), self.rng.below(1 << 30));
        let guest = self.source();
        witness::start_recorded(guest, &disk.device, WITNESS, seed)?;
        guest.sh(&format!(
            "rm -f /tmp/fio.*; cat > /tmp/fio.sh <<'END'
echo $$ > /tmp/fio.pid
seed={fio_seed}
while [ -b {} ] && fio --name=load --allow_file_create=0 --filename={} --ioengine=libaio --iodepth=32 --thread --rw=randrw --rwmixread=30 --rate_iops=40,80 --verify_backlog=256 {FIO} --randseed=$seed
do seed=$((seed + 1)); done
END
             cd /tmp && setsid bash /tmp/fio.sh > /tmp/fio.txt 2>&1 < /dev/null &",
            disk.device, disk.device
        ))?;
        // Each sector has a number before anything else happens.
        guest
            .sh("sleep 1; for _ in $(seq 20); do [ -s /tmp/fio.pid ] && break; sleep 0.5; done; kill -0 $(cat /tmp/witness.pid) || { cat /tmp/witness.txt; exit 1; }")
            .map(drop)
    }

    fn writers_live(&mut self) -> Result<bool> {
        let source = self.source();
        let fio = source.sh("kill -0 $(cat /tmp/fio.pid) 2>/dev/null && echo yes || echo no")?;
        Ok(fio == "yes" && witness::lives(source)?)
    }

    /// The writers end, by themselves if their disk has gone; what they know goes where the disk is now.
    fn unload(&mut self, from: usize, gone: bool) -> Result<()> {
        let to = self.guests[1 - from].share();
        let guest = &mut *self.guests[from];
        let said = witness::ended(guest, !gone, gone.then_some(&*to))?;
        if !gone {
            guest.sh("kill -- -$(cat /tmp/fio.pid) 2>/dev/null || true")?;
        }
        guest.sh(
            "for _ in $(seq 600); do kill -0 $(cat /tmp/fio.pid) 2>/dev/null || break; sleep 0.1; done
             ! kill -0 $(cat /tmp/fio.pid) 2>/dev/null && ! grep -E 'verify: bad|verify failed|bad magic|type mismatch' /tmp/fio.txt",
        )
        .context("fio")?;
        let counts: Vec<u64> = said.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        self.count("answered writes of the witness", counts.first().copied().unwrap_or_default());
        Ok(())
    }

    /// Has the destination listen, and the source begin.
    fn start(&mut self, image: &str) -> Result<()> {
        let host = 2 - self.at;
        self.destination().sh(&format!(
            "rm -f /tmp/receive.*; cat > /tmp/receive.sh <<'END'
tcmu-dif receive --listen tls://0.0.0.0:{PORT} --tls-certificates {CERTIFICATES} --once --image {image} --json > /tmp/receive.json 2> /tmp/receive.err
echo $? > /tmp/receive.rc
END
             setsid bash /tmp/receive.sh > /dev/null 2>&1 < /dev/null &
             for _ in $(seq 300); do [ -n \"$(ss -Hltn sport = :{PORT})\" ] && exit 0; sleep 0.1; done; cat /tmp/receive.err; exit 1"
        ))?;
        self.source()
            .sh(&format!(
                "rm -f /tmp/handover.*; cat > /tmp/handover.sh <<'END'
tcmu-dif handover {LUN} --to tls://10.9.0.{host}:{PORT} --tls-certificates {CERTIFICATES} --copy-storage-all --json > /tmp/handover.json 2> /tmp/handover.err
echo $? > /tmp/handover.rc.new; mv /tmp/handover.rc.new /tmp/handover.rc
END
                 setsid bash /tmp/handover.sh > /dev/null 2>&1 < /dev/null &"
            ))
            .map(drop)
    }

    /// Waits until both sides have ended; gives back the source's exit status and what both said.
    fn over(&mut self) -> Result<(i32, String)> {
        let mut said = Vec::new();
        let mut status = 0;
        for (side, command) in [(1 - self.at, "receive"), (self.at, "handover")] {
            let text = self.guests[side]
                .sh_within(
                    Duration::from_secs(300),
                    &format!(
                        "for _ in $(seq 3000); do [ -s /tmp/{command}.rc ] && break; sleep 0.1; done; cat /tmp/{command}.rc /tmp/{command}.json /tmp/{command}.err"
                    ),
                )
                .with_context(|| format!("{command} does not end"))?;
            status = text.lines().next().and_then(|line| line.trim().parse().ok()).unwrap_or(-1);
            said.push(format!("{command}: {text}"));
        }
        Ok((status, said.join("\n")))
    }

    /// A handover in which nothing fails.
    fn goes_well(&mut self) -> Result<()> {
        let started = Instant::now();
        self.start(IMAGE)?;
        let (status, said) = self.over()?;
        ensure!(status == 0, "it has not gone over: {said}");
        self.longest = self.longest.max(started.elapsed());
        self.strict = true;
        let given: Value = self.source().json("cat /tmp/handover.json")?;
        ensure!(given["answered"] == true && given["left"].is_null() && given["image"] == IMAGE, "{given}");
        let made: Value = self.destination().json("cat /tmp/receive.json")?;
        ensure!(made["image"] == IMAGE, "{made}");
        self.count("handovers without a failure", 1);
        self.gone_over()
    }

    /// The first one: the image that stays is looked at as its administrator would.
    fn first(&mut self) -> Result<()> {
        self.goes_well()?;
        let old = self.destination();
        old.sh(&format!(
            "tcmu-dif image owner --take-over {IMAGE} && tcmu-dif pi verify {IMAGE} && rm {IMAGE} {IMAGE}.pi {IMAGE}.owner"
        ))
        .map(drop)
    }

    /// A handover in which something fails; if the LUN has not gone over, it does then.
    fn round(&mut self, fault: Fault) -> Result<()> {
        // What the one before has left there.
        self.destination().sh(&format!("rm -f {IMAGE} {IMAGE}.pi {IMAGE}.owner"))?;
        let image = if fault == Fault::NoRoom { "/small/h.qcow2" } else { IMAGE };
        if fault == Fault::NoRoom {
            let mebibytes = 2 + self.rng.below(12);
            self.destination()
                .sh(&format!("mkdir -p /small && mount -t tmpfs -o size={mebibytes}M tmpfs /small"))?;
        }
        self.start(image)?;
        self.inject(fault)?;
        let (status, said) = self.over()?;
        let now = self.settle(&said)?;
        self.count(fault.words(), 1);
        if now == Now::There {
            self.count("gone over all the same", 1);
            ensure!(fault != Fault::NoRoom, "it went where there is no room: {said}");
            return self.gone_over();
        }
        ensure!(status != 0, "handover says that it went well, and the LUN is not there: {said}");
        self.stayed(fault, image, &said, now == Now::TakenBack)?;
        self.goes_well().context("the next one, without a failure")
    }

    /// Does it, at a moment that chance chooses: while the LUN is copied, or when it stops, or somewhat later.
    fn inject(&mut self, fault: Fault) -> Result<()> {
        let (part, wait) = match self.rng.below(10) {
            0..6 => (self.rng.below(1000), 0),
            _ => (1000, self.rng.below(3000)),
        };
        if fault == Fault::NoRoom {
            return Ok(());
        }
        self.source().sh(&format!(
            "timeout 100 python3 /host/copied.py {LUN} {}.{:03}",
            part / 1000,
            part % 1000
        ))?;
        sleep(Duration::from_millis(wait));
        let cut = |seconds: u64| {
            format!("ip link set $(cat /tmp/card) down; sleep {seconds}; ip link set $(cat /tmp/card) up")
        };
        match fault {
            Fault::SourceKilled | Fault::DestinationKilled => {
                let side = if fault == Fault::SourceKilled { self.at } else { 1 - self.at };
                self.strict = false;
                stop_daemon(self.guests[side], "KILL")?;
                sleep(Duration::from_millis(self.rng.below(4000)));
                start_daemon(self.guests[side], "auto")
            }
            Fault::ReceiveKilled => {
                let kill = "pid=$(pgrep -fx 'tcmu-dif receive .*' || true); [ -z \"$pid\" ] || kill -9 $pid";
                self.destination().sh(kill).map(drop)
            }
            Fault::Cut => {
                let (side, seconds) = (self.rng.below(2) as usize, 1 + self.rng.below(12));
                self.guests[side].sh(&cut(seconds)).map(drop)
            }
            Fault::LongCut => {
                let (side, seconds) = (self.rng.below(2) as usize, 70 + self.rng.below(15));
                self.guests[side].sh_within(Duration::from_secs(200), &cut(seconds)).map(drop)
            }
            Fault::NoRoom => Ok(()),
        }
    }

    /// Finds out who has it now, as an administrator does, and helps where the source does not know. Never do both serve.
    fn settle(&mut self, said: &str) -> Result<Now> {
        let until = Instant::now() + Duration::from_secs(30) * patience();
        let mut served = [false; 2];
        while served == [false; 2] && Instant::now() < until {
            for side in [0, 1] {
                served[side] = serves(self.guests[side])?;
            }
            ensure!(served != [true; 2], "both serve it: {said}");
            let told = state(self.source())?;
            if served == [false; 2]
                && told.as_deref() == Some("failed")
                && state(self.destination())?.is_none()
            {
                break;
            }
            sleep(Duration::from_millis(500));
        }
        if served == [false; 2] {
            // Told that it is there, and not that it is: the other host has been looked at. One that was killed while it made the LUN leaves half of one, which nobody has used.
            if !names(self.destination())?.is_empty() {
                self.count("half of one deleted by hand at the destination", 1);
                self.destination().sh(&format!("tcmu-dif delete --force {LUN}"))?;
            }
            self.destination().sh(&format!("rm -f {IMAGE} {IMAGE}.*"))?;
            let reason = show(self.source(), LUN)?;
            ensure!(reason.to_string().contains("host-"), "nobody serves it: {reason}\n{said}");
            self.count("taken back by hand", 1);
            self.source().sh(&format!("tcmu-dif image owner --take-over {IMAGE}"))?;
            stop_daemon(self.source(), "TERM")?;
            start_daemon(self.source(), "auto")?;
            for _ in 0..60 {
                if serves(self.source())? {
                    return Ok(Now::TakenBack);
                }
                sleep(Duration::from_millis(500));
            }
            bail!("it does not serve though its image was taken back: {said}");
        }
        let went = served[1 - self.at];
        if went && !names(self.source())?.is_empty() {
            self.count("deleted by hand at the source", 1);
            self.source().sh(&format!("tcmu-dif delete --force {LUN}"))?;
        }
        Ok(if went { Now::There } else { Now::Here })
    }

    /// It serves where it was, and the destination has nothing of it.
    fn stayed(&mut self, fault: Fault, image: &str, said: &str, in_doubt: bool) -> Result<()> {
        let destination = self.destination();
        ensure!(names(destination)?.is_empty(), "the destination has a LUN: {said}");
        if fault != Fault::ReceiveKilled {
            let left = destination.sh(&format!("ls {image}* 2>/dev/null || true"))?;
            ensure!(left.is_empty(), "the destination has {left}: {said}");
        }
        if fault == Fault::NoRoom {
            ensure!(said.contains("space"), "it is not said what is missing: {said}");
            destination.sh("umount /small")?;
        }
        self.count("stayed, and went with the next", 1);
        let disks = self.disks()?;
        if !self.writers_live()? {
            // Only where it was down until somebody looked.
            ensure!(
                in_doubt,
                "the initiator met an error, and the LUN was here all the time: {}\n{said}",
                self.source().sh("cat /tmp/witness.txt; tail -n 20 /tmp/fio.txt")?
            );
            self.count("initiators that had to begin anew after that", 1);
            let at = self.at;
            self.unload(at, false)?;
            self.load()?;
        }
        let now = facts(self.source(), &disks)?;
        ensure!(now == self.facts, "it is another:\n{now}\nand was\n{}", self.facts);
        Ok(())
    }

    /// It has gone over: what is there is what was here, to the last answered write, and what stays here is served by nobody.
    fn gone_over(&mut self) -> Result<()> {
        let old = self.at;
        self.unload(old, true)?;
        let source = self.source();
        ensure!(names(source)?.is_empty(), "the source has it still");
        assert_nothing_left(source)?;
        let refused = source.try_sh(&format!("tcmu-dif create again --image {IMAGE} --pi type1 2>&1"))?;
        ensure!(refused.status == Some(1) && refused.stdout.contains("--take-over"), "{refused:?}");
        // Nothing was written since the source stopped: the old image is the disk, to the last byte.
        let left = source.sh(&format!(
            "qemu-img check -q -f qcow2 {IMAGE} || [ $? = 3 ]; qemu-img convert -f qcow2 -O raw {IMAGE} /scratch/left.raw
             sha256sum < /scratch/left.raw | cut -d' ' -f1; rm /scratch/left.raw"
        ))?;

        self.at = 1 - old;
        let guest = &mut *self.guests[self.at];
        let disks = disks(guest)?;
        let now = facts(guest, &disks)?;
        let here = sum_of_range(guest, &disks[0].device, 0, SIZE)?;
        ensure!(now == self.facts, "it is another:\n{now}\nand was\n{}", self.facts);
        ensure!(here == left, "the disk is not what the source had when it stopped");
        guest
            .sh(&format!(
                "fio --name=check --filename={} --readonly --ioengine=psync --rw=read {FIO} > /tmp/fio.txt || {{ cat /tmp/fio.txt; exit 1; }}",
                disks[0].device
            ))
            .context("what fio wrote")?;
        self.conflicts(&disks[1].sg)?;
        self.disks = Some(disks);
        // It looks first for what was answered before.
        self.load()?;
        self.count("gone over", 1);
        Ok(())
    }

    /// Takes the LUN down: it was good to the last block.
    fn end(&mut self) -> Result<()> {
        let at = self.at;
        self.unload(at, false)?;
        let (disks, strict) = (self.disks()?, self.strict);
        let now = facts(self.source(), &disks)?;
        ensure!(now == self.facts, "it is another:\n{now}\nand was\n{}", self.facts);
        let guest = self.source();
        delete(guest, LUN)?;
        let forgiven = if strict { "" } else { "|| [ $? = 3 ]" };
        guest.sh(&format!("qemu-img check -q -f qcow2 {IMAGE} {forgiven}; tcmu-dif pi verify {IMAGE}"))?;
        for guest in &mut self.guests {
            assert_nothing_left(guest)?;
        }
        Ok(())
    }
}
