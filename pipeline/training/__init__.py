"""What a training step computes: batches, MixUp and CutMix, loss and schedule, and the loop over steps."""
