"""Tests. Environment variables that must be set before torch or DeepSpeed is imported anywhere are set here."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
# The tests run side by side. Threads of an operation that share their core with other processes mostly wait for each other,
# spinning: tests of models then take several times as much processor time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
