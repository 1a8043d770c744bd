"""Weights as whole numbers in files of others."""
