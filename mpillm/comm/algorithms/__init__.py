"""Collective algorithms as data: for each rank a list of rounds, free of MPI."""
