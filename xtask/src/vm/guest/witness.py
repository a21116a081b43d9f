"""witness.py DEVICE MIB [RECORD SEED]: writes numbers that only grow into one MiB of the disk, from MIB on, until /tmp/witness.enough is there, and finds in
each sector the last one that was answered: an older one that comes back is found, which fio's checksums take for good. Four
threads have a quarter each and a command under way. Writes are of 1 to 32 sectors, often over one another at once, so that a write that
is done a second time after a later one shows; COMPARE AND WRITE (SBC-4 5.3) compares with what is there, and would find a miscompare if it were done twice.
With a RECORD the disk may go away: a thread ends with its first I/O error, and the file then says which number was answered last of each sector, and which
was under way. One that is there already says what is to be found on the disk first, which may be another host's now. SEED chooses what is written.
The last line says what was done, or what went wrong.
"""
import ctypes, fcntl, json, mmap, os, random, struct, sys, threading, time

DEVICE, MIB = sys.argv[1], int(sys.argv[2])
RECORD = sys.argv[3] if len(sys.argv) > 3 else None
SEED = sys.argv[4] if len(sys.argv) > 4 else time.time_ns()
ENOUGH, THREADS = "/tmp/witness.enough", 4
BLKSSZGET, SG_IO, SG_DXFER_TO_DEV = 0x1268, 0x2285, -2
disk = os.open(DEVICE, os.O_RDWR | os.O_DIRECT)
SECTOR = struct.unpack("I", fcntl.ioctl(disk, BLKSSZGET, bytes(4)))[0]
FIRST, EACH = (MIB << 20) // SECTOR, (1 << 20) // SECTOR // THREADS
MOST = min(32, EACH)


class SgIo(ctypes.Structure):
    """struct sg_io_hdr of <scsi/sg.h>."""
    _fields_ = [("interface_id", ctypes.c_int), ("dxfer_direction", ctypes.c_int), ("cmd_len", ctypes.c_ubyte), ("mx_sb_len", ctypes.c_ubyte),
                ("iovec_count", ctypes.c_ushort), ("dxfer_len", ctypes.c_uint), ("dxferp", ctypes.c_void_p), ("cmdp", ctypes.c_void_p),
                ("sbp", ctypes.c_void_p), ("timeout", ctypes.c_uint), ("flags", ctypes.c_uint), ("pack_id", ctypes.c_int), ("usr_ptr", ctypes.c_void_p),
                ("status", ctypes.c_ubyte), ("masked_status", ctypes.c_ubyte), ("msg_status", ctypes.c_ubyte), ("sb_len_wr", ctypes.c_ubyte),
                ("host_status", ctypes.c_ushort), ("driver_status", ctypes.c_ushort), ("resid", ctypes.c_int), ("duration", ctypes.c_uint),
                ("info", ctypes.c_uint)]


