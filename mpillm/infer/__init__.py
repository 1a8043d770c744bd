"""How is the result used? Evaluate and generate."""
