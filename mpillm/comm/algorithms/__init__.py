"""Collective algorithms as data: for each rank a list of rounds, independent of MPI."""
