"""How do ranks whose arrays lie on GPUs talk? The CPU's collectives behind pinned memory, device pointers, or NCCL."""
