"""What a person sees of a run: progress, logs, TensorBoard. Nothing here may change what a run computes."""
