"""What is learnt from a batch? Fields, targets, loss; metrics. One task is one file."""
