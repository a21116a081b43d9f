"""job_rounds.py KIND DEVICE ROUNDS SEED PATIENCE: has one kind of job run to its end ROUNDS times on the LUN `r`, whose disk is DEVICE, while
two guests use the disk, and in every run gives the job orders at random, kills the daemon, or has the target's file system run full. Prints a line
for each round and, as the last one, what was done, as JSON. Anything that is not as it should be ends it with an error.

The disk: fio writes the first 8 MiB at queue depth 32 and verifies what it wrote, again and again; it reads as well, since
fio 3.33 that only writes takes an older block that comes back for a good one. The next MiB belongs to the witness, which writes one block after another, each with a number that only grows: so a copy
can be told to be of one moment (what had been answered before it is in it, what began after it is not). The second half is cold: nobody writes there
but between the jobs, and what it has to hold is known.
"""
import json, mmap, os, random, socket, struct, subprocess, sys, threading, time

KIND, DEVICE = sys.argv[1:3]
ROUNDS, SEED, PATIENCE = map(int, sys.argv[3:6])
NAME, MIB, BLOCK = "r", 1 << 20, 4096
SIZE, HOT, WITNESS, COLD = 24 * MIB, 8 * MIB, 8 * MIB, 12 * MIB
WITNESSES = MIB // BLOCK
LOG, MODEL, CHECKED = "/scratch/daemon.log", "/scratch/cold.model", "/scratch/checked.raw"
rng = random.Random(f"{SEED} {KIND}")
counts = {}
CANCELED = "Operation canceled"


def count(what, by=1):
    counts[what] = counts.get(what, 0) + by


