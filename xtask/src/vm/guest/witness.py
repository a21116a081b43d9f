"""witness.py DEVICE MIB: writes numbers that only grow into one MiB of the disk, from MIB on, until /tmp/witness.enough is there, and finds in
each sector the last one that was answered: an older one that comes back is found, which fio's checksums take for good. Four
threads have a quarter each and a command under way. Writes are of 1 to 32 sectors, often over one another at once, so that a write that
is done a second time after a later one shows; COMPARE AND WRITE (SBC-4 5.3) compares with what is there, and would find a miscompare if it were done twice.
The last line says what was done, or what went wrong.
"""
import ctypes, fcntl, mmap, os, random, struct, sys, threading, time

DEVICE, MIB = sys.argv[1], int(sys.argv[2])
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


class Quarter(threading.Thread):
    """One thread's sectors, and the number that each has to have."""

    def __init__(self, which):
        super().__init__(daemon=True)
        self.rng, self.first = random.Random(f"{time.time_ns()} {which}"), FIRST + which * EACH
        self.numbers, self.number, self.wrong = [0] * EACH, 0, None
        self.writes = self.reads = self.compared = 0
        self.buffer = mmap.mmap(-1, EACH * SECTOR)

    def run(self):
        try:
            self.write(0, EACH)
            while not os.path.exists(ENOUGH):
                self.step()
                time.sleep(0.002)
            self.read(0, EACH)
        except Exception as e:
            self.wrong = e

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
        with memoryview(self.buffer)[:len(data)] as view:
            if os.pwritev(disk, [view], (self.first + at) * SECTOR) != len(data):
                raise Exception("a write is short")
        self.numbers[at:at + count] = [self.number] * count
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
        io = SgIo(ord("S"), SG_DXFER_TO_DEV, 16, 64, 0, 2 * SECTOR, address(data), address(cdb), address(sense), 200_000)
        fcntl.ioctl(disk, SG_IO, io)
        if io.status or io.host_status or io.driver_status & ~8:
            raise Exception(f"COMPARE AND WRITE of sector {lba}, {self.numbers[at]} to {self.number + 1}: status {io.status:#x}, host {io.host_status:#x}, "
                            f"driver {io.driver_status:#x}, sense {sense.raw[:io.sb_len_wr].hex()}")
        self.number += 1
        self.numbers[at] = self.number
        self.compared += 1


quarters = [Quarter(which) for which in range(THREADS)]
for quarter in quarters:
    quarter.start()
for quarter in quarters:
    quarter.join()
wrong = [str(quarter.wrong) for quarter in quarters if quarter.wrong]
total = lambda what: sum(getattr(quarter, what) for quarter in quarters)
print("failed: " + "; ".join(wrong) if wrong else f"witness: {total('writes')} writes, {total('reads')} reads, {total('compared')} compared and written")
sys.exit(bool(wrong))
