"""What does one process compute? Plain single-device torch, which knows nothing of ranks."""
