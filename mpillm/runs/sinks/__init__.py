"""Where do a run's metrics go? One sink, one file."""
