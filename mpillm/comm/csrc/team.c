/*
 * The team's memory: a line of flags a rank, then a staging buffer a rank. A rank's only flag counts
 * how often it has published. Publishing is a release store, and reading a flag an acquire load, so
 * a reader of the flag sees all that the rank wrote before. All ranks run the same operations in the
 * same order and publish equally often. The only wait is therefore "all others have published as
 * often as I have".
 *
 * An array is cut into a block a rank, blocks into pieces; piece i of every block makes up chunk i.
 * A chunk takes three steps. Each rank writes into its staging buffer what others need of it; each
 * sums its own block's piece; each reads the others' sums. Ranks publish after each step that others
 * wait for.
 *
 * A staging buffer has two halves, which chunks use in turns. A rank writes into a half only after a
 * wait within the chunk before, and the others reach that point only after they have read the half.
 * So two halves replace a barrier at the end of each chunk.
 */
#define _GNU_SOURCE
#include "team.h"

#include <string.h>

/* The most that one call of progress moves, so that a poll between computations stays short. */
#define PROGRESS_BYTES ((size_t)1 << 20)

/* On AMD EPYC a copy by `rep movsb` runs at a third of its speed where dst - src is 1 to 31 modulo
 * 4096 (page aliasing, glibc bug 30994); collectives of private arrays took 2.5 times as long.
 * Arrays start near the start of a page as a rule, so staging buffers are offset by half a page. */
#define PAGE_BYTES ((size_t)4096)

