"""One training run: recipe, plan, engine, loop, checkpoint, evaluation, monitoring. Knows no scheduler."""
