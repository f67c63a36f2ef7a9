"""Steps of a run computed again, looked into, and compared with what was logged; the run itself is only read."""
