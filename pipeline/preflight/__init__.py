"""Checks of a stage before it runs, on this machine and on its nodes: they report findings, and change no run."""
