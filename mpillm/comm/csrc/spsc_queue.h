/* Messages one way between two processes, through slots in memory that they share. */
#ifndef MPILLM_MAILBOX_H
#define MPILLM_MAILBOX_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* One end. The sender's and the receiver's differ in nothing but what is called on them. */
struct mailbox {
    unsigned char *memory; /* spsc_queue_bytes() of it, zero at first, the same for both */
    size_t slots, slot_bytes;
    uint64_t messages, pieces; /* that this end has done with */
};

/* One message on its way out. */
struct arrival {
    unsigned char *target;
    size_t nbytes, copied;
};

enum outcome { NOTHING, SOME, WHOLE, ANOTHER_LENGTH };

size_t spsc_queue_bytes(size_t slots, size_t slot_bytes);

/* Is there a slot to send into? */
bool has_room(const struct mailbox *box);

/* Copy a message of at most slot_bytes into a slot. There must be room. */
void put_message(struct mailbox *box, const unsigned char *source, size_t nbytes);

/* Has the oldest message arrived as a whole? */
bool has_arrived(const struct mailbox *box);

/* Copy out what has arrived of the oldest message, and free its slot when it is whole. One of ANOTHER_LENGTH stays. */
enum outcome take_message(struct mailbox *box, struct arrival *arrival);

/* The length of the oldest message, of which something has arrived. */
size_t message_bytes(const struct mailbox *box);

#endif
