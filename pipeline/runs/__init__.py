"""Everything of a run folder but its checkpoints: identity, claims, frozen recipe, event log and results."""
