"""Point-to-point channels between ranks, known ahead: queues in shared memory, or persistent MPI requests."""
