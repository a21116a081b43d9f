//! Chains under load, against the real kernel: snapshots, streams and commits while fio verifies what it writes.

use super::jobs::went_over_unnoticed;
use super::lun::{create_on_loopback, start_daemon};
use super::{Run, Test, witness};
use anyhow::{Context, Result, ensure};
use std::time::Duration;

pub const TESTS: &[Test] = &[Test {
    name: "jobs.chain-under-fio",
    promise: "a LUN's chain grows by snapshots and is shortened by streams and commits while fio verifies at QD32, with kill -9 before, in and after it: no I/O error, nothing lost",
    limit: 900,
    group: None,
    run: chain_under_fio,
}];

/// `chains.sh DEVICE KILLS`: two snapshots, then a stream and a commit by turns, round after round, for as long as fio writes and reads back what
/// it wrote; with KILLS 1 the daemon is killed and started again at a random moment of each round. Prints how many snapshots were taken, and how
/// many streams and commits came to their end.
const CHAINS: &str = r#"
device=$1 kills=$2 round=0 snapshots=0 streams=0 commits=0
back() {
    for _ in $(seq 600); do grep -q '"state": "online"' /run/tcmu-dif/luns/c.json 2>/dev/null && return; sleep 0.05; done
    echo "the LUN is not back after 30 s"; tail -n 20 /scratch/daemon.log; exit 1
}
fio --name=verify --filename=$device --direct=1 --ioengine=libaio --iodepth=32 --rw=randwrite --bs=4k --size=32M \
    --verify=crc32c --verify_fatal=1 --verify_backlog=512 --time_based --runtime=120 > /tmp/fio.txt 2>&1 &
fio=$!
while kill -0 $fio 2>/dev/null; do
    round=$((round + 1))
    if [ $kills = 1 ]; then
        (sleep 0.$((RANDOM % 10)); kill -9 $(cat /run/tcmu-dif/daemon.pid)
         setsid tcmu-dif daemon >> /scratch/daemon.log 2>&1 < /dev/null &) &
        killer=$!
    fi
    for i in 1 2; do
        timeout 60 tcmu-dif snapshot c /scratch/c-$round-$i.qcow2 > /tmp/snapshot.txt 2>&1 && snapshots=$((snapshots + 1)) ||
            [ $kills = 1 ] || { cat /tmp/snapshot.txt; exit 1; }
        sleep 0.2
    done
    if [ $((round % 2)) = 0 ]; then verb=stream; else verb=commit; fi
    if timeout 100 tcmu-dif $verb c > /tmp/$verb.txt 2>&1; then
        [ $verb = stream ] && streams=$((streams + 1)) || commits=$((commits + 1))
    elif [ $kills = 0 ]; then
        cat /tmp/$verb.txt; exit 1
    fi
    [ $kills = 1 ] && wait $killer
    back
    # A daemon that was killed meanwhile goes on with the job.
    for _ in $(seq 200); do
        jobs=$(timeout 60 tcmu-dif job list --json 2>/dev/null)
        case $jobs in
            '[]') break ;;
            *'"ready"'*) timeout 60 tcmu-dif job complete c > /dev/null 2>&1 ;;
        esac
        sleep 0.1
    done
done
wait $fio || { cat /tmp/fio.txt; exit 1; }
echo $snapshots $streams $commits
"#;

fn chain_under_fio(run: &mut Run<'_>) -> Result<()> {
    let guest = &mut *run.guest;
    start_daemon(guest, "auto")?;
    std::fs::write(guest.share().join("chains.sh"), CHAINS)?;
    for kills in [0, 1] {
        guest.sh("rm -f /scratch/c.* /scratch/c-*")?;
        let options = "--image /scratch/c.raw --size 48M --format raw --pi type1";
        let lun = create_on_loopback(guest, "c", options)?;
        let mark = guest.mark()?;
        let script = format!("bash /host/chains.sh {} {kills}", lun.device);
        witness::start(guest, &lun.device, 40)?;
        let done = guest
            .sh_within(Duration::from_secs(400), &script)
            .with_context(|| format!("with {kills} kills a round"))?;
        witness::end(guest).with_context(|| format!("with {kills} kills a round"))?;
        guest.note(format!("{kills} kills a round: snapshots, streams and commits: {}", done.trim()));
        let snapshots: u32 = done.split_whitespace().next().unwrap_or_default().parse()?;
        ensure!(snapshots >= 4, "{snapshots} snapshots");
        went_over_unnoticed(guest, &lun.device, "c", &mark, kills)?;
    }
    Ok(())
}
