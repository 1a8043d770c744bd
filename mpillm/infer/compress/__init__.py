"""Compression of a trained model: fewer bits, fewer weights; one method a file."""
