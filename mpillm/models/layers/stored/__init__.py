"""Linear layers whose weights are stored as whole numbers of 8 or 4 bits."""
