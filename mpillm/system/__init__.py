"""What is this process? Its console, atomic files, HDF5, malloc, environment, PMIx, versions."""
