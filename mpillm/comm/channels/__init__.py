"""Point-to-point channels known ahead: queues in shared memory, or MPI messages."""
