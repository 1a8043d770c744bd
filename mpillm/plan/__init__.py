"""What a run will cost: memory. Needs neither torch nor MPI."""
