"""What can be seen of a run: progress, logs, TensorBoard. Nothing here may change what a run computes or end it."""
