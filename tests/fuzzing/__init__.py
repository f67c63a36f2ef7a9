"""Fuzzing of every reader of a format from outside: `python -m tests.fuzzing --help`."""
