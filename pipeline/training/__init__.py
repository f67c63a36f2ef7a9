"""What a training step computes: batches, MixUp, loss and schedule, and the loop over steps."""
