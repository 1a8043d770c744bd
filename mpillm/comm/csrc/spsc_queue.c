/*
 * The memory: a line with the tail, a line with the head, then the slots. A slot is a line with the
 * message's length, then room for its bytes.
 *
 * Only the sender writes the tail, which counts pieces; only the receiver writes the head, which
 * counts messages. A message is copied in pieces, and each piece advances the tail. The receiver
 * therefore copies a long message out while its rest is still coming in. Message i is in slot
 * i modulo `slots`; the head's advance past it gives the slot back to the sender.
 */
#define _GNU_SOURCE
#include "spsc_queue.h"

#include <stdatomic.h>
#include <string.h>

#include "flags.h"

/* Long enough that the tail's cache line rarely moves between cores, short enough that both ends
 * soon copy at once, out of the second-level cache. */
#define PIECE_BYTES ((size_t)64 * 1024)

/* Whole lines, so that no slot shares a cache line with its neighbour. */
static size_t slot_stride(size_t slot_bytes) { return (slot_bytes + 2 * LINE_BYTES - 1) / LINE_BYTES * LINE_BYTES; }

size_t spsc_queue_bytes(size_t slots, size_t slot_bytes) { return 2 * LINE_BYTES + slots * slot_stride(slot_bytes); }

/* The tail and the head have a line each: each end polls what only the other end writes. */
static _Atomic uint64_t *tail_of(const struct spsc_queue *queue) { return (_Atomic uint64_t *)(void *)queue->memory; }

static _Atomic uint64_t *head_of(const struct spsc_queue *queue) {
    return (_Atomic uint64_t *)(void *)(queue->memory + LINE_BYTES);
}

/* The slot of this end's next message: its length, and the bytes one line further. */
static unsigned char *slot_of(const struct spsc_queue *queue) {
    return queue->memory + 2 * LINE_BYTES + queue->messages % queue->slots * slot_stride(queue->slot_bytes);
}

/* An empty message has a piece, too, which carries its length. */
static uint64_t count_pieces(size_t nbytes) { return nbytes == 0 ? 1 : (nbytes + PIECE_BYTES - 1) / PIECE_BYTES; }

/* ---- the sender ---- */

bool has_free_slot(const struct spsc_queue *queue) {
    /* Acquire: the receiver has read the slot before the sender overwrites it. */
    return queue->messages - atomic_load_explicit(head_of(queue), memory_order_acquire) < queue->slots;
}

void enqueue(struct spsc_queue *queue, const unsigned char *source, size_t nbytes) {
    unsigned char *slot = slot_of(queue);
    const uint64_t length = nbytes;
    memcpy(slot, &length, sizeof length);
    size_t copied = 0;
    do {
        const size_t left = nbytes - copied, n = left < PIECE_BYTES ? left : PIECE_BYTES;
        if (n > 0)
            memcpy(slot + LINE_BYTES + copied, source + copied, n);
        copied += n;
        /* Release: a receiver that sees this tail sees the piece, and with the first the length. */
        atomic_store_explicit(tail_of(queue), ++queue->pieces, memory_order_release);
    } while (copied < nbytes);
    queue->messages++;
}

/* ---- the receiver ---- */

static uint64_t pieces_here(const struct spsc_queue *queue) {
    /* Acquire: pairs with the release in enqueue. */
    return atomic_load_explicit(tail_of(queue), memory_order_acquire) - queue->pieces;
}

size_t message_bytes(const struct spsc_queue *queue) {
    uint64_t length;
    memcpy(&length, slot_of(queue), sizeof length);
    return (size_t)length;
}

bool has_arrived(const struct spsc_queue *queue) {
    const uint64_t here = pieces_here(queue);
    /* The length may be read only after its first piece is here. */
    return here > 0 && here >= count_pieces(message_bytes(queue));
}

enum outcome dequeue(struct spsc_queue *queue, struct receipt *receipt) {
    const uint64_t here = pieces_here(queue);
    if (here == 0)
        return NOTHING;
    if (message_bytes(queue) != receipt->nbytes)
        return ANOTHER_LENGTH;
    const uint64_t pieces = count_pieces(receipt->nbytes);
    /* `here` may count pieces of later messages, too. */
    const size_t stop = here < pieces ? (size_t)here * PIECE_BYTES : receipt->nbytes;
    const bool moves = receipt->copied < stop;
    if (moves)
        memcpy(receipt->target + receipt->copied, slot_of(queue) + LINE_BYTES + receipt->copied,
               stop - receipt->copied);
    receipt->copied = stop;
    if (here < pieces)
        return moves ? SOME : NOTHING;
    queue->pieces += pieces;
    queue->messages++;
    /* Release: the sender overwrites the slot only after the copy above. */
    atomic_store_explicit(head_of(queue), queue->messages, memory_order_release);
    return WHOLE;
}
