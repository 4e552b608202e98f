/* The bare system calls, timed in C: what bench/measures.py compares with. */
#define _GNU_SOURCE
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>
#include <time.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

static int64_t now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

/* Nanoseconds of one MADV_POPULATE_WRITE over the range; -1 on failure. */
int64_t populate_ns(void *start, size_t length)
{
	int64_t began = now_ns();
	if (madvise(start, length, MADV_POPULATE_WRITE))
		return -1;
	return now_ns() - began;
}
