"""Who runs the show? Recipe, optimizer, loop, record."""
