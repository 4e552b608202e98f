/* A page-fault handler in C, in a process of its own, for bench/device.py to compare with.
 *
 *   uffd continue BYTES FD              for each line CHUNK: ns of UFFDIO_CONTINUE over BYTES of the memfd FD, whose frames are
 *                                       ready, CHUNK bytes per call (0: one call)
 *   uffd latency N same|two|free|spin   N lines: ns of a load of a new page
 *
 * In both, the client opens and registers the userfaultfd, maps a memfd, and hands the descriptor to the handler, which is
 * another process, as in prefault. The first command gets the memfd from prefault, so that both map the same frames: their
 * placement in memory makes a difference of 15 %.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define SMALL 4096UL
#define HUGE_2M (2UL << 20)
#define MESSAGES 16

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static void check(int good, const char *what)
{
	if (!good)
		die(what);
}

static int64_t now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

/* Return the nth CPU that this process may use, or the last one if there are fewer. */
static int nth_cpu(int n)
{
	cpu_set_t set;
	int found = 0;
	check(!sched_getaffinity(0, sizeof set, &set), "sched_getaffinity");
	for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
		if (CPU_ISSET(cpu, &set)) {
			found = cpu;
			if (!n--)
				break;
		}
	return found;
}

static void pin(int cpu)
{
	cpu_set_t set;
	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	check(!sched_setaffinity(0, sizeof set, &set), "sched_setaffinity");
}

static void send_fd(int socket, int fd, uint64_t address)
{
	char room[CMSG_SPACE(sizeof fd)] = { 0 };
	struct iovec data = { &address, sizeof address };
	struct msghdr message = { .msg_iov = &data, .msg_iovlen = 1, .msg_control = room, .msg_controllen = sizeof room };
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);
	header->cmsg_level = SOL_SOCKET;
	header->cmsg_type = SCM_RIGHTS;
	header->cmsg_len = CMSG_LEN(sizeof fd);
	memcpy(CMSG_DATA(header), &fd, sizeof fd);
	check(sendmsg(socket, &message, 0) == sizeof address, "sendmsg");
}

static int receive_fd(int socket, uint64_t *address)
{
	int fd;
	char room[CMSG_SPACE(sizeof fd)];
	struct iovec data = { address, sizeof *address };
	struct msghdr message = { .msg_iov = &data, .msg_iovlen = 1, .msg_control = room, .msg_controllen = sizeof room };
	check(recvmsg(socket, &message, 0) == sizeof *address && CMSG_FIRSTHDR(&message), "recvmsg");
	memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof fd);
	return fd;
}

/* Map the frames, register them, and notify the handler. Runs in the client. */
static char *map_frames(int frames, uint64_t bytes, int socket)
{
	struct uffdio_api api = {
		.api = UFFD_API,
		.features = UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MINOR_SHMEM | UFFD_FEATURE_MISSING_HUGETLBFS
			| UFFD_FEATURE_MINOR_HUGETLBFS,
	};
	char *memory = mmap(NULL, bytes + HUGE_2M, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	check(memory != MAP_FAILED, "mmap");
	memory = (char *)(((uintptr_t)memory + HUGE_2M - 1) & ~(HUGE_2M - 1));
	memory = mmap(memory, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE | MAP_FIXED, frames, 0);
	check(memory != MAP_FAILED, "mmap");
	int uffd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
	check(uffd >= 0 && !ioctl(uffd, UFFDIO_API, &api), "userfaultfd");
	struct uffdio_register range = {
		.range = { (uintptr_t)memory, bytes },
		.mode = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR,
	};
	check(!ioctl(uffd, UFFDIO_REGISTER, &range), "UFFDIO_REGISTER");
	send_fd(socket, uffd, (uintptr_t)memory);
	return memory;
}

static void continue_run(int uffd, uint64_t start, uint64_t length)
{
	struct uffdio_continue run = { .range = { start, length } };
	check(!ioctl(uffd, UFFDIO_CONTINUE, &run) && run.mapped == (int64_t)length, "UFFDIO_CONTINUE");
}

/* Fork. Returns 0 in the client, which ends with its parent. */
static pid_t fork_client(int sockets[2])
{
	check(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, sockets), "socketpair");
	pid_t client = fork();
	check(client >= 0, "fork");
	if (!client)
		prctl(PR_SET_PDEATHSIG, SIGKILL);
	close(sockets[client ? 1 : 0]);
	return client;
}

