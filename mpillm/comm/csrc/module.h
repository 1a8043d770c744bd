/* Declarations that the module's types share. Include it after Python.h. */
#ifndef MPILLM_MODULE_H
#define MPILLM_MODULE_H

#include <stdbool.h>
#include <sys/types.h>

extern PyTypeObject SpscQueueType;

/* Has the process ended? False for 0, a process that cannot be signalled. */
bool is_gone(pid_t process);

/* Call `step` without the GIL until it returns true (done); it waits up to the seconds it is given.
 * Between calls, handle signals and, in a long wait, call `may_come`, which sets an exception where
 * the peer has ended. 1: done; 0: the limit has passed; −1: an exception is set. */
int wait_for(void *waiting, bool (*step)(void *, double), bool (*may_come)(void *), double limit_seconds);

#endif
