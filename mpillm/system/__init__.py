"""What is this process? Its console, atomic files, HDF5 by byte offset, malloc, environment, PMIx, versions."""