static int measure_continue(uint64_t bytes, int frames)
{
	int sockets[2];
	char turn, line[64];
	uint64_t start;

	if (!fork_client(sockets)) {
		char *memory = map_frames(frames, bytes, sockets[1]);
		while (read(sockets[1], &turn, 1) == 1) {
			check(!madvise(memory, bytes, MADV_DONTNEED), "MADV_DONTNEED");
			check(write(sockets[1], &turn, 1) == 1, "write");
		}
		exit(0);
	}
	int uffd = receive_fd(sockets[0], &start);
	while (fgets(line, sizeof line, stdin)) {
		uint64_t chunk = strtoull(line, NULL, 10);
		if (!chunk)
			chunk = bytes;
		turn = 1;
		check(write(sockets[0], &turn, 1) == 1 && read(sockets[0], &turn, 1) == 1, "client");
		int64_t began = now_ns();
		for (uint64_t at = 0; at < bytes; at += chunk)
			continue_run(uffd, start + at, chunk < bytes - at ? chunk : bytes - at);
		printf("%lld\n", (long long)(now_ns() - began));
		fflush(stdout);
	}
	close(sockets[0]);
	wait(NULL);
	return 0;
}

static void measure_loads(volatile char *memory, long count)
{
	int64_t *took = malloc(count * sizeof *took);
	check(took != NULL, "malloc");
	memset(took, 0, count * sizeof *took);
	for (long i = 0; i < count; i++) {
		int64_t began = now_ns();
		(void)memory[i * SMALL];
		took[i] = now_ns() - began;
	}
	for (long i = 0; i < count; i++)
		printf("%lld\n", (long long)took[i]);
	fflush(stdout);
}

/* Supply each faulting page: copy 4 KiB into its frame, then map it. */
static void answer(int uffd, int socket, char *frames, uint64_t start, int spin)
{
	static char content[SMALL];
	struct uffd_msg messages[MESSAGES];
	struct pollfd polled[2] = { { uffd, POLLIN, 0 }, { socket, POLLIN, 0 } };
	memset(content, 0x5a, sizeof content);
	for (unsigned long turn = 0;; turn++) {
		if (!spin || turn % 4096 == 0) {
			check(poll(polled, 2, spin ? 0 : -1) >= 0, "poll");
			if (polled[1].revents)
				return;
		}
		ssize_t got = read(uffd, messages, sizeof messages);
		check(got > 0 || errno == EAGAIN, "read");
		for (ssize_t i = 0; i < got / (ssize_t)sizeof *messages; i++) {
			uint64_t address = messages[i].arg.pagefault.address & ~(SMALL - 1);
			memcpy(frames + (address - start), content, SMALL);
			continue_run(uffd, address, SMALL);
		}
	}
}

static int measure_latency(long count, const char *placement)
{
	uint64_t bytes = count * SMALL, start;
	int frames = memfd_create("frames", MFD_CLOEXEC), sockets[2];
	check(frames >= 0 && !ftruncate(frames, bytes), "memfd_create");
	int spin = !strcmp(placement, "spin"), same = !strcmp(placement, "same"), two = !strcmp(placement, "two");
	if (!spin && !same && !two && strcmp(placement, "free")) {
		fprintf(stderr, "unknown placement: %s\n", placement);
		return 2;
	}
	int first = nth_cpu(0), second = nth_cpu(1);
	if (!fork_client(sockets)) {
		if (same || two)
			pin(first);
		measure_loads(map_frames(frames, bytes, sockets[1]), count);
		exit(0);
	}
	if (same || two)
		pin(same ? first : second);
	char *view = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, frames, 0);
	check(view != MAP_FAILED, "mmap");
	int uffd = receive_fd(sockets[0], &start);
	answer(uffd, sockets[0], view, start, spin);
	int status;
	check(wait(&status) > 0, "wait");
	return status != 0;
}

int main(int argc, char **argv)
{
	if (argc == 4 && !strcmp(argv[1], "continue"))
		return measure_continue(strtoull(argv[2], NULL, 10), atoi(argv[3]));
	if (argc == 4 && !strcmp(argv[1], "latency"))
		return measure_latency(strtol(argv[2], NULL, 10), argv[3]);
	fprintf(stderr, "usage: uffd continue BYTES FD | uffd latency N same|two|free|spin\n");
	return 2;
}
