"""What does it really cost? Benchmarks in the manner of OSU and nccl-tests, and the cluster profile they write."""
