/* Flags in memory that processes share: their alignment, and the waits for them. */
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

/* ---- The table of waiting: module.c exports it as WAITING, and Python's own waits read it there. ---- */

/* After this long a waiting rank may oversleep a little: from then on it sleeps after every 16th poll. Not after
 * each: some MPI libraries progress a message by a small piece a poll, and sleeps would be most of its time. */
#define PATIENCE_SECONDS 0.01
#define SLEEP_SECONDS 50e-6
#define POLLS_A_SLEEP 16
/* After this long a waiting rank asks whether the process that it waits for is alive. */
#define SUSPICION_SECONDS 0.5
/* The longest wait that keeps Python from handling a signal, or from progressing other channels. */
#define SLICE_SECONDS 0.05
/* A yield that takes this long: another process had the core, which is oversubscribed. */
#define TAKEN_SECONDS 100e-6
/* There the next polls sleep, about 0.2 s of them, before the core is offered by a yield again. */
#define CROWDED_SLEEP_SECONDS 100e-6
#define CROWDED_SLEEPS 1000
/* Polls of a flag before the core is offered: about 10 µs where each rank has its own core, little where not. */
#define SPINS 200
#define SPINS_CROWDED 20
/* The sleep of a progress thread between two polls. Shorter ones take the core from the computation, longer ones
 * leave the network idle; 1 ms is a thirtieth of a 4 MiB bucket at 1 Gbit/s. */
#define PROGRESS_SECONDS 1e-3

/* The polls and the time of one wait; zeros at first, and `waited` again after each progress. */
struct patience {
    unsigned waited;
    double began;
};

static inline double seconds_now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

/* Back off between two polls of a flag: `spins` times with the core held, then with a yield, at last with sleeps.
 * False when `limit_seconds` have passed since the first yield. */
static inline bool be_patient(struct patience *patience, unsigned spins, double limit_seconds) {
    if (++patience->waited < spins) {
        PAUSE();
        return true;
    }
    if (patience->waited == (spins > 0 ? spins : 1))
        patience->began = seconds_now();
    sched_yield();
    if (patience->waited % POLLS_A_SLEEP == 0) {
        const double seconds = seconds_now() - patience->began;
        if (seconds > limit_seconds)
            return false;
        if (seconds > PATIENCE_SECONDS)
            nanosleep(&(struct timespec){0, (long)(1e9 * SLEEP_SECONDS)}, NULL);
    }
    return true;
}

#endif