static size_t staging_offset(int size) {
    return ((size_t)size * LINE_BYTES + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES + PAGE_BYTES / 2;
}

size_t team_bytes(int size, size_t staging_bytes) { return staging_offset(size) + (size_t)size * HALVES * staging_bytes; }

static _Atomic uint64_t *flag_of(const struct team *team, int rank) {
    return (_Atomic uint64_t *)(void *)(team->memory + (size_t)rank * LINE_BYTES);
}

static void publish(struct team *team) {
    team->published++;
    /* Release: pairs with the acquire in `awaited`. */
    atomic_store_explicit(flag_of(team, team->rank), team->published, memory_order_release);
}

int awaited(const struct team *team) {
    for (int rank = 0; rank < team->size; rank++)
        if (atomic_load_explicit(flag_of(team, rank), memory_order_acquire) < team->published)
            return rank;
    return -1;
}

/* ---- offsets ---- */

size_t piece_elements(const struct team *team, int blocks, enum element element) {
    /* Whole cache lines of 64 bytes, so that no two blocks share one. */
    return team->staging_bytes / (size_t)blocks / 64 * 64 / itemsize_of(element);
}

static int blocks_of(const struct operation *op) { return op->flat || op->kind == BROADCAST ? 1 : op->team->size; }

/* As block_bounds in algorithms/schedule.py: both sides must cut alike. */
static size_t bound(const struct operation *op, int block, int blocks) {
    const size_t whole = op->count / (size_t)blocks, rest = op->count % (size_t)blocks;
    return whole * (size_t)block + rest * (size_t)block / (size_t)blocks;
}

/* The current piece of a block: its offsets in bytes in the array and in a half of the staging
 * buffer, and its elements. */
struct place {
    size_t offset, staged, n;
};

static struct place place_of(const struct operation *op, int block) {
    const int blocks = blocks_of(op);
    const size_t itemsize = itemsize_of(op->element), most = piece_elements(op->team, blocks, op->element);
    const size_t first = bound(op, block, blocks) + op->piece * most, stop = bound(op, block + 1, blocks);
    const size_t left = first < stop ? stop - first : 0;
    return (struct place){first * itemsize, (size_t)block * most * itemsize, left < most ? left : most};
}

static unsigned char *staging_of(const struct team *team, int rank) {
    const size_t half = (size_t)rank * HALVES + team->chunks % HALVES;
    return team->memory + staging_offset(team->size) + half * team->staging_bytes;
}

static bool is_last_piece(const struct operation *op) {
    const int blocks = blocks_of(op);
    const size_t longest = op->count / (size_t)blocks + (op->count % (size_t)blocks != 0);
    return (op->piece + 1) * piece_elements(op->team, blocks, op->element) >= longest;
}

/* ---- the steps ---- */

static void write_block(const struct operation *op, int block) {
    const struct place place = place_of(op, block);
    memcpy(staging_of(op->team, op->team->rank) + place.staged, op->source + place.offset,
           place.n * itemsize_of(op->element));
}

/* Copy the piece of block `staged_block` from the staging buffer of `rank` to `block` in the target. */
static void read_block(const struct operation *op, int rank, int staged_block, int block) {
    const struct place from = place_of(op, staged_block), to = place_of(op, block);
    memcpy(op->target + to.offset, staging_of(op->team, rank) + from.staged, to.n * itemsize_of(op->element));
}

static void keep_own_block(const struct operation *op) {
    const struct place place = place_of(op, op->team->rank);
    if (op->target != NULL && op->target != op->source)
        memcpy(op->target + place.offset, op->source + place.offset, place.n * itemsize_of(op->element));
}

/* Sum this rank's piece over all ranks, into its target and its staging buffer as the kind needs. */
static void reduce_own(const struct operation *op) {
    const struct team *team = op->team;
    const int block = op->flat ? 0 : team->rank;
    const struct place place = place_of(op, block);
    const unsigned char *sources[MOST_ROWS];
    unsigned char *targets[2];
    int n_targets = 0;
    /* The own source is read in place: its copy in the staging buffer is for the others. */
    for (int rank = 0; rank < team->size; rank++)
        sources[rank] = staging_of(team, rank) + place.staged;
    sources[team->rank] = op->source + place.offset;
    if (op->target != NULL)
        targets[n_targets++] = op->target + place.offset;
    if (!op->flat && op->kind != REDUCE_SCATTER)
        targets[n_targets++] = staging_of(team, team->rank) + place.staged;
    if (n_targets > 0)
        reduce_rows(sources, team->size, targets, n_targets, place.n, op->element, op->reduction, op->scale);
}

static void write_step(const struct operation *op) {
    const struct team *team = op->team;
    if (op->flat || (op->kind == BROADCAST && team->rank == op->root))
        write_block(op, 0);
    else if (op->kind == ALLGATHER)
        write_block(op, team->rank);
    else if (op->kind != BROADCAST)
        /* Start at the right neighbour, so that not all ranks use one rank's memory at a time. */
        for (int turn = 1; turn < team->size; turn++)
            write_block(op, (team->rank + turn) % team->size);
}

static void read_step(const struct operation *op) {
    const struct team *team = op->team;
    if (op->target == NULL)
        return;
    if (op->kind == BROADCAST) {
        read_block(op, op->root, 0, 0);
        return;
    }
    for (int turn = 1; turn < team->size; turn++) {
        const int rank = (team->rank + turn) % team->size;
        read_block(op, rank, op->kind == ALLTOALL ? team->rank : rank, rank);
    }
    if (op->kind == ALLTOALL || op->kind == ALLGATHER)
        keep_own_block(op);
}

static void end_chunk(struct operation *op) {
    op->done = is_last_piece(op);
    op->step = 0;
    op->piece++;
    op->team->chunks++;
}

/* Is there a third step, in which others read this rank's sums? */
static bool spreads_sums(const struct operation *op) {
    return !op->flat && (op->kind == ALLREDUCE || op->kind == REDUCE);
}

static void staged_step(struct operation *op) {
    switch (op->step) {
    case 0:
        write_step(op);
        publish(op->team);
        op->step = 1;
        return;
    case 1:
        if (op->kind == ALLREDUCE || op->kind == REDUCE_SCATTER || op->kind == REDUCE)
            reduce_own(op);
        else
            read_step(op);
        if (!spreads_sums(op)) {
            end_chunk(op);
            return;
        }
        publish(op->team);
        op->step = 2;
        return;
    default:
        read_step(op);
        end_chunk(op);
    }
}

/* The arrays are in shared memory, so no staging buffer is needed. Each rank works on its own block:
 * it sums the block over all source rows and pushes the sum into every target row (all-reduce) or
 * keeps it (reduce-scatter), or pushes its own block (all-gather). */
static void push_piece(const struct operation *op, size_t first, size_t n) {
    const struct team *team = op->team;
    const size_t offset = first * itemsize_of(op->element);
    const unsigned char *sources[MOST_ROWS];
    unsigned char *targets[MOST_ROWS];
    int n_sources = 0, n_targets = 0;
    for (int rank = 0; rank < team->size; rank++) {
        const bool own = rank == team->rank;
        if (op->kind != ALLGATHER)
            sources[n_sources++] = op->source_rows[rank] + offset;
        if (op->kind != REDUCE_SCATTER && !(op->kind == ALLGATHER && own && op->source == op->target))
            targets[n_targets++] = op->target_rows[rank] + offset;
    }
    if (op->kind == ALLGATHER)
        sources[n_sources++] = op->source + offset;
    if (op->kind == REDUCE_SCATTER)
        targets[n_targets++] = op->target + offset;
    if (n_targets > 0)
        reduce_rows(sources, n_sources, targets, n_targets, n, op->element, op->reduction, op->scale);
}

static void push_step(struct operation *op) {
    struct team *team = op->team;
    const size_t most = PROGRESS_BYTES / itemsize_of(op->element);
    const size_t first = bound(op, team->rank, team->size) + op->piece * most;
    const size_t stop = bound(op, team->rank + 1, team->size);
    if (op->step == 1 && first < stop) {
        push_piece(op, first, stop - first < most ? stop - first : most);
        op->piece++;
        return;
    }
    if (op->step < 2)
        publish(team);
    else
        op->done = true;
    op->step++;
}

/* Take one step of the operation, if it need not wait; whether it moved. */
static bool step(struct operation *op) {
    /* The first step needs no wait: the half it writes to is free, see the top of the file. */
    const bool begins = op->step == 0;
    /* Later pieces of a push need none either: all ranks had published before the first piece. */
    const bool pushes_on = op->pushes && op->step == 1 && op->piece > 0;
    if (!begins && !pushes_on && awaited(op->team) >= 0)
        return false;
    if (op->kind == BARRIER) {
        if (begins)
            publish(op->team);
        op->done = !begins;
        op->step = 1;
    } else if (op->pushes) {
        push_step(op);
    } else {
        staged_step(op);
    }
    return true;
}

void start(struct operation *op) {
    struct team *team = op->team;
    op->step = 0;
    op->piece = 0;
    op->started = true;
    op->done = false;
    op->next = NULL;
    if (team->first == NULL)
        team->first = op;
    else
        team->last->next = op;
    team->last = op;
}

static bool progress_alone(struct team *team) {
    struct operation *op = team->first;
    if (op == NULL || !step(op))
        return false;
    if (op->done)
        team->first = op->next;
    return true;
}

bool progress(struct team *team) {
    /* Another thread makes progress already: do not wait for it. */
    if (atomic_flag_test_and_set_explicit(&team->busy, memory_order_acquire))
        return false;
    const bool moved = progress_alone(team);
    atomic_flag_clear_explicit(&team->busy, memory_order_release);
    return moved;
}

bool drive(struct operation *op, double limit_seconds, unsigned spins) {
    struct patience patience = {0};
    while (!op->done) {
        if (progress(op->team))
            patience.waited = 0;
        else if (!be_patient(&patience, spins, limit_seconds))
            return false;
    }
    return true;
}
