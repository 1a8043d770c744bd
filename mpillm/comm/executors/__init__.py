"""Run a collective: requests, the executors of a schedule, the MPI library's own collectives."""
