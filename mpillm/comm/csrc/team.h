/* Collectives of the ranks of one node, in memory that they share. */
#ifndef MPILLM_TEAM_H
#define MPILLM_TEAM_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "arithmetic.h"
#include "flags.h"

/* The stage is used in two halves, in turns: see team.c. */
#define HALVES 2

enum kind { ALLREDUCE, REDUCE_SCATTER, ALLGATHER, BROADCAST, REDUCE, ALLTOALL, BARRIER, N_KINDS };

struct operation;

struct team {
    unsigned char *memory; /* team_bytes() of it, zero at first, the same on every rank */
    int rank, size;
    size_t stage_bytes;    /* of one half of one rank's stage */
    uint64_t published;    /* how often this rank has published */
    uint64_t chunks;       /* how many chunks went over the stage */
    struct operation *first, *last; /* started and not done, in order */
    atomic_flag busy;
};

struct operation {
    struct team *team;
    enum kind kind;
    enum element element;
    enum reduction reduction;
    double scale;
    int root;
    size_t count;
    const unsigned char *source; /* where element 0 of the whole array is, or would be */
    unsigned char *target;       /* likewise; NULL where this rank takes no result */
    /* Each rank's array, where all lie in shared memory; else NULL. */
    unsigned char *const *source_rows;
    unsigned char *const *target_rows;
    bool pushes;                 /* there are the rows that this kind needs to do without the stage */
    bool flat;                   /* every rank reads the whole arrays of all: one wait, for small ones */
    /* Where it stands. */
    int step;
    size_t piece;
    bool started;
    atomic_bool done;
    struct operation *next;
};

/* Bytes of shared memory for the flags and stages of `size` ranks. */
size_t team_bytes(int size, size_t stage_bytes);

/* Elements that one rank's half stage holds for each of `blocks` blocks. */
size_t piece_elements(const struct team *team, int blocks, enum element element);

void start(struct operation *operation);

/* Work on the team's operations, in order, as far as goes without waiting but one bounded piece at the most.
 * Returns whether anything moved. */
bool progress(struct team *team);

/* A rank for which this one waits, or -1. */
int awaited(const struct team *team);

/* Progress until `operation` is done or `limit_seconds` have passed; whether it is done. `spins`: how long to wait with
 * the core held before it is offered to others. */
bool drive(struct operation *operation, double limit_seconds, unsigned spins);

#endif
