/* Flags in memory that processes share: where they lie, and how one waits for them. */
#ifndef MPILLM_FLAGS_H
#define MPILLM_FLAGS_H

#include <sched.h>
#include <stdbool.h>
#include <time.h>

/* Two cache lines: processors fetch them in pairs, and a flag that shares one with another's is slow for both. */
#define LINE_BYTES 128

#if defined(__x86_64__)
#define PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define PAUSE() __asm__ volatile("isb")
#else
#define PAUSE() __asm__ volatile("" ::: "memory")
#endif

/* Who has waited this long may oversleep a little. */
#define PATIENCE_SECONDS 0.01
#define NAP_NANOSECONDS 50000

/* How long one has waited; zeros at first, and `waited` again whenever something moved. */
struct patience {
    unsigned waited;
    double began;
};

static inline double seconds_now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

/* Between two looks at a flag: `spins` times with the core held, then with it offered to others, at last with naps.
 * Whether to look again: not when `limit_seconds` have passed since the core was first offered. */
static inline bool be_patient(struct patience *patience, unsigned spins, double limit_seconds) {
    if (++patience->waited < spins) {
        PAUSE();
        return true;
    }
    if (patience->waited == (spins > 0 ? spins : 1))
        patience->began = seconds_now();
    sched_yield();
    if (patience->waited % 16 == 0) {
        const double seconds = seconds_now() - patience->began;
        if (seconds > limit_seconds)
            return false;
        if (seconds > PATIENCE_SECONDS)
            nanosleep(&(struct timespec){0, NAP_NANOSECONDS}, NULL);
    }
    return true;
}

#endif
