/* A single-producer, single-consumer queue of messages, in memory that two processes share. */
#ifndef MPILLM_SPSC_QUEUE_H
#define MPILLM_SPSC_QUEUE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* One process's view of a queue. Sender and receiver use the same struct and different calls. */
struct spsc_queue {
    unsigned char *memory; /* spsc_queue_bytes() of it, zero at first, the same for both */
    size_t slots, slot_bytes;
    uint64_t messages, pieces; /* that this process has sent or received */
};

/* One message on its way into an array. */
struct receipt {
    unsigned char *target;
    size_t nbytes, copied;
};

enum outcome { NOTHING, SOME, WHOLE, ANOTHER_LENGTH };

size_t spsc_queue_bytes(size_t slots, size_t slot_bytes);

/* Is there a free slot to send into? */
bool has_free_slot(const struct spsc_queue *queue);

/* Copy a message of at most slot_bytes into the next slot, which must be free. */
void enqueue(struct spsc_queue *queue, const unsigned char *source, size_t nbytes);

/* Has the oldest message arrived as a whole? */
bool has_arrived(const struct spsc_queue *queue);

/* Copy out what has arrived of the oldest message, and free its slot when it is whole.
 * A message of ANOTHER_LENGTH stays in the queue. */
enum outcome dequeue(struct spsc_queue *queue, struct receipt *receipt);

/* The length of the oldest message, of which at least one piece has arrived. */
size_t message_bytes(const struct spsc_queue *queue);

#endif
