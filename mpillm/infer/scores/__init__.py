"""Scores: metrics of rows, with intervals by a bootstrap over them; comparisons of two models."""
