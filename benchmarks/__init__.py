"""Benchmarks of speed and memory, mostly as ratios measured in one run; they are for people to read, not tests."""
