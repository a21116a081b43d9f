/*
 * The least that a handler of target_core_user can do: spin on the ring, move the data of READ(10) and WRITE(10) with one
 * system call, tell the kernel. It checks nothing, keeps no record of what is under way, and is nobody's storage. `cargo
 * xtask bench vm` measures it beside the others, for what it leaves over is the kernel's and fio's and no handler gets below.
 *
 * bare-loop /dev/uioN BLOCKS [FILE]: without FILE data are not moved at all. Blocks are of 512 bytes.
 */
#define _GNU_SOURCE
#define iovec kernel_iovec /* The header's, which the C library has as well. */
#include <linux/target_core_user.h>
#undef iovec
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define MOST_PIECES 256
#define SPIN_NS 2000000

static int device, image = -1;
static unsigned long long blocks;
static struct tcmu_mailbox *mailbox;

static void *at(__u64 offset)
{
	return (char *)mailbox + offset;
}

static long long now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

/* SCSI status of a command that has been done. */
static int execute(struct tcmu_cmd_entry *entry)
{
	const unsigned char *cdb = at(entry->req.cdb_off);
	unsigned char *data = at(entry->req.iov[0].iov_base ? (__u64)entry->req.iov[0].iov_base : 0);
	size_t room = entry->req.iov_cnt ? entry->req.iov[0].iov_len : 0;
	struct iovec pieces[MOST_PIECES];
	unsigned i, count = entry->req.iov_cnt;
	__u64 last = __builtin_bswap64(blocks - 1);
	__u32 last32 = __builtin_bswap32(blocks - 1), size = __builtin_bswap32(512), lba;
	ssize_t done;

	switch (cdb[0]) {
	case 0x28: /* READ(10) */
	case 0x2a: /* WRITE(10) */
		if (image < 0)
			return 0;
		if (count > MOST_PIECES)
			return 2;
		for (i = 0; i < count; i++) {
			pieces[i].iov_base = at((__u64)entry->req.iov[i].iov_base);
			pieces[i].iov_len = entry->req.iov[i].iov_len;
		}
		memcpy(&lba, cdb + 2, 4);
		lba = __builtin_bswap32(lba);
		done = cdb[0] == 0x28 ? preadv(image, pieces, count, lba * 512LL)
				      : pwritev(image, pieces, count, lba * 512LL);
		return done < 0 ? 2 : 0;
	case 0x12: /* INQUIRY: no vital product data */
		memset(data, 0, room);
		if (cdb[1] & 1) {
			data[1] = cdb[2];
			return 0;
		}
		memcpy(data, "\0\0\5\2\37\0\0\0BARE    LOOP            0001", room < 36 ? room : 36);
		return 0;
	case 0x25: /* READ CAPACITY(10) */
		memcpy(data, &last32, 4);
		memcpy(data + 4, &size, 4);
		return 0;
	case 0x9e: /* READ CAPACITY(16) */
		memset(data, 0, room);
		memcpy(data, &last, 8);
		memcpy(data + 8, &size, 4);
		return 0;
	case 0x1a: /* MODE SENSE(6) */
		memset(data, 0, room);
		data[0] = 3;
		return 0;
	case 0x00: /* TEST UNIT READY */
	case 0x35: /* SYNCHRONIZE CACHE(10) */
		return 0;
	default:
		return 2;
	}
}

static void answer(struct tcmu_cmd_entry *entry)
{
	int status = execute(entry);

	entry->rsp.scsi_status = status;
	if (status) { /* ILLEGAL REQUEST, INVALID COMMAND OPERATION CODE */
		memset(entry->rsp.sense_buffer, 0, 18);
		memcpy(entry->rsp.sense_buffer, "\x70\0\5\0\0\0\0\x0a\0\0\0\0\x20", 13);
	}
}

int main(int argc, char **argv)
{
	char path[128];
	unsigned long size;
	__u32 tail, word = 0;
	FILE *file;

	if (argc < 3)
		return 2;
	device = open(argv[1], O_RDWR | O_NONBLOCK);
	blocks = strtoull(argv[2], NULL, 10);
	if (argc > 3 && (image = open(argv[3], O_RDWR)) < 0)
		return 1;
	snprintf(path, sizeof(path), "/sys/class/uio/%s/maps/map0/size", strrchr(argv[1], '/') + 1);
	file = fopen(path, "r");
	if (device < 0 || !file || fscanf(file, "%lx", &size) != 1)
		return 1;
	mailbox = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, device, 0);
	if (mailbox == MAP_FAILED)
		return 1;
	for (;;) {
		int worked = 0, looks = 0;
		long long until;

		tail = mailbox->cmd_tail;
		while (tail != __atomic_load_n(&mailbox->cmd_head, __ATOMIC_ACQUIRE)) {
			struct tcmu_cmd_entry *entry = at(mailbox->cmdr_off + tail);

			if (tcmu_hdr_get_op(entry->hdr.len_op) == TCMU_OP_CMD)
				answer(entry);
			tail = (tail + tcmu_hdr_get_len(entry->hdr.len_op)) % mailbox->cmdr_size;
			__atomic_store_n(&mailbox->cmd_tail, tail, __ATOMIC_RELEASE);
			worked = 1;
		}
		if (worked && write(device, &word, 4) < 0)
			return 1;
		until = now() + SPIN_NS;
		while (tail == __atomic_load_n(&mailbox->cmd_head, __ATOMIC_ACQUIRE)) {
			if (++looks % 8 == 0)
				sched_yield();
			if (looks % 256 == 0 && now() > until) {
				struct pollfd doorbell = { device, POLLIN, 0 };

				poll(&doorbell, 1, -1);
				if (read(device, &word, 4) < 0)
					return 1;
				break;
			}
		}
	}
}
