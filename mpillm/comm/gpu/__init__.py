"""Collectives of arrays on GPUs: NCCL, device pointers to MPI, or staging through pinned memory."""
