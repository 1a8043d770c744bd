"""Tensor and sequence parallelism: the ranks of an axis share each layer, and the stream."""
