"""The batch systems, one file each: submit a job, ask for its state, know it from inside."""
