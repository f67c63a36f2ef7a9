"""Pictures of a plan: memory by kind, the timeline of a step, throughput by number of GPUs."""
