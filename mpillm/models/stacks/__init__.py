"""The stacks: the torch module of each architecture, made of layers."""
