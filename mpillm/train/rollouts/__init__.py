"""Answers that the model writes in training, their rewards, and the reference that it keeps to."""
