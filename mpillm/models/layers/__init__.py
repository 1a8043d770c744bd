"""The layer library: the torch modules that architectures are made of."""