def sector(number, at):
    return struct.pack("<QQ", number, at) * (SECTOR // 16)


def said(status, sense):
    """SENSE KEY, ADDITIONAL SENSE CODE and its qualifier of a CHECK CONDITION; zeros of anything else."""
    if status != 2 or len(sense) < 8:
        return 0, 0, 0
    key, asc, ascq = (sense[1], sense[2], sense[3]) if sense[0] & 0x7F >= 0x72 else (sense[2], sense[12], sense[13])
    return key & 15, asc, ascq


def not_now(status, sense):
    """A command that was not carried out and is to be sent again (SAM-6 5.3.1, SPC-6 4.4): BUSY, a unit attention, or a port in transition."""
    what = said(status, sense)
    return status == 8 or what[0] == 6 or what == (2, 4, 0x0A)


def is_gone(io, sense):
    """The disk has gone: a write would have ended with EIO. LOGICAL UNIT COMMUNICATION FAILURE is what the kernel ends commands with that nobody answers any more."""
    return io.host_status or said(io.status, sense) == (2, 8, 0)


class Quarter(threading.Thread):
    """One thread's sectors, and the number that each has to have."""

    def __init__(self, which):
        super().__init__(daemon=True)
        self.rng, self.first = random.Random(f"{SEED} {which}"), FIRST + which * EACH
        self.numbers, self.number, self.wrong = [0] * EACH, 0, None
        # What is under way: the first sector, how many, and their number. It stays there if it is never answered.
        self.under_way, self.gone, self.known = None, None, None
        self.writes = self.reads = self.compared = 0
        self.buffer = mmap.mmap(-1, EACH * SECTOR)

    def run(self):
        try:
            if self.known:
                self.find()
            self.write(0, EACH)
            while not os.path.exists(ENOUGH):
                self.step()
                time.sleep(0.002)
            self.read(0, EACH)
        except OSError as e:
            self.gone, self.wrong = e, None if RECORD else e
        except Exception as e:
            self.wrong = e

    def find(self):
        """Reads what the record tells of. What was under way when it ended may have been done or not."""
        self.numbers, self.number = list(self.known["numbers"]), self.known["number"] + 1
        with memoryview(self.buffer)[:EACH * SECTOR] as view:
            if os.preadv(disk, [view], self.first * SECTOR) != EACH * SECTOR:
                raise Exception("a read is short")
            first, count, number = self.known["under_way"] or (0, 0, 0)
            for i in range(EACH):
                found = bytes(view[i * SECTOR:(i + 1) * SECTOR])
                if first <= i < first + count and found == sector(number, self.first + i):
                    self.numbers[i] = number
                elif found != sector(self.numbers[i], self.first + i):
                    raise Exception(f"sector {self.first + i} has {struct.unpack_from('<QQ', found)}, and {self.numbers[i]} was answered last; {self.known['under_way']} was under way")
        self.reads += 1

    def step(self):
        count = self.rng.choice([1, 1, 2, 8, 8, 16, MOST])
        at = self.rng.randrange(EACH - count + 1)
        what = self.rng.random()
        if what < 0.3:
            self.read(at, count)
        elif what < 0.4:
            self.compare_and_write(at)
        else:
            # Some lie over one another.
            for _ in range(self.rng.choice([1, 1, 2, 3])):
                self.write(at, count)
                at = min(max(at + self.rng.randrange(-count, count + 1), 0), EACH - count)

    def write(self, at, count):
        self.number += 1
        data = b"".join(sector(self.number, self.first + i) for i in range(at, at + count))
        self.buffer[:len(data)] = data
        self.under_way = (at, count, self.number)
        with memoryview(self.buffer)[:len(data)] as view:
            if os.pwritev(disk, [view], (self.first + at) * SECTOR) != len(data):
                raise Exception("a write is short")
        self.numbers[at:at + count] = [self.number] * count
        self.under_way = None
        self.writes += 1

    def read(self, at, count):
        with memoryview(self.buffer)[:count * SECTOR] as view:
            if os.preadv(disk, [view], (self.first + at) * SECTOR) != count * SECTOR:
                raise Exception("a read is short")
            for i in range(count):
                found, want = bytes(view[i * SECTOR:(i + 1) * SECTOR]), self.numbers[at + i]
                if found != sector(want, self.first + at + i):
                    raise Exception(f"sector {self.first + at + i} has {struct.unpack_from('<QQ', found)}, and {want} was answered last, of {self.number}")
        self.reads += 1

    def compare_and_write(self, at):
        lba = self.first + at
        data = ctypes.create_string_buffer(sector(self.numbers[at], lba) + sector(self.number + 1, lba), 2 * SECTOR)
        cdb, sense = ctypes.create_string_buffer(struct.pack(">BBQ3xBBB", 0x89, 0, lba, 1, 0, 0), 16), ctypes.create_string_buffer(64)
        address = lambda buffer: ctypes.cast(buffer, ctypes.c_void_p)
        self.under_way = (at, 1, self.number + 1)
        while True:
            io = SgIo(ord("S"), SG_DXFER_TO_DEV, 16, 64, 0, 2 * SECTOR, address(data), address(cdb), address(sense), 200_000)
            fcntl.ioctl(disk, SG_IO, io)
            if not RECORD or io.host_status or not not_now(io.status, sense.raw[:io.sb_len_wr]):
                break
            time.sleep(0.05)
        if RECORD and is_gone(io, sense.raw[:io.sb_len_wr]):
            raise OSError(f"COMPARE AND WRITE: status {io.status:#x}, host status {io.host_status:#x}")
        if io.status or io.host_status or io.driver_status & ~8:
            raise Exception(f"COMPARE AND WRITE of sector {lba}, {self.numbers[at]} to {self.number + 1}: status {io.status:#x}, host {io.host_status:#x}, "
                            f"driver {io.driver_status:#x}, sense {sense.raw[:io.sb_len_wr].hex()}")
        self.number += 1
        self.numbers[at] = self.number
        self.under_way = None
        self.compared += 1


quarters = [Quarter(which) for which in range(THREADS)]
if RECORD and os.path.exists(RECORD):
    for quarter, known in zip(quarters, json.load(open(RECORD))):
        quarter.known = known
for quarter in quarters:
    quarter.start()
for quarter in quarters:
    quarter.join()
gone = {str(quarter.gone) for quarter in quarters if quarter.gone}
if gone:
    print("the disk has gone:", "; ".join(sorted(gone)))
if RECORD:
    with open(RECORD + ".new", "w") as to:
        json.dump([{"numbers": quarter.numbers, "number": quarter.number, "under_way": quarter.under_way} for quarter in quarters], to)
    os.rename(RECORD + ".new", RECORD)
wrong = [str(quarter.wrong) for quarter in quarters if quarter.wrong]
total = lambda what: sum(getattr(quarter, what) for quarter in quarters)
print("failed: " + "; ".join(wrong) if wrong else f"witness: {total('writes')} writes, {total('reads')} reads, {total('compared')} compared and written")
sys.exit(bool(wrong))
