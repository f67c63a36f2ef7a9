"""The rehearsal of a training job on one CPU: what each rank of the real topology would hold, save and read."""
