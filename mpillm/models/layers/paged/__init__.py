"""Keys and values in pages: the steps of a serving engine."""
