"""`coatnet replay` and `coatnet verify`: which stage is meant, its ranks on this machine, and what is shown."""
