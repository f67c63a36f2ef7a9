"""What can end or spoil a run: signals, time limits, hangs, non-finite steps. Knows no model and no scheduler."""
