"""What does it really cost? OSU-style benchmarks; they write the cluster profile."""
