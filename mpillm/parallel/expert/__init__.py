"""Expert parallelism: ranks that share out the experts of each mixture."""