def run(*words, ok=(0,)):
    done = subprocess.run(words, capture_output=True, text=True, timeout=120 * PATIENCE)
    if done.returncode not in ok:
        raise Exception(f"{' '.join(words)}: exit status {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def until(what, seconds, look):
    """Waits for `look` to give something."""
    end = time.monotonic() + seconds * PATIENCE
    while True:
        found = look()
        if found:
            return found
        if time.monotonic() > end:
            raise Exception(f"{what}: not within {seconds * PATIENCE} s")
        time.sleep(0.05)


class Gone(Exception):
    """The daemon has ended, or has not begun."""


class Qmp:
    def __init__(self):
        self.socket, self.lines, self.events = None, None, []

    def connect(self):
        s = socket.socket(socket.AF_UNIX)
        s.settimeout(60 * PATIENCE)
        s.connect("/run/tcmu-dif/qmp.sock")
        # Not for both: what a text file has read ahead, events perhaps, is dropped when it is written to.
        self.socket, self.lines = s, s.makefile("r")
        assert "QMP" in json.loads(self.lines.readline())
        self.ask("qmp_capabilities")

    def ask(self, execute, **arguments):
        """What the command returns, or its error as a string."""
        arguments = {name.replace("_", "-"): value for name, value in arguments.items() if value is not None}
        if self.lines is None:
            raise Gone("no connection")
        try:
            self.socket.sendall(json.dumps({"execute": execute, "arguments": arguments}).encode())
            while True:
                answer = json.loads(self.lines.readline())
                if "event" not in answer:
                    return answer["return"] if "return" in answer else answer["error"]["desc"]
                self.events.append(answer)
        except TimeoutError:
            raise Exception(f"no answer to {execute}")
        except (OSError, ValueError) as e:
            self.lines = None
            raise Gone(str(e))

    def do(self, execute, **arguments):
        """A command that has no reason to fail."""
        answer = self.ask(execute, **arguments)
        if isinstance(answer, str):
            raise Exception(f"{execute} {arguments}: {answer}")
        return answer


qmp = Qmp()


def alive(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def kill():
    pid = int(open("/run/tcmu-dif/daemon.pid").read())
    os.kill(pid, 9)
    count("kill -9")
    return pid


own = []


def start_again():
    """The daemon that was killed is started again, and the LUN serves."""
    qmp.lines = None
    pid = int(open("/run/tcmu-dif/daemon.pid").read())
    until("the end of the daemon", 30, lambda: not alive(pid))
    for daemon in own:
        daemon.poll()
    words = ["tcmu-dif", "daemon"]
    own.append(subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=open(LOG, "a"), stderr=subprocess.STDOUT, start_new_session=True))

    def serves():
        try:
            if qmp.lines is None:
                qmp.connect()
            return any(lun["name"] == NAME and lun["state"] == "online" for lun in qmp.do("query-luns"))
        except (Gone, OSError, AssertionError, ValueError):
            if own[-1].poll() is not None:
                raise Exception(f"the daemon has ended with {own[-1].returncode}")
            return False

    until("the LUN's return", 60, serves)


def asking(execute, **arguments):
    """`ask`, of the next daemon if this one is gone; then None, since it may have been done."""
    try:
        return qmp.ask(execute, **arguments)
    except Gone:
        start_again()
        return None


def asking_killed(killed, moment, execute, **arguments):
    """`asking`, which ends that moment, and if `killed` the daemon is killed at some moment of it or right after; the next one serves when this returns."""
    thread = killer(rng.uniform(0, 0.5)) if killed else None
    answer = asking(execute, **arguments)
    if moment:
        moment.over()
    if thread:
        thread.join()
        # It may have come after the answer.
        try:
            time.sleep(0.05)
            qmp.do("query-luns")
        except Gone:
            start_again()
    return answer


def chain():
    """The files of the LUN's chain, from the top down."""
    while True:
        try:
            images = [d["inserted"]["image"] for d in qmp.do("query-block") if d["device"] == NAME and "inserted" in d]
            break
        except Gone:
            start_again()
    files, image = [], images[0]
    while image:
        files.append(image["filename"])
        image = image.get("backing-image")
    return files


# -- The guests --

class Guests:
    """fio in one thread, the witness in another; what goes wrong in either is raised by `look`."""

    def __init__(self):
        self.wrong, self.over, self.runs, self.writes = None, False, 0, 0
        self.fio = None
        self.number, self.answered, self.begun = 0, [0] * WITNESSES, [0] * WITNESSES
        self.turn = threading.Lock()
        self.disk = os.open(DEVICE, os.O_RDWR | os.O_DIRECT)
        self.block = mmap.mmap(-1, BLOCK)
        self.all = mmap.mmap(-1, MIB)
        for at in range(WITNESSES):
            self.write(at)
        self.fio_once("--rw=write", "--randseed=1")
        self.threads = [threading.Thread(target=self.guard, args=(work,), daemon=True) for work in (self.fios, self.witness)]
        for thread in self.threads:
            thread.start()

    def guard(self, work):
        try:
            work()
        except Exception as e:
            self.wrong = e

    def fio_once(self, *how):
        words = ["fio", "--name=verify", f"--filename={DEVICE}", "--direct=1", "--ioengine=libaio", "--iodepth=32", "--thread", "--bs=4k", f"--size={HOT}",
                 "--verify=crc32c", "--verify_fatal=1", *how]
        self.fio = subprocess.Popen(words, cwd="/tmp", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        said = self.fio.communicate()[0]
        if self.fio.returncode != 0:
            raise Exception(f"fio met an error, {self.fio.returncode}:\n{said[-3000:]}")
        self.runs += 1

    def fios(self):
        seed = 2
        while not self.over:
            # By turns all is verified in the end, or some of it all the time.
            backlog = ["--verify_backlog=512"] if seed % 2 else []
            self.fio_once("--rw=randrw", "--rwmixread=30", f"--randseed={SEED * 1000 + seed}", *backlog)
            seed += 1

    def rest(self, on):
        """Has fio rest, in the middle of what it does."""
        try:
            self.fio.send_signal(19 if on else 18)
        except ProcessLookupError:
            pass

    def write(self, at):
        self.number += 1
        self.block[:] = struct.pack("<QQ", self.number, at) * (BLOCK // 16)
        self.begun[at] = self.number
        assert os.pwritev(self.disk, [self.block], WITNESS + at * BLOCK) == BLOCK
        self.answered[at] = self.number
        self.writes += 1

    def witness(self):
        places = random.Random(SEED)
        while not self.over:
            with self.turn:
                self.write(places.randrange(WITNESSES))
                at = places.randrange(WITNESSES)
                assert os.preadv(self.disk, [self.block], WITNESS + at * BLOCK) == BLOCK
                found = witnessed(self.block, 0)
                if found != self.answered[at]:
                    raise Exception(f"the LUN has lost a write: block {at} of the witness has {found}, and {self.answered[at]} was answered")
            time.sleep(0.004)

    def look(self):
        if self.wrong:
            raise self.wrong

    def check(self):
        """All that the LUN reads as, but for fio's part, is what was written."""
        self.look()
        with self.turn:
            assert os.preadv(self.disk, [self.all], WITNESS) == MIB
            found = [witnessed(self.all, at) for at in range(WITNESSES)]
            if found != self.answered:
                raise Exception(f"the LUN has lost writes: {[(at, f, a) for at, (f, a) in enumerate(zip(found, self.answered)) if f != a]}")
        whole = open(MODEL, "rb").read()
        for at in range(0, len(whole), MIB):
            assert os.preadv(self.disk, [self.all], COLD + at) == MIB
            if self.all[:] != whole[at:at + MIB]:
                raise Exception(f"the LUN's cold half is not what was written, in the MiB at {COLD + at}")

    def end(self):
        self.over = True
        for thread in self.threads:
            thread.join(120 * PATIENCE)
        self.look()


def witnessed(data, at):
    """The number that a block of the witness has; all of it must have it."""
    block = data[at * BLOCK:(at + 1) * BLOCK]
    number, place = struct.unpack_from("<QQ", block)
    if block != struct.pack("<QQ", number, place) * (BLOCK // 16):
        raise Exception(f"block {at} of the witness is torn: {block[:64]!r}")
    return number


def cold():
    """New data for the second half, with holes between; the guest's own, so that initiators have written them."""
    data = bytearray(rng.randbytes(SIZE - COLD))
    for _ in range(3):
        at = rng.randrange(0, len(data) - MIB, BLOCK)
        data[at:at + MIB] = bytes(MIB)
    open(MODEL, "wb").write(data)
    run("blkdiscard", "-o", str(COLD), "-l", str(SIZE - COLD), DEVICE)
    run("dd", f"if={MODEL}", f"of={DEVICE}", "bs=1M", f"seek={COLD // MIB}", "oflag=direct", "status=none")


class Moment:
    """What the witness had written by a moment that is told with `over`: not less than what was answered before, and nothing that began after it."""

    def __init__(self, guests):
        self.guests, self.least, self.most = guests, list(guests.answered), None

    def over(self):
        self.most = list(self.guests.begun)
        return self


# -- Images that nobody serves --

def is_format(path):
    return "qcow2" if path.endswith("qcow2") else "raw"


def check_image(path, moment=None, leaks=True):
    """qemu-img finds no fault, all tuples match, and what QEMU reads is what the LUN was at that moment."""
    kind = is_format(path)
    if kind == "qcow2":
        report = json.loads(run("qemu-img", "check", "--output=json", "-f", kind, path, ok=(0, 2, 3)))
        found = {what: report.get(what, 0) for what in ("corruptions", "leaks", "check-errors")}
        count("leaked clusters", found["leaks"])
        if found["corruptions"] or found["check-errors"] or (found["leaks"] and not leaks):
            raise Exception(f"qemu-img check of {path}: {report}")
    if moment is None:
        return
    # No job is under way now, and fio would only be in the way.
    moment.guests.rest(True)
    try:
        compare(path, kind, moment)
    finally:
        moment.guests.rest(False)


def compare(path, kind, moment):
    run("tcmu-dif", "pi", "verify", path, "--json")
    if kind == "qcow2":
        run("qemu-img", "convert", "-f", kind, "-O", "raw", path, CHECKED)
    compare_bytes(CHECKED if kind == "qcow2" else path, moment, path)


def compare_bytes(raw, moment, path):
    with open(raw, "rb") as f:
        f.seek(WITNESS)
        data = f.read(MIB)
        for at in range(WITNESSES):
            found = witnessed(data, at)
            if not moment.least[at] <= found <= moment.most[at]:
                raise Exception(f"{path}: block {at} of the witness has {found}, and should have {moment.least[at]} to {moment.most[at]}")
        f.seek(COLD)
        if f.read() != open(MODEL, "rb").read():
            raise Exception(f"{path}: the cold half is not what was written")
    run("fio", "--name=copy", f"--filename={raw}", "--readonly", "--ioengine=psync", "--rw=read", "--bs=4k", f"--size={HOT}", "--verify=crc32c", "--verify_fatal=1")
    count("images compared")


def remove(path):
    for file in (path, path + ".pi"):
        if os.path.exists(file):
            os.remove(file)


def ballast(leave):
    """Fills /small but for so many bytes."""
    lighten()
    fs = os.statvfs("/small")
    size = fs.f_bavail * fs.f_frsize - leave
    with open("/small/ballast", "wb") as f:
        os.posix_fallocate(f.fileno(), 0, max(size, 4096))


def lighten():
    if os.path.exists("/small/ballast"):
        os.remove("/small/ballast")


# -- A job on its way --

class Failed(Exception):
    """The job has ended with an error, as it should."""


def the_job():
    jobs = [job for job in qmp.do("query-block-jobs") if job["device"] == NAME]
    return jobs[0] if jobs else None


def plan(theme, first):
    """What is done to a job, and how long after what was done before: the round's theme, and others at random."""
    if first and theme != "full":
        verbs = [theme] + rng.choices(["pause", "speed", "cancel", "force", "kill"], [4, 4, 1, 1, 2], k=rng.randrange(3))
    else:
        verbs = rng.choices(["pause", "speed"], k=rng.randrange(2))
    rng.shuffle(verbs)
    return [(rng.expovariate(3), verb) for verb in verbs]


class Lead:
    """Leads a job that has begun to its end: what was planned is done to it, and `finish` when it is ready; `full` says that its target has no room yet."""

    def __init__(self, guests, orders, finish=None, full=False):
        self.guests, self.orders, self.finish, self.full = guests, orders, finish, full
        self.told_end, self.killed, self.completed, self.did = False, False, False, []

    def lead(self):
        """Gives the concluded job, or None if there is none: the daemon was killed."""
        end = time.monotonic() + 120 * PATIENCE
        due = time.monotonic() + (self.orders[0][0] if self.orders else 0)
        tired = time.monotonic() + 10
        resting = False
        qmp.events.clear()
        try:
            while True:
                self.guests.look()
                if resting:
                    self.guests.rest(True)
                if time.monotonic() > end:
                    raise Exception(f"the job does not end: {the_job()}")
                try:
                    job = the_job()
                    if job is None:
                        if not self.killed:
                            raise Exception("the job is gone")
                        return None
                    if job["status"] == "concluded":
                        if "error" not in job:
                            until("the event that the job has ended", 10, self.hears)
                        qmp.do("job-dismiss", id=NAME)
                        return job
                    if self.full and job["io-status"] == "nospace":
                        self.no_room()
                    elif self.orders and time.monotonic() >= due:
                        self.order(self.orders.pop(0)[1])
                        due = time.monotonic() + (self.orders[0][0] if self.orders else 0)
                    elif not self.orders and job["speed"]:
                        qmp.ask("block-job-set-speed", device=NAME, speed=0)
                    elif job["status"] == "ready" and not self.orders and self.finish and not self.told_end:
                        self.told_end = True
                        self.finish(self)
                    elif not job["ready"] and self.finish and time.monotonic() > tired and not resting:
                        # In the background it need not catch up with who writes faster than it copies: so that one rests.
                        resting = True
                        count("fio had to rest")
                except Gone:
                    # What it was told is gone with the daemon.
                    self.killed, self.told_end = True, False
                    start_again()
                if resting and self.told_end:
                    resting = False
                    tired = time.monotonic() + 10
                    self.guests.rest(False)
                time.sleep(0.03)
        finally:
            if resting:
                self.guests.rest(False)

    def hears(self):
        """Whether the job has told how it ended."""
        qmp.ask("query-version")
        told = [event["event"] for event in qmp.events if event["data"].get("device") == NAME]
        self.completed = "BLOCK_JOB_COMPLETED" in told
        return self.completed or "BLOCK_JOB_CANCELLED" in told

    def order(self, verb):
        self.did.append(verb)
        count(verb) if verb != "kill" else None
        if verb == "pause":
            qmp.ask("block-job-pause", device=NAME)
            time.sleep(rng.uniform(0.05, 0.8))
            # A pause outlives the daemon.
            while isinstance(asking("block-job-resume", device=NAME), type(None)):
                self.killed = True
        elif verb == "speed":
            qmp.ask("block-job-set-speed", device=NAME, speed=rng.choice([1, 3, 20]) * MIB)
        elif verb == "cancel":
            qmp.ask("block-job-cancel", device=NAME)
        elif verb == "force":
            qmp.ask("block-job-cancel", device=NAME, force=True)
        elif verb == "kill":
            kill()
            self.killed = True
            start_again()

    def no_room(self):
        """It has stopped, because the target's file system is full."""
        self.full = False
        count("stopped without room")
        self.did.append("stopped")
        if rng.random() < 0.7:
            lighten()
            qmp.ask("job-resume", id=NAME)
        else:
            qmp.ask("block-job-cancel", device=NAME, force=True)


def killer(seconds):
    """Kills the daemon so long from now, whatever is done then."""
    def later():
        time.sleep(seconds)
        try:
            kill()
        except (OSError, ValueError):
            pass

    thread = threading.Thread(target=later)
    thread.start()
    return thread


class Kind:
    """A kind of job, round after round."""
    themes = ["pause", "speed", "cancel", "force", "kill", "full"]

    def __init__(self, guests):
        self.guests, self.serial = guests, 0

    def path(self, folder, kind="qcow2"):
        self.serial += 1
        return f"{folder}/{KIND}-{self.serial}.{kind}"

    def prepare(self, theme):
        """Before the first run of a round."""

    def round(self, theme):
        """Has the job run until it has come to its end; gives what was done to it."""
        self.prepare(theme)
        did = []
        for attempt in range(12):
            full = theme == "full" and attempt == 0
            orders = plan(theme, attempt == 0)
            policy = rng.choice(["report", "stop", "enospc"]) if full else "report"
            self.before(full)
            answer = asking(**self.begin(policy))
            if isinstance(answer, str):
                raise Exception(f"the job does not begin: {answer}")
            self.moment.over()
            lead = Lead(self.guests, orders, self.finish, full)
            lead.killed = answer is None
            count("runs")
            job = lead.lead()
            lighten()
            did += lead.did
            if self.has_done(lead, job):
                return did
            ended = {"cancel", "force", "kill"} & set(lead.did)
            if job is None and not lead.killed:
                raise Exception("the job is lost")
            if job is not None and job.get("error", CANCELED) != CANCELED:
                without_room = full and "no space left" in job["error"]
                count("ended without room") if without_room else None
                if not (without_room or lead.killed and self.dies_with_the_daemon):
                    raise Exception(f"the job has ended with {job['error']!r}, and nobody had asked for that: {lead.did}")
                did += ["no room"] if without_room else []
            elif not ended and not lead.killed and "stopped" not in lead.did:
                raise Exception(f"the job has not done its work, and nobody had asked for that: {job}")
            self.after_nothing()
            did.append("again")
        raise Exception("the job does not come to its end")

    dies_with_the_daemon = False
    finish = None

    def before(self, full):
        if full:
            ballast(4 * MIB)
        self.moment = Moment(self.guests)

    def speed(self):
        return rng.choice([2, 4, 8]) * MIB

    def begin(self, policy):
        raise NotImplementedError

    def has_done(self, lead, job):
        raise NotImplementedError

    def after_nothing(self):
        """The run did not come to its end: what it leaves."""


class Mirror(Kind):
    def __init__(self, guests, mode):
        super().__init__(guests)
        self.mode, self.small = mode, False

    def before(self, full):
        super().before(full)
        self.small = full
        # Once in /small it does not stay: the LUN does not move to where room is scarce.
        self.to = self.path("/small" if full else "/scratch", rng.choice(["raw", "qcow2"]))
        self.leave = full or rng.random() < 0.2
        self.source = chain()[0]

    def begin(self, policy):
        return dict(execute="drive-mirror", device=NAME, target=self.to, format=is_format(self.to), sync="full", copy_mode=self.mode,
                    speed=self.speed(), on_target_error=policy, auto_dismiss=False)

    def finish(self, lead):
        self.moment = Moment(self.guests)
        qmp.ask("block-job-cancel" if self.leave else "block-job-complete", device=NAME)
        if rng.random() < 0.15:
            time.sleep(rng.uniform(0, 0.1))
            kill()

    def has_done(self, lead, job):
        self.moment.over()
        now = chain()[0]
        if now == self.to:
            # It has gone over: what it left is as it was in that moment.
            count("gone over")
            check_image(self.source, self.moment if lead.told_end and not lead.killed else Moment.over(self.anything()))
            remove(self.source)
            return True
        if now != self.source:
            raise Exception(f"the LUN has {now}")
        if lead.completed:
            count("left behind")
            # A kill may leak clusters.
            check_image(self.to, self.moment, leaks=lead.killed)
            remove(self.to)
            return True
        return False

    def anything(self):
        """The moment is not known: the daemon was killed when it came."""
        moment = Moment(self.guests)
        moment.least = [0] * WITNESSES
        return moment

    def after_nothing(self):
        check_image(self.to) if os.path.exists(self.to) else None
        remove(self.to)


class Backup(Kind):
    dies_with_the_daemon = True

    def before(self, full):
        super().before(full)
        self.to = self.path("/small" if full else "/scratch", rng.choice(["raw", "qcow2"]))

    def begin(self, policy):
        return dict(execute="drive-backup", device=NAME, target=self.to, format=is_format(self.to), sync="full",
                    speed=self.speed(), on_target_error=policy, auto_dismiss=False)

    def has_done(self, lead, job):
        if not lead.completed:
            return False
        check_image(self.to, self.moment, leaks=False)
        remove(self.to)
        return True

    def after_nothing(self):
        check_image(self.to) if os.path.exists(self.to) else None
        remove(self.to)


class Increment(Backup):
    """The bitmap's first backup is a full one; so is the one after a kill, which makes the bitmap inconsistent. The others lie over the one before."""

    def prepare(self, theme):
        self.last = getattr(self, "last", None)
        self.kept = getattr(self, "kept", [])
        cold()

    def before(self, full):
        Kind.before(self, full)
        bitmaps = [b for d in qmp.do("query-block") if d["device"] == NAME for b in d.get("dirty-bitmaps") or d["inserted"].get("dirty-bitmaps", [])]
        if any(b.get("inconsistent") for b in bitmaps):
            qmp.do("block-dirty-bitmap-remove", node=NAME, name="increments")
            count("bitmaps inconsistent")
        if not bitmaps or any(b.get("inconsistent") for b in bitmaps):
            qmp.do("block-dirty-bitmap-add", node=NAME, name="increments", persistent=True)
            self.last = None
        if self.last is None:
            for path in self.kept:
                remove(path)
            self.kept = []
        self.to = self.path("/small" if full else "/scratch")
        if self.last:
            run("qemu-img", "create", "-q", "-f", "qcow2", "-b", self.last, "-F", "qcow2", self.to)
        self.moment = Moment(self.guests)

    def begin(self, policy):
        how = dict(sync="incremental", mode="existing") if self.last else dict(sync="full")
        return dict(execute="drive-backup", device=NAME, target=self.to, format="qcow2", bitmap="increments",
                    bitmap_mode=None if self.last else "on-success", speed=self.speed(), on_target_error=policy, auto_dismiss=False, **how)

    def has_done(self, lead, job):
        to, over = self.to, self.last
        if not lead.completed:
            return False
        check_image(to, self.moment, leaks=False)
        count("increments" if over else "full ones")
        self.kept.append(to)
        # What lies in /small is in the way there: the next one is a full one.
        self.last = None if to.startswith("/small") else to
        return True


class Snapshot(Kind):
    """Chains grow by a snapshot a round; the image that it leaves is compared with that moment. When the chain is long, a stream makes it short."""
    themes = ["kill", "plain", "full", "plain"]

    def round(self, theme):
        if len(chain()) > 8:
            old = chain()[1:]
            asking("block-stream", device=NAME, auto_dismiss=False)
            Lead(self.guests, []).lead()
            for path in old:
                remove(path)
        cold()
        did, source = [], chain()[0]
        if theme == "full":
            ballast(64 << 10)
            to = self.path("/small")
            answer = asking("blockdev-snapshot-sync", device=NAME, snapshot_file=to)
            lighten()
            if not isinstance(answer, str) or "no space left" not in answer.lower():
                raise Exception(f"a snapshot without room: {answer}")
            if os.path.exists(to) or os.path.exists(to + ".pi") or chain()[0] != source:
                raise Exception("a snapshot without room leaves something")
            did.append("no room")
            count("ended without room")
        while True:
            to = self.path("/scratch")
            self.moment = Moment(self.guests)
            killed = theme == "kill" and not did
            did += ["kill"] if killed else []
            answer = asking_killed(killed, self.moment, "blockdev-snapshot-sync", device=NAME, snapshot_file=to)
            if isinstance(answer, str):
                raise Exception(f"the snapshot is refused: {answer}")
            count("runs")
            if chain()[0] == to:
                check_image(source, self.moment)
                return did
            if answer is not None or chain()[0] != source:
                raise Exception(f"the LUN has {chain()}")
            remove(to)
            did.append("again")


class Internal(Kind):
    """Snapshots within the LUN's own image, taken and deleted while the guests go on; what QEMU reads in each is compared with its moment."""
    themes = ["kill", "plain", "kill a delete", "delete"]

    def internals(self):
        while True:
            try:
                images = [d["inserted"]["image"] for d in qmp.do("query-block") if d["device"] == NAME and "inserted" in d]
                return [s["name"] for s in images[0].get("snapshots", [])]
            except Gone:
                start_again()

    def order(self, killed, moment, execute, tag):
        """Has it done, perhaps with a kill at some moment of it; gives whether there was an answer."""
        answer = asking_killed(killed, moment, execute, device=NAME, name=tag)
        if isinstance(answer, str):
            raise Exception(f"{execute} of {tag} is refused: {answer}")
        count("runs")
        return answer is not None

    def round(self, theme):
        cold()
        self.tags = getattr(self, "tags", [])
        did, killed = [], theme == "kill"
        tag = f"s{counts.get('rounds', 0)}"
        while True:
            self.moment = Moment(self.guests)
            answered = self.order(killed, self.moment, "blockdev-snapshot-internal-sync", tag)
            did += ["kill"] if killed else []
            killed = False
            if self.internals() == self.tags + [tag]:
                break
            if answered or self.internals() != self.tags:
                raise Exception(f"the image has {self.internals()}, and had {self.tags}")
            did.append("again")
        self.tags.append(tag)
        self.check(tag)
        killed = theme == "kill a delete"
        while len(self.tags) > (1 if "delete" in theme else 4):
            tag = rng.choice(self.tags)
            answered = self.order(killed, None, "blockdev-snapshot-delete-internal-sync", tag)
            did.append("killed delete" if killed else "delete")
            killed = False
            if answered or tag not in self.internals():
                self.tags.remove(tag)
            if self.internals() != self.tags:
                raise Exception(f"the image has {self.internals()}, and should have {self.tags}")
            count("deleted")
        return did

    def check(self, tag):
        """What QEMU reads in it, beside the LUN that has the image."""
        self.guests.rest(True)
        try:
            run("qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw", "-l", f"snapshot.name={tag}", chain()[0], CHECKED)
            compare_bytes(CHECKED, self.moment, tag)
        finally:
            self.guests.rest(False)


class Stream(Kind):
    def prepare(self, theme):
        """An overlay, in /small if that is to run full: with all that the guests write in it already, so that only the stream wants more room."""
        lighten()
        full = theme == "full"
        self.source = chain()
        to = self.path("/small" if full else "/scratch")
        moment = Moment(self.guests)
        qmp.do("blockdev-snapshot-sync", device=NAME, snapshot_file=to)
        moment.over()
        check_image(self.source[0], moment)
        if full:
            self.guests.rest(True)
            time.sleep(1)
            with self.guests.turn:
                run("bash", "-c", f"dd if={DEVICE} of=/tmp/hot bs=1M count={(WITNESS + MIB) // MIB} iflag=direct status=none && dd if=/tmp/hot of={DEVICE} bs=1M oflag=direct status=none")
            self.guests.rest(False)

    def begin(self, policy):
        return dict(execute="block-stream", device=NAME, speed=self.speed(), on_error=policy, auto_dismiss=False)

    def has_done(self, lead, job):
        if len(chain()) > 1:
            return False
        for path in self.source:
            remove(path)
        return True


class Commit(Kind):
    """The base is in /small. Between the jobs it gives its cold half back, so that a commit needs room there."""

    def prepare(self, theme):
        lighten()
        run("blkdiscard", "-o", str(COLD), "-l", str(SIZE - COLD), DEVICE)
        self.base = chain()[-1]
        self.grow(theme)
        cold()

    def grow(self, theme):
        self.top = self.path("/scratch")
        qmp.do("blockdev-snapshot-sync", device=NAME, snapshot_file=self.top)

    def begin(self, policy):
        self.mode = rng.choice(["background", "write-blocking"])
        return dict(execute="block-commit", device=NAME, speed=self.speed(), on_error=policy, copy_mode=self.mode, auto_dismiss=False)

    def finish(self, lead):
        qmp.ask("block-job-complete", device=NAME)
        if rng.random() < 0.15:
            time.sleep(rng.uniform(0, 0.1))
            kill()

    def has_done(self, lead, job):
        now = chain()
        if now == [self.base]:
            remove(self.top)
            return True
        if now != [self.top, self.base]:
            raise Exception(f"the LUN has {now}")
        return False


class Intermediate(Commit):
    """The chain is base, what the LUN had, what is committed, and what the LUN has."""
    finish = None

    def grow(self, theme):
        if theme == "full" and len(chain()) > 1:
            # What lies over the base has given its cold half back, and the base has not.
            qmp.do("blockdev-snapshot-sync", device=NAME, snapshot_file=self.path("/scratch"))
            self.between = chain()[1:-1]
            qmp.do("block-commit", device=NAME, top=self.between[0], auto_dismiss=False)
            if "error" in Lead(self.guests, []).lead():
                raise Exception("the commit before has failed")
            self.forget()
        self.top = self.path("/scratch")
        qmp.do("blockdev-snapshot-sync", device=NAME, snapshot_file=self.top)
        self.between = chain()[:-1]

    def prepare(self, theme):
        super().prepare(theme)
        self.above = self.path("/scratch")
        moment = Moment(self.guests)
        qmp.do("blockdev-snapshot-sync", device=NAME, snapshot_file=self.above)
        check_image(self.top, moment.over())

    def begin(self, policy):
        return dict(execute="block-commit", device=NAME, top=self.top, speed=self.speed(), on_error=policy, auto_dismiss=False)

    def has_done(self, lead, job):
        now = chain()
        if now == [self.above, self.base]:
            self.forget()
            return True
        if now != [self.above, *self.between, self.base]:
            raise Exception(f"the LUN has {now}")
        return False

    def forget(self):
        for path in self.between:
            remove(path)


KINDS = {
    "mirror-background": lambda guests: Mirror(guests, "background"),
    "mirror-write-blocking": lambda guests: Mirror(guests, "write-blocking"),
    "backup-full": Backup,
    "backup-incremental": Increment,
    "snapshot": Snapshot,
    "internal-snapshot": Internal,
    "stream": Stream,
    "commit-active": Commit,
    "commit-intermediate": Intermediate,
}


def errors_of_the_guest(log):
    """What the kernel has said since the last look."""
    bad = []
    while True:
        try:
            line = os.read(log, 8192).decode(errors="replace")
        except BlockingIOError:
            break
        if any(word in line for word in ("check failed", "I/O error, dev", "Power-on or device reset", "timing out command")):
            bad.append(line)
    if bad:
        raise Exception("the guest's kernel has met errors: " + "".join(bad[:10]))


def main():
    log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    os.lseek(log, 0, os.SEEK_END)
    qmp.connect()
    guests = Guests()
    kind = KINDS[KIND](guests)
    try:
        cold()
        themes = []
        for number in range(1, ROUNDS + 1):
            if not themes:
                themes = list(kind.themes)
                rng.shuffle(themes)
            theme, began, writes, fios = themes.pop(), time.monotonic(), guests.writes, guests.runs
            did = kind.round(theme)
            guests.check()
            errors_of_the_guest(log)
            count("rounds")
            print(f"round {number}, {theme}: {' '.join(did) or 'nothing'}; {time.monotonic() - began:.1f} s, "
                  f"{guests.runs - fios} runs of fio, {guests.writes - writes} writes of the witness", flush=True)
        guests.end()
        guests.check()
        errors_of_the_guest(log)
        count("runs of fio", guests.runs)
        count("writes of the witness", guests.writes)
    except BaseException:
        guests.over = True
        guests.rest(False)
        try:
            print("at the end:", the_job(), chain(), qmp.events[-20:], file=sys.stderr)
        except Exception as e:
            print("at the end:", repr(e), file=sys.stderr)
        print(run("tail", "-n", "25", LOG), file=sys.stderr)
        raise
    print(json.dumps({"image": chain()[0], **counts}))


main()
