"""Everything that knows Slurm: its commands, its variables, the jobs of a chain and what becomes of them."""
