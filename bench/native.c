/* The bare system calls, timed in C, for bench/measures.py and bench/cliffs.py to compare with. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/types.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

static int64_t now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

/* Return ns of one MADV_POPULATE_WRITE over the range; -1 on failure. */
int64_t populate_ns(void *start, size_t length)
{
	int64_t began = now_ns();
	if (madvise(start, length, MADV_POPULATE_WRITE))
		return -1;
	return now_ns() - began;
}

/* Return ns of writing a byte of each page. */
int64_t touch_ns(volatile char *start, size_t length)
{
	int64_t began = now_ns();
	for (size_t at = 0; at < length; at += 4096)
		start[at] = 0;
	return now_ns() - began;
}

/* Return ns of one call per page: even pages are populated writable, odd ones readable. */
int64_t populate_alternating_ns(char *start, size_t pages)
{
	int64_t began = now_ns();
	for (size_t page = 0; page < pages; page++)
		if (madvise(start + page * 4096, 4096, page & 1 ? MADV_POPULATE_READ : MADV_POPULATE_WRITE))
			return -1;
	return now_ns() - began;
}

/* Return ns of one MADV_DONTNEED per page. */
int64_t discard_each_ns(char *start, size_t pages)
{
	int64_t began = now_ns();
	for (size_t page = 0; page < pages; page++)
		if (madvise(start + page * 4096, 4096, MADV_DONTNEED))
			return -1;
	return now_ns() - began;
}

/* Return ns of reading the pagemap entries of a range and counting its present pages. */
int64_t read_pagemap_ns(uintptr_t start, size_t length)
{
	static uint64_t entries[1 << 16];
	off_t at = start / 4096 * 8, stop = at + length / 4096 * 8;
	volatile uint64_t present = 0;
	int64_t began = now_ns();
	int fd = open("/proc/self/pagemap", O_RDONLY);
	while (fd >= 0 && at < stop) {
		size_t wanted = stop - at < (off_t)sizeof entries ? (size_t)(stop - at) : sizeof entries;
		ssize_t got = pread(fd, entries, wanted, at);
		if (got <= 0)
			return -1;
		for (ssize_t i = 0; i < got / 8; i++)
			present += entries[i] >> 63;
		at += got;
	}
	close(fd);
	return now_ns() - began;
}

struct region { uint64_t start, end, categories; };
struct scan { uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages, inverted, mask, any_of, returned; };

/* Return ns of a PAGEMAP_SCAN that answers as prefault.residency does, and of adding up the present bytes. */
int64_t scan_ns(uintptr_t start, size_t length)
{
	static struct region regions[1024];
	volatile uint64_t present = 0;
	uintptr_t stop = start + length;
	int64_t began = now_ns();
	int fd = open("/proc/self/pagemap", O_RDONLY);
	while (fd >= 0 && start < stop) {
		struct scan scan = {
			.size = sizeof scan, .start = start, .end = stop, .vec = (uintptr_t)regions, .vec_len = 1024,
			.any_of = 0x118, .returned = 0x1ff,
		};
		long count = ioctl(fd, 0xC0606610, &scan);
		if (count < 0)
			return -1;
		for (long i = 0; i < count; i++)
			present += regions[i].end - regions[i].start;
		start = count < 1024 ? stop : regions[count - 1].end;
	}
	close(fd);
	return now_ns() - began;
}
