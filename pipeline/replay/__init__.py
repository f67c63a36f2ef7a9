"""Steps of a run computed again: what happens inside their micro-batches, and which samples make one not finite."""
