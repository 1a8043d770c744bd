/* What the module's types share. Include it behind Python.h. */
#ifndef MPILLM_KERNELMODULE_H
#define MPILLM_KERNELMODULE_H

#include <stdbool.h>
#include <sys/types.h>

extern PyTypeObject SpscQueueType;

/* Does the process live no longer? 0, for one that cannot be asked, is never gone. */
bool is_gone(pid_t process);

/* Call `step`, which waits up to so many seconds and tells whether all is done, without the lock of Python; between,
 * handle signals, and after a while ask `may_come`, which raises where nothing will. 1: done; 0: the limit has passed;
 * −1: an exception is set. */
int wait_for(void *waiting, bool (*step)(void *, double), bool (*may_come)(void *), double limit_seconds);

#endif
