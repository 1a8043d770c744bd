/*
 * The memory: a line with the sender's count, a line with the receiver's, then the slots, each a line with the
 * message's length and room for its bytes. A message is copied in pieces, and the sender counts pieces: a release store
 * behind each, which an acquire load answers, so the receiver copies a long message out while the rest is still coming
 * in. The receiver counts messages: the slot of one that it counts is the sender's again.
 *
 * Message i lies in slot i modulo `slots`. Each end writes its own count alone.
 */
#define _GNU_SOURCE
#include "spsc_queue.h"

#include <stdatomic.h>
#include <string.h>

#include "flags.h"

/* Measured in docs/notes.md: long enough that flags cost little, and short enough that both ends soon copy at once. */
#define PIECE_BYTES ((size_t)64 * 1024)

static size_t slot_stride(size_t slot_bytes) { return (slot_bytes + 2 * LINE_BYTES - 1) / LINE_BYTES * LINE_BYTES; }

size_t spsc_queue_bytes(size_t slots, size_t slot_bytes) { return 2 * LINE_BYTES + slots * slot_stride(slot_bytes); }

static _Atomic uint64_t *pieces_sent(const struct mailbox *box) { return (_Atomic uint64_t *)(void *)box->memory; }

static _Atomic uint64_t *messages_received(const struct mailbox *box) {
    return (_Atomic uint64_t *)(void *)(box->memory + LINE_BYTES);
}

/* The line of this end's next message; its bytes lie behind. */
static unsigned char *slot_of(const struct mailbox *box) {
    return box->memory + 2 * LINE_BYTES + box->messages % box->slots * slot_stride(box->slot_bytes);
}

static uint64_t count_pieces(size_t nbytes) { return nbytes == 0 ? 1 : (nbytes + PIECE_BYTES - 1) / PIECE_BYTES; }

/* ---- the sender ---- */

bool has_room(const struct mailbox *box) {
    return box->messages - atomic_load_explicit(messages_received(box), memory_order_acquire) < box->slots;
}

void put_message(struct mailbox *box, const unsigned char *source, size_t nbytes) {
    unsigned char *slot = slot_of(box);
    const uint64_t length = nbytes;
    memcpy(slot, &length, sizeof length);
    size_t copied = 0;
    do {
        const size_t left = nbytes - copied, n = left < PIECE_BYTES ? left : PIECE_BYTES;
        if (n > 0)
            memcpy(slot + LINE_BYTES + copied, source + copied, n);
        copied += n;
        atomic_store_explicit(pieces_sent(box), ++box->pieces, memory_order_release);
    } while (copied < nbytes);
    box->messages++;
}

/* ---- the receiver ---- */

static uint64_t pieces_here(const struct mailbox *box) {
    return atomic_load_explicit(pieces_sent(box), memory_order_acquire) - box->pieces;
}

size_t message_bytes(const struct mailbox *box) {
    uint64_t length;
    memcpy(&length, slot_of(box), sizeof length);
    return (size_t)length;
}

bool has_arrived(const struct mailbox *box) {
    const uint64_t here = pieces_here(box);
    return here > 0 && here >= count_pieces(message_bytes(box));
}

enum outcome take_message(struct mailbox *box, struct arrival *arrival) {
    const uint64_t here = pieces_here(box);
    if (here == 0)
        return NOTHING;
    if (message_bytes(box) != arrival->nbytes)
        return ANOTHER_LENGTH;
    const uint64_t pieces = count_pieces(arrival->nbytes);
    const size_t stop = here < pieces ? (size_t)here * PIECE_BYTES : arrival->nbytes;
    const bool moves = arrival->copied < stop;
    if (moves)
        memcpy(arrival->target + arrival->copied, slot_of(box) + LINE_BYTES + arrival->copied, stop - arrival->copied);
    arrival->copied = stop;
    if (here < pieces)
        return moves ? SOME : NOTHING;
    box->pieces += pieces;
    box->messages++;
    atomic_store_explicit(messages_received(box), box->messages, memory_order_release);
    return WHOLE;
}
