/* Collectives of the ranks of one node, in memory that they share. */
#ifndef MPILLM_TEAM_H
#define MPILLM_TEAM_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "arithmetic.h"
#include "flags.h"

/* A staging buffer has two halves, used in turns: see team.c. */
#define HALVES 2

enum kind { ALLREDUCE, REDUCE_SCATTER, ALLGATHER, BROADCAST, REDUCE, ALLTOALL, BARRIER, N_KINDS };

struct operation;

struct team {
    unsigned char *memory; /* team_bytes() of it, zero at first, the same on every rank */
    int rank, size;
    size_t staging_bytes;  /* of one half of one rank's staging buffer */
    uint64_t published;    /* how often this rank has published: the value of its flag */
    uint64_t chunks;       /* chunks that went through the staging buffers */
    struct operation *first, *last; /* started and not done, in order */
    atomic_flag busy;      /* a spin lock: one thread makes progress at a time, others return */
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
    /* Each rank's array, where all are in shared memory; else NULL. */
    unsigned char *const *source_rows;
    unsigned char *const *target_rows;
    bool pushes;                 /* the rows are there that this kind needs to push */
    bool flat;                   /* every rank reads the whole arrays of all: one wait, for small ones */
    /* Its progress. */
    int step;
    size_t piece;
    bool started;
    atomic_bool done;
    struct operation *next;
};

/* Bytes of shared memory for the flags and staging buffers of `size` ranks. */
size_t team_bytes(int size, size_t staging_bytes);

/* Elements that one half of a staging buffer holds for each of `blocks` blocks. */
size_t piece_elements(const struct team *team, int blocks, enum element element);

void start(struct operation *operation);

/* Advance the team's oldest operation by one bounded step, if it need not wait.
 * Returns whether anything moved. */
bool progress(struct team *team);

/* A rank that this one waits for, or -1. */
int awaited(const struct team *team);

/* Make progress until `operation` is done or `limit_seconds` have passed; whether it is done.
 * `spins`: polls before the core is yielded. */
bool drive(struct operation *operation, double limit_seconds, unsigned spins);

#endif
