"""Pairs of a source and a target: text, classes, images, sound."""
