"""What can end or spoil a run: signals, time limits, hangs, steps that are not finite. Knows no model."""
