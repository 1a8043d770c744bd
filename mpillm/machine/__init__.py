"""What is here? CPUs, GPUs, mounts, the MPI library by name, the node map, the cluster profile."""
