"""How do ranks talk? Meshes, buffers, collectives, and leaving together when something fails."""
