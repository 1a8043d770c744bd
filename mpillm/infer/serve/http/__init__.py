"""The HTTP side of a server, on rank 0: OpenAI's forms over a TextEngine."""
