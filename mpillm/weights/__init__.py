"""Where do parameters rest? Layout-free HDF5 checkpoints."""
